"""EMA teacher: an exponential moving average of the encoder that encodes whole images (paper Eq. 5).

Its fp32 master weights average the optimizer's fp32 master weights; each rank stores the slices of them that it has of
the student's. The forward pass runs on a copy in the student's precision, gathered once per step, or on the master
weights themselves where these are complete and of the same precision. Shape letters: B images, N patches, M masked
patches, K taps, D width, P values of a patch.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from ddae.data.masking import Mask
from ddae.distributed.checkpoint_format import TensorShard
from ddae.distributed.shard_gather import ShardGather
from ddae.method.cuda_graph import GraphedFunction

CHUNK_SIZE = 2**22  # values updated at a time: limits temporary memory, and stays in a CPU's cache


class MovingAverage:
    """Exponential moving average of a module's fp32 master weights.

    The module given becomes the average that runs forward.
    """

    def __init__(self, module: nn.Module, shards: list[TensorShard], sharded: bool):
        """shards: this rank's slices of the averaged module's master weights, views that stay valid during the run.

        sharded: whether each element belongs to one rank only.
        """
        self._module, self.sharded = module.eval().requires_grad_(False), sharded
        self._shards, self._student = shards, [shard.values for shard in shards]
        parameters = dict(module.named_parameters())
        flat = next(module.parameters()).new_zeros(sum(p.numel() for p in parameters.values()))
        vector_to_parameters(flat, parameters.values())  # the module's weights become views of one flat tensor
        whole = {name: parameter.flatten() for name, parameter in parameters.items()}
        self._gather = ShardGather(whole, shards) if sharded else None
        self._model_slices = [whole[s.name][s.start : s.start + len(s.values)] for s in shards]
        # Without sharding, rounding and offloading the model weights are the master weights.
        kind = flat.dtype, flat.device
        same = not sharded and all((values.dtype, values.device) == kind for values in self._student)
        self.masters = self._model_slices if same else [torch.empty_like(values) for values in self._student]
        for master, shard in zip(self.masters, shards, strict=True):
            master.copy_(shard.values)
        self.compensation = [torch.zeros_like(master) for master in self.masters]  # rounding errors of past additions
        self._chunks = list(_chunks([master.numel() for master in self.masters]))
        self.sync_model_weights()

    @property
    @torch.no_grad()
    def module(self) -> nn.Module:
        """The average that runs forward. Waits for the weights of the other ranks, which update() asks for."""
        if self._gather is not None:
            self._gather.finish()
        return self._module

    @torch.no_grad()
    def update(self, momentum: float, applied: Float[Tensor, ""] | None = None) -> None:
        """masters <- momentum * masters + (1 - momentum) * student, with Kahan summation.

        Plain fp32 averages at momentum 0.99999 lose a fifth of the change to rounding. applied: 1 if the student was
        updated; 0 leaves the average unchanged.
        """
        if self.masters:  # with many ranks some own no slice of the encoder
            rate = torch.full((), 1 - momentum, device=self.masters[0].device)
            rate = rate if applied is None else rate * applied.to(rate.device)
            for chunk in self._chunks:
                _kahan_update(self._student[chunk], self.masters[chunk], self.compensation[chunk], rate)
        self.sync_model_weights()

    @torch.no_grad()
    def sync_model_weights(self) -> None:
        """Copy the master weights into the module that runs forward. All ranks call it."""
        if self._gather is not None:
            self._gather.start(self.masters)
        elif self.masters is not self._model_slices:
            torch._foreach_copy_(self._model_slices, self.masters)

    def local_shards(self) -> dict[str, list[TensorShard]]:
        """Return this rank's slices of the master weights and of the compensation: views."""
        tensors = {"teacher": self.masters, "teacher_rounding": self.compensation}
        return {
            kind: [shard._replace(values=each) for shard, each in zip(self._shards, values, strict=True)]
            for kind, values in tensors.items()
        }


def _chunks(sizes: list[int]) -> Iterator[slice]:
    """Yield slices of consecutive tensors, each of at least CHUNK_SIZE values in total."""
    first, values = 0, 0
    for number, size in enumerate(sizes, 1):
        values += size
        if values >= CHUNK_SIZE or number == len(sizes):
            yield slice(first, number)
            first, values = number, 0


def _kahan_update(student: list[Tensor], masters: list[Tensor], compensation: list[Tensor], rate: Tensor) -> None:
    """Compute masters += rate * (student - masters) with Kahan summation, in place."""
    change = torch._foreach_sub(student, masters)
    torch._foreach_mul_(change, rate)
    torch._foreach_sub_(change, compensation)
    torch._foreach_copy_(compensation, masters)
    torch._foreach_add_(masters, change)
    torch._foreach_sub_(compensation, masters)  # old - new: the negative of the change that was actually added
    torch._foreach_add_(compensation, change)
    torch._foreach_neg_(compensation)


class Teacher(MovingAverage):
    """EMA encoder, whose tokens are the feature branch's targets."""

    skip_unused_tokens = True  # the last block outputs masked patches only: equal targets with less computation
    stream: torch.cuda.Stream | None = None  # side stream of start_targets()
    graph: GraphedFunction | None = None  # of compute_targets(), for targets()

    def start_targets(
        self, patches: Float[Tensor, "B N P"], taps: Sequence[int], mask: Mask
    ) -> tuple[Float[Tensor, "K B M D"], torch.cuda.Event | None]:
        """Compute targets() on the side stream; return them and the event to wait for before they are used.

        The arguments must stay alive until then. Without a side stream the event is None.
        """
        if self.stream is None:
            return self.targets(patches, taps, mask), None
        self.stream.wait_stream(torch.cuda.current_stream())  # for the patches, and for the last EMA update
        with torch.cuda.stream(self.stream):
            targets = self.targets(patches, taps, mask)
        ready = torch.cuda.Event()
        ready.record(self.stream)
        targets.record_stream(torch.cuda.current_stream())  # their memory is not reused while that stream uses them
        return targets, ready

    @torch.no_grad()
    def targets(self, patches: Float[Tensor, "B N P"], taps: Sequence[int], mask: Mask) -> Float[Tensor, "K B M D"]:
        """Return the tokens of the masked patches after each tap, before any norm.

        patches: normalised, the visible ones first, then the masked ones. With a graph, the next call overwrites the
        tokens.
        """
        _ = self.module  # waits for the weights of the other ranks, outside the graph
        compute = self.compute_targets if self.graph is None else self.graph
        return compute(patches, *mask, tuple(taps))

    def compute_targets(
        self,
        patches: Float[Tensor, "B N P"],
        visible: Int64[Tensor, "B V"],
        masked: Int64[Tensor, "B M"],
        taps: tuple[int, ...],
    ) -> Float[Tensor, "K B M D"]:
        """Return targets() without a graph. visible, masked: the fields of its mask."""
        num_masked = masked.shape[1]
        num_outputs = num_masked if self.skip_unused_tokens else None
        tokens = self.module(patches, taps, torch.cat([visible, masked], 1), num_outputs=num_outputs)
        return torch.stack([each[:, each.shape[1] - num_masked :] for each in tokens])
