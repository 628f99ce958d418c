"""A function without gradients as a CUDA graph, so that its many launches are one for the host."""

from collections.abc import Callable
from typing import Any

import torch
from ddae_kernels.implementation import is_intercepted
from torch import Tensor

WARMUP_CALLS = 3  # before the capture: libraries choose their kernels and allocate, torch.compile compiles
Captured = tuple[Callable[[], object], Tensor]  # runs a graph, and the tensor that it fills


def capture(function: Callable[[], Tensor]) -> Captured:
    """Record the kernels of a function. Return the function that runs them, and the tensor that they fill."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: the loader's threads and NCCL's may use the GPU during the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = function()
    return graph.replay, output


class GraphedFunction:
    """Runs a function of tensors eagerly in the first WARMUP_CALLS calls, then as a CUDA graph.

    The function reads its tensors and everything else, such as weights, at fixed addresses, and must not synchronise
    host and device. Tensors of another shape or dtype, and other values of the other arguments, start again with
    warm-up and capture. All replays return the same tensor: the next call overwrites it, after which autograd refuses a
    backward pass that needs it. Where operators are counted, the function runs eagerly, because a replay has none.
    """

    def __init__(self, function: Callable[..., Tensor], capture: Callable[[Callable[[], Tensor]], Captured] = capture):
        """capture: stands in for capture() in tests."""
        self._function, self._capture = function, capture
        self._key: tuple[Any, ...] = ()
        self._calls = 0  # with this key
        self._buffers: list[Any] = []  # the arguments that the graph reads
        self._graph: Captured | None = None

    def __call__(self, *args: Any) -> Tensor:
        if is_intercepted(args[0]):
            return self._function(*args)
        key = tuple((arg.shape, arg.dtype, arg.device) if isinstance(arg, Tensor) else arg for arg in args)
        if key != self._key:
            self._key, self._calls, self._graph = key, 0, None
        self._calls += 1
        if self._calls <= WARMUP_CALLS:
            return self._function(*args)
        if self._graph is None:
            self._buffers = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
            self._graph = self._capture(lambda: self._function(*self._buffers))
        replay, output = self._graph
        for buffer, arg in zip(self._buffers, args, strict=True):
            if isinstance(arg, Tensor):
                buffer.copy_(arg)
        replay()
        torch.autograd.graph.increment_version(output)
        return output
