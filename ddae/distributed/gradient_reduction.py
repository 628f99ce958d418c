"""Gradients at ZeRO stages 1 and 2: from the parameters through buckets into this rank's fp32 partition.

DeepSpeed's own hooks copy every gradient by a launch of its own, copy each bucket once more to reduce it, and
synchronise the device after the backward pass. Here a bucket is filled by one launch when enough gradients are ready,
reduced in place on a stream of its own, and added to the partition by one launch; streams wait for each other on the
device. The averaged gradients are equal to the bit. The path with a second stream has not run on a GPU yet.

Reads attributes of DeepSpeed that REQUIRED lists; a DeepSpeed that lacks one keeps its own reduction, with a warning.
"""

import importlib
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddae.distributed.comm import rank, world_size
from ddae.distributed.zero_state import deepspeed

collectives = importlib.import_module("deepspeed.comm")
logger = logging.getLogger(__name__)

REQUIRED = (  # attributes of DeepSpeed's optimizer of stages 1 and 2
    *("_grad_acc_hooks", "averaged_gradients", "bit16_groups", "bit16_groups_flat", "partition_size", "get_param_id"),
    *("grad_start_offset", "grad_partition_insertion_offset", "is_param_in_current_partition", "reduce_bucket_size"),
    *("gradient_accumulation_dtype", "get_param_comm_dtype", "is_gradient_accumulation_boundary", "dp_process_group"),
    *("overlapping_partition_gradients_reduce_epilogue", "reduce_gradients", "_update_model_bit16_weights"),
    *("round_robin_bit16_groups", "round_robin_bit16_offsets", "use_grad_accum_attribute", "partition_gradients"),
)


class Gradients(list):
    """The gradients of a parameter group as DeepSpeed's step() takes them: one flat tensor of the rank's partition."""

    def __init__(self, flat: Tensor):
        super().__init__([flat])
        self.flat_partition = flat


class Slice(NamedTuple):
    """The part of a parameter that is in this rank's partition, in numbers."""

    group: int
    start_in_parameter: int
    start_in_partition: int
    length: int


class GradientReduction:
    """Replaces the gradient hooks of a DeepSpeed optimizer of stage 1 or 2."""

    def __init__(self, optimizer: Any, overlap: bool):
        """overlap: reduce on a second stream of the GPU, during the backward pass."""
        self._optimizer, self._device = optimizer, optimizer.bit16_groups_flat[0].device
        self._stream = torch.cuda.Stream(self._device) if overlap and self._device.type == "cuda" else None
        parameters: list[nn.Parameter] = [p for group in optimizer.bit16_groups for p in group]
        self._slices = {id(p): self._slice(p, group) for group, of in enumerate(optimizer.bit16_groups) for p in of}
        self._dtypes = {id(parameter): optimizer.get_param_comm_dtype(parameter) for parameter in parameters}
        self._pending: dict[torch.dtype, list[nn.Parameter]] = {dtype: [] for dtype in self._dtypes.values()}
        self._sizes = dict.fromkeys(self._pending, 0)
        self._buffers: dict[tuple[torch.dtype, int], Tensor] = {}
        self._turns = dict.fromkeys(self._pending, 0)  # which of the two buffers comes next
        self._free: dict[tuple[torch.dtype, int], torch.cuda.Event] = {}  # when a buffer may be filled again
        self._partitions: dict[int, Tensor] = {}  # this step's gradients by group
        self._first = True  # whether no micro-batch of this step has been reduced yet
        self._producers: set[torch.cuda.Stream] = set()  # streams on which pending gradients were computed
        for hook in optimizer._grad_acc_hooks:
            hook.remove()
        optimizer._grad_acc_hooks = [p.register_post_accumulate_grad_hook(self._collect) for p in parameters]
        optimizer.overlapping_partition_gradients_reduce_epilogue = self._finish
        optimizer.reduce_gradients = lambda pipeline_parallel=False: self._finish()

    def _slice(self, parameter: nn.Parameter, group: int) -> Slice | None:
        optimizer, key = self._optimizer, self._optimizer.get_param_id(parameter)
        if not optimizer.is_param_in_current_partition[key]:
            return None
        start = int(optimizer.grad_start_offset[group][rank()][key])
        place = int(optimizer.grad_partition_insertion_offset[group][rank()][key])
        length = min(parameter.numel() - start, int(optimizer.partition_size[group]) - place)
        return Slice(group, start, place, length)

    def _collect(self, parameter: nn.Parameter) -> None:
        """Note that a gradient is ready; reduce a bucket of gradients when it is full."""
        if not self._optimizer.partition_gradients and not self._optimizer.is_gradient_accumulation_boundary():
            return  # stage 1 accumulates in the parameter
        dtype, size = self._dtypes[id(parameter)], parameter.numel()
        pending = self._pending[dtype]
        if pending and self._sizes[dtype] + size > self._optimizer.reduce_bucket_size:
            self._reduce(dtype)
            pending = self._pending[dtype]
        pending.append(parameter)
        self._sizes[dtype] += size
        if self._stream is not None:
            self._producers.add(torch.cuda.current_stream(self._device))

    @torch.no_grad()
    def _reduce(self, dtype: torch.dtype) -> None:
        """Average the pending gradients over the ranks, and add this rank's part to its partition."""
        parameters, self._pending[dtype] = self._pending[dtype], []
        size, self._sizes[dtype] = self._sizes[dtype], 0
        gradients: list[Tensor] = [parameter.grad for parameter in parameters]  # type: ignore[misc]
        for parameter in parameters:
            parameter.grad = None
        if world_size() == 1:
            slices: list[Slice] = [self._slices[id(parameter)] for parameter in parameters]  # type: ignore[misc]
            self._accumulate([(each.reshape(-1), s) for each, s in zip(gradients, slices, strict=True)])
            return
        bucket, key = self._next_buffer(dtype, size)
        parts = bucket.split([parameter.numel() for parameter in parameters])
        shaped = [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]
        pairs = zip(parts, (self._slices[id(parameter)] for parameter in parameters), strict=True)
        own = [(part.narrow(0, s.start_in_parameter, s.length), s) for part, s in pairs if s is not None]
        if self._stream is None:
            torch._foreach_copy_(shaped, gradients)
            self._average(bucket, own)
            return
        current = torch.cuda.current_stream(self._device)
        for producer in self._producers - {current}:
            current.wait_stream(producer)
        self._producers.clear()
        if key in self._free:
            current.wait_event(self._free[key])
        torch._foreach_copy_(shaped, gradients)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._average(bucket, own)
            self._free[key] = self._stream.record_event()  # type: ignore[assignment]

    def _average(self, bucket: Tensor, own: list[tuple[Tensor, Slice]]) -> None:
        """Average a bucket over the ranks in place, and add this rank's parts of it to its partition."""
        bucket.div_(world_size())
        collectives.all_reduce(bucket, group=self._optimizer.dp_process_group)
        self._accumulate(own)

    def _accumulate(self, own: list[tuple[Tensor, Slice]]) -> None:
        """Add flat parts of gradients to the partition, which is zero before the first micro-batch of a step."""
        if not own:
            return
        for group in sorted({each.group for _, each in own} - self._partitions.keys()):
            self._partitions[group] = self._new_partition(group)
        parts = [part for part, _ in own]
        places = [self._partitions[s.group].narrow(0, s.start_in_partition, s.length) for _, s in own]
        if self._first:
            torch._foreach_copy_(places, parts)
        else:
            torch._foreach_add_(places, [part.to(places[0].dtype) for part in parts])

    def _new_partition(self, group: int) -> Tensor:
        size, dtype = int(self._optimizer.partition_size[group]), self._optimizer.gradient_accumulation_dtype
        return torch.zeros(size, dtype=dtype, device=self._device)

    def _finish(self) -> None:
        """Reduce what is pending at the end of a backward pass; at the end of a step give it to DeepSpeed."""
        for dtype in self._pending:
            if self._pending[dtype]:
                self._reduce(dtype)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._buffers, self._free = {}, {}  # the next forward pass needs their memory
        self._first = self._optimizer.is_gradient_accumulation_boundary()
        if self._first:
            for group in range(len(self._optimizer.bit16_groups)):
                flat = self._partitions.pop(group, None)
                gradients = Gradients(self._new_partition(group) if flat is None else flat)
                self._optimizer.averaged_gradients[group] = gradients

    def _next_buffer(self, dtype: torch.dtype, size: int) -> tuple[Tensor, tuple[torch.dtype, int]]:
        """Return a buffer of `size` numbers, and its key. With a stream two of them alternate."""
        turn = self._turns[dtype]
        self._turns[dtype] = 1 - turn if self._stream is not None else turn
        key = dtype, turn
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(size, dtype=dtype, device=self._device)
        return self._buffers[key][:size], key


def replace_reduction(optimizer: Any, zero: dict[str, Any]) -> None:
    """Replace the gradient reduction of DeepSpeed's optimizer where that is supported: stages 1 and 2 without offload.

    zero: the block zero_optimization of the JSON. Stage 1 with accumulation in another dtype than the gradients', and
    gradients that are not contiguous, keep DeepSpeed's.
    """
    offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if zero.get("stage", 0) not in (1, 2) or offload or not zero.get("contiguous_gradients", True):
        return
    if missing := [name for name in REQUIRED if not hasattr(optimizer, name)]:
        logger.warning("DeepSpeed %s has no %s: its own gradient reduction is used", deepspeed.__version__, missing[0])
        return
    if optimizer.use_grad_accum_attribute or not zero.get("reduce_scatter", True):
        return
    if _weights_are_views(optimizer):
        optimizer._update_model_bit16_weights = lambda group: None
    GradientReduction(optimizer, bool(zero.get("overlap_comm", False)))  # which the optimizer's hooks refer to


def _weights_are_views(optimizer: Any) -> bool:
    """Return whether all weights are views of DeepSpeed's flat tensors already, so that it need not set them again."""
    return all(
        parameter.data_ptr() == flat.data_ptr() + offset * flat.element_size()
        for flat, parameters, offsets in zip(
            optimizer.bit16_groups_flat,
            optimizer.round_robin_bit16_groups,
            optimizer.round_robin_bit16_offsets,
            strict=True,
        )
        for parameter, offset in zip(parameters, offsets, strict=True)
    )
