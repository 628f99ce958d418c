"""Counts the operators that a training step launches, and the host time that it takes, by phase."""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from ddae_kernels import operators
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from ddae.distributed.zero_state import deepspeed, set_world_group, skip_shared_memory_op
from ddae.method.cuda_graph import Captured, GraphedFunction
from ddae.method.model import PretrainModel
from ddae.training.step import Targets, TeacherTargets, compile_modules

RANKS = 64  # of the fake process group
NOT_LAUNCHED = set(  # operators that compute nothing: views, allocations, bookkeeping
    "view t transpose permute expand slice select split split_with_sizes narrow detach as_strided unsqueeze squeeze "
    "unbind chunk alias _unsafe_view _reshape_alias empty new_empty empty_like new_empty_strided empty_strided "
    "lift_fresh is_same_size _record_function_enter_new _record_function_exit".split()
)


class LaunchCounter(TorchDispatchMode):
    """Counts the operators that would launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled functions run as such, and count what they launch."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name.partition("::")[2] not in NOT_LAUNCHED
        return func(*args, **(kwargs or {}))


class Phases:
    """Attributes a running total to the phases of a PretrainStep: its methods are wrapped within the context.

    total: returns the sum so far, of seconds or of launches.
    """

    def __init__(self, step: Any, total: Callable[[], float]):
        self.step, self.total = step, total
        self.by_phase: dict[str, float] = defaultdict(float)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Wrap the methods; add what is in none of the phases to `rest`."""
        step = self.step
        wrapped = {
            "teacher": [(step.forward, "targets")],
            "student": [(step.forward, "engine")],
            "backward": [(step.engine, "backward")],
            "optimizer": [(step.engine, "step")],
            "betas": [(step.betas, "accumulate_norm"), (step.betas, "step")],
            "EMA update": [(step.targets, "update")],
        }
        with ExitStack() as stack:
            for phase, methods in wrapped.items():
                for owner, name in methods:
                    stack.enter_context(self._wrapped(owner, name, phase))
            start = self.total()
            yield
            self.by_phase["rest"] += self.total() - start - sum(self.by_phase.values())

    @contextmanager
    def _wrapped(self, owner: Any, name: str, phase: str) -> Iterator[None]:
        original, phases = getattr(owner, name), self

        class Measured:
            def __getattr__(self, attribute: str) -> Any:
                return getattr(original, attribute)

            def __call__(self, *args: Any, **options: Any) -> Any:
                start = phases.total()
                try:
                    return original(*args, **options)
                finally:
                    phases.by_phase[phase] += phases.total() - start

        own = name in vars(owner)
        setattr(owner, name, Measured())
        try:
            yield
        finally:
            setattr(owner, name, original) if own else delattr(owner, name)


def host_ms(step: Any, batch: Any, count: int) -> dict[str, float]:
    """Return the CPU time of the training thread in ms by phase: the median of `count` steps."""
    rows = []
    for _ in range(count):
        phases = Phases(step, time.thread_time)
        with phases.measured():
            step(batch)
        rows.append(phases.by_phase)
    return {phase: 1000 * median(row[phase] for row in rows) for phase in rows[0]}


def launches(step: Any, batch: Any) -> dict[str, int]:
    """Return the operators that one step launches, by phase."""
    with LaunchCounter() as counter:
        phases = Phases(step, lambda: counter.count)
        with phases.measured():
            step(batch)
    return {phase: int(count) for phase, count in phases.by_phase.items()}


def start_fake_process_group() -> None:
    """Make this process rank 0 of RANKS ranks, of which the others do not exist."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(RANKS)}
    skip_shared_memory_op()
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    set_world_group(dist.new_group())


def replace_kernels() -> None:
    """Without a GPU: let Triton kernels do nothing, and fill the losses' outputs with zeros by one launch."""
    if torch.cuda.is_available():
        return

    class Empty:
        triton = operators.kernels.triton

        def __getattr__(self, name: str) -> Any:
            return self

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **options: None

    outputs = operators._empty_outputs
    operators.kernels = Empty()
    operators._empty_outputs = lambda *args, **options: tuple(map(torch.zeros_like, outputs(*args, **options)))  # type: ignore[assignment]


class ZerosOnce:
    """Stands in for a captured graph: one launch, then tensors of zeros that were allocated in the first call."""

    def __init__(self, outputs: Sequence[Any]):
        """outputs: of the captured graph; of a tensor, which may be fake, only shape and dtype matter."""
        self._outputs = [
            partial(torch.zeros, tuple(o.shape), dtype=o.dtype) if isinstance(o, Tensor) else o for o in outputs
        ]
        self._launched: Tensor | None = None

    def __call__(self, *inputs: Any) -> list[Any]:
        if self._launched is None:
            self._launched = torch.zeros(())
            self._outputs = [each() if isinstance(each, partial) else each for each in self._outputs]
        self._launched.zero_()
        return [each.detach() if isinstance(each, Tensor) else each for each in self._outputs]


def zeros_backend(graph: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
    """Compile with torch.compile to ZerosOnce: forward and backward pass keep the host's work around a CUDA graph."""

    def compile_part(module: torch.fx.GraphModule, _: Sequence[Any]) -> Any:
        (outputs,) = next(node for node in module.graph.nodes if node.op == "output").args
        return make_boxed_func(ZerosOnce([o.meta["val"] if isinstance(o, torch.fx.Node) else o for o in outputs]))

    return aot_autograd(fw_compiler=compile_part)(graph, example_inputs)


def replace_graphs(model: PretrainModel, targets: Targets) -> None:
    """Without a GPU: let the teacher, and what compile_modules() compiles of the student, run as ZerosOnce."""
    compile_modules(model, Targets(), zeros_backend)
    if isinstance(targets, TeacherTargets):

        def capture(function: Callable[[], Tensor]) -> Captured:
            output = function()
            return output.zero_, output  # one launch instead of the graph

        targets.teacher.graph = GraphedFunction(targets.teacher.compute_targets, capture)
