"""The teacher: a copy of the encoder that follows the student slowly and reads whole images (paper Eq. 5).

Its master weights are fp32 and follow the optimizer's fp32 masters. Each rank keeps the slices that it owns of the
student's masters; a copy in the student's precision, gathered once a step, runs the forward pass, or the masters
themselves where they are whole and alike. B images, N patches, M masked, K taps, D width, P numbers of a patch.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ddae.data.masking import Mask
from ddae.distributed.checkpoint_format import TensorShard
from ddae.distributed.comm import sum_over_ranks
from ddae.models.vit import Encoder

PART = 2**22  # numbers that follow at a time: what that needs besides is small, and on a CPU still in the cache


class MovingAverage:
    """A module that follows another slowly, over fragments of that one's masters, views that live as long as the run;
    `sharded` says that each element belongs to one rank alone.

    The module given becomes the average that runs forward.
    """

    def __init__(self, module: nn.Module, fragments: list[TensorShard], sharded: bool):
        self.module = module.eval().requires_grad_(False)
        self._places = [(fragment.name, fragment.start) for fragment in fragments]
        self._followed = [fragment.values for fragment in fragments]
        self.sharded = sharded
        parameters = dict(module.named_parameters())
        first = next(iter(parameters.values()))
        self._flat = torch.zeros(sum(p.numel() for p in parameters.values()), dtype=first.dtype, device=first.device)
        offsets, used = {}, 0
        for name, parameter in parameters.items():  # the module's weights become views of one flat tensor
            offsets[name] = used
            parameter.data = self._flat[used : used + parameter.numel()].view_as(parameter)
            used += parameter.numel()
        self._slices = [
            self._flat[offsets[f.name] + f.start : offsets[f.name] + f.start + f.values.numel()] for f in fragments
        ]
        # Where nothing is sharded, rounded or offloaded the weights that run are themselves the masters.
        same = not sharded and all(f.values.dtype == first.dtype and f.values.device == first.device for f in fragments)
        self.masters = self._slices if same else [torch.empty_like(fragment.values) for fragment in fragments]
        for master, fragment in zip(self.masters, fragments, strict=True):
            master.copy_(fragment.values)
        self.rounding = [torch.zeros_like(master) for master in self.masters]  # what fp32 lost so far
        self._parts = list(_parts([master.numel() for master in self.masters]))
        self.sync_model_weights()

    @torch.no_grad()
    def update(self, momentum: float, applied: Tensor | None = None) -> None:
        """masters <- momentum * masters + (1 - momentum) * student, with Kahan's compensation.

        A plain fp32 average at m = 0.99999 rounds a fifth of the way away; what an addition loses is kept and given
        to the next. applied: [], 1 where the student has made its step; with 0 the masters stay where they are.
        """
        if self.masters:  # with many ranks some own none of the encoder
            rate = torch.full((), 1 - momentum, device=self.masters[0].device)
            rate = rate if applied is None else rate * applied.to(rate.device)
            for part in self._parts:
                _update_part(self._followed[part], self.masters[part], self.rounding[part], rate)
        self.sync_model_weights()

    @torch.no_grad()
    def sync_model_weights(self) -> None:
        """Bring the masters into the module that runs forward."""
        if self.sharded:
            self._flat.zero_()
        if self.masters and self.masters is not self._slices:
            torch._foreach_copy_(self._slices, self.masters)
        if self.sharded:
            sum_over_ranks(self._flat)  # each element is one rank's and zero elsewhere: the sum is exact

    def local_shards(self) -> dict[str, list[TensorShard]]:
        """This rank's slices of the masters and of what fp32 lost: views; who fills them calls publish()."""
        both = {"teacher": self.masters, "teacher_rounding": self.rounding}
        return {
            of: [TensorShard(*place, values) for place, values in zip(self._places, tensors, strict=True)]
            for of, tensors in both.items()
        }


def _parts(sizes: list[int]) -> Iterator[slice]:
    """Neighbours that are of at least PART numbers together."""
    first, numbers = 0, 0
    for place, size in enumerate(sizes, 1):
        numbers += size
        if numbers >= PART or place == len(sizes):
            yield slice(first, place)
            first, numbers = place, 0


def _update_part(values: list[Tensor], masters: list[Tensor], rounding: list[Tensor], rate: Tensor) -> None:
    """A part of follow(), in place: what stays from step to step stays where it is in memory."""
    change = torch._foreach_sub(values, masters)
    torch._foreach_mul_(change, rate)
    torch._foreach_sub_(change, rounding)
    torch._foreach_copy_(rounding, masters)
    torch._foreach_add_(masters, change)
    torch._foreach_sub_(rounding, masters)  # what was, less what is: the step that was made, with the other sign
    torch._foreach_add_(rounding, change)
    torch._foreach_neg_(rounding)


class Teacher(MovingAverage):
    """Momentum encoder."""

    module: Encoder

    only_masked = True  # the last block works on masked patches alone: the same targets with less work
    stream: torch.cuda.Stream | None = None  # where start() runs

    def start(self, patches: Tensor, taps: Sequence[int], mask: Mask) -> tuple[Tensor, torch.cuda.Event | None]:
        """targets() beside what comes next on the current stream, and what that has to wait for before it reads them.
        The arguments must live until it has waited."""
        if self.stream is None:
            return self.targets(patches, taps, mask), None
        self.stream.wait_stream(torch.cuda.current_stream())  # patches, and the last step's follow()
        with torch.cuda.stream(self.stream):
            targets = self.targets(patches, taps, mask)
        ready = torch.cuda.Event()
        ready.record(self.stream)
        targets.record_stream(torch.cuda.current_stream())  # not to be freed for the next ones while they are read
        return targets, ready

    @torch.no_grad()
    def targets(self, patches: Tensor, taps: Sequence[int], mask: Mask) -> Tensor:
        """Tokens of the masked patches after each tap, before any norm: normalised [B, N, P], visible patches first,
        then masked ones -> [K, B, M, D]."""
        num_masked = mask.masked.shape[1]
        wanted = num_masked if self.only_masked else None
        tokens = self.module(patches, taps, torch.cat(mask, 1), wanted=wanted)
        return torch.stack([of_tap[:, of_tap.shape[1] - num_masked :] for of_tap in tokens])
