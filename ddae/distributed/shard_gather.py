"""Weights of which each rank has slices: copied to all ranks by one all-gather that runs in the background."""

import torch
import torch.distributed as dist
from torch import Tensor

from ddae.distributed.checkpoint_format import TensorShard
from ddae.distributed.comm import gather, world_size

# torch 2.14 deprecates the older name, which torch 2.10 needs.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class ShardGather:
    """Copies the slices of all ranks into whole tensors that every rank has."""

    def __init__(self, whole: dict[str, Tensor], shards: list[TensorShard]):
        """whole: the flattened tensors by name. shards: this rank's slices; each number belongs to one rank only.

        All ranks call it.
        """
        of_ranks = gather([(shard.name, shard.start, shard.values.numel()) for shard in shards])
        used = [sum(length for _, _, length in slices) for slices in of_ranks]
        self._row = max(used)  # numbers that each rank sends, with padding at the end
        self._own = [shard.values.numel() for shard in shards]
        self._lengths: list[int] = []  # of the pieces of what is gathered
        self._places: list[Tensor | None] = []  # where they go; None: padding
        for slices, numbers in zip(of_ranks, used, strict=True):
            self._lengths += [*(length for _, _, length in slices), self._row - numbers]
            self._places += [*(whole[name][start : start + length] for name, start, length in slices), None]
        self._like = next(iter(whole.values()))
        self._pending: tuple[dist.Work | None, Tensor] | None = None

    def start(self, values: list[Tensor]) -> None:
        """Send this rank's slices, in the order of the shards. All ranks call it; it does not wait for them."""
        self.finish()
        row = self._like.new_empty(self._row)
        if values:  # with many ranks some own nothing
            torch._foreach_copy_(list(row[: sum(self._own)].split(self._own)), values)
        if world_size() == 1:
            self._pending = None, row
            return
        gathered = self._like.new_empty(world_size() * self._row)
        self._pending = all_gather(gathered, row, async_op=True), gathered

    def finish(self) -> None:
        """Wait, on a GPU its stream, until the whole tensors are those of the last start()."""
        if self._pending is None:
            return
        (work, gathered), self._pending = self._pending, None
        if work is not None:
            work.wait()
        if gathered.is_cuda:
            gathered.record_stream(torch.cuda.current_stream())  # its memory may belong to another stream
        pairs = zip(gathered.split(self._lengths), self._places, strict=True)
        pieces, places = zip(*((piece, place) for piece, place in pairs if place is not None), strict=True)
        torch._foreach_copy_(list(places), list(pieces))
