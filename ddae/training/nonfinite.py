"""Non-finite gradients: count skipped steps without host synchronisation, and leave a dump when there are too many.

    dumps/step_00000123/        the state before that step, as in a checkpoint (distributed/checkpoint.py), and
        config.json
        batch_00000.safetensors   rank 0's micro-batches: images, seeds of their masks, sample numbers
        layers_00000.json         rank 0's sample keys, and the largest absolute output and gradient of each layer

launch/replay.py runs such a step again.
"""

import json
import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ddae.data.loader import Batch
from ddae.distributed.checkpoint import Checkpoints
from ddae.distributed.checkpoint_format import Checkpointable
from ddae.distributed.comm import barrier, is_main, rank
from ddae.training.optimizer import Optimizable
from ddae.training.run import Run

MAX_SKIPPED_STEPS = 3  # in a row; then the run ends
MAX_NAMES_SHOWN = 20  # sample keys in an error
DUMPED = ("images", "seeds", "samples")  # fields of a Batch; its mask follows from the seeds
logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """The gradients of several consecutive steps were non-finite."""


class NonFiniteGuard:
    """Ends a run after MAX_SKIPPED_STEPS consecutive steps with non-finite gradients, and leaves a dump of the last.

    Whether a step was applied is known on the device. On a GPU the flag of a step is read when the next step has been
    queued, at the same point on all ranks, so that the host never waits for a device that has nothing else to do.
    """

    def __init__(
        self,
        run: Run,
        state: dict[str, Checkpointable],
        optimizable: Optimizable,
        num_steps: int,
        loss: Callable[[int, int, Batch], Tensor],
        facts: Callable[[int], dict[str, Any]],
    ):
        """loss(step, micro, batch) computes the loss [] of a micro-batch again; facts(step): what replaying the step
        needs besides the state."""
        self.run, self.state, self.optimizable, self.num_steps = run, state, optimizable, num_steps
        self.loss, self.facts = loss, facts
        self._skipped = 0  # consecutive steps
        self._held: dict[int, list[Batch]] = {}  # by step, while steps are skipped
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def hold(self, step: int, batch: Batch) -> None:
        """Keep a micro-batch of this step, if the steps before it were skipped."""
        if self._skipped:
            self._held.setdefault(step, []).append(batch)

    def check(self, step: int, applied: Tensor) -> None:
        """Record whether `step` was applied: float32 [], 1 or 0. Raise NonFiniteError after too many skipped steps."""
        self._add(step, applied)
        for number, was_applied in self._known(step):
            self._skipped = 0 if was_applied else self._skipped + 1
            if self._skipped:
                logger.info("step %d skipped: non-finite gradients in %d consecutive steps", number + 1, self._skipped)
            if self._skipped == MAX_SKIPPED_STEPS:
                self._dump_and_raise(number)
        self._held = {number: batches for number, batches in self._held.items() if self._skipped and number >= step}

    def _add(self, step: int, applied: Tensor) -> None:
        if not applied.is_cuda:
            self._pending.append((step, applied, None))
            return
        flag, event = torch.empty((), pin_memory=True), torch.cuda.Event()
        flag.copy_(applied, non_blocking=True)
        event.record()
        self._pending.append((step, flag, event))

    def _known(self, step: int) -> Iterator[tuple[int, bool]]:
        """Yield (step, applied) once per step, in order. On CUDA the newest is held back, except before the run ends:
        no further step may run on top of a state that is to be dumped."""
        while self._pending:
            number, flag, event = self._pending[0]
            if event is not None:
                ends = step + 1 == self.num_steps or self._skipped == MAX_SKIPPED_STEPS - 1
                if len(self._pending) == 1 and not ends:
                    return
                event.synchronize()
            self._pending.popleft()
            yield number, bool(flag.numpy())

    def _dump_and_raise(self, step: int) -> NoReturn:
        folder, loader = self.run.folder / "dumps" / f"step_{step:08d}", self.run.loader
        batches = self._held.get(step, [])
        if Checkpoints(folder.parent, keep=2).save(step, self.state, allow_non_finite=True, **self.facts(step)):
            self._complete_dump(folder, step, batches)
        self.run.fail()
        names = [loader.sample_name(sample) for batch in batches for sample in batch.samples.tolist()]
        more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
        raise NonFiniteError(
            f"non-finite gradients in {MAX_SKIPPED_STEPS} consecutive steps, up to step {step + 1}. "
            f"python launch/replay.py {folder} shows in which layer they arise. "
            "Then train with a lower --optim.lr in another --run_dir, or without the sample that causes them. "
            f"Samples of rank {rank()}: {', '.join(names[:MAX_NAMES_SHOWN])}{more}"
        )

    def _complete_dump(self, folder: Path, step: int, batches: list[Batch]) -> None:
        """Add each rank's micro-batches, and the maxima of its layers when the step is repeated, to the dump."""
        eager = torch.compiler.set_stance("force_eager")  # compiled modules run no hooks
        with LayerMaxima(self.optimizable.module) as maxima, eager:
            for micro, batch in enumerate(batches):
                self.optimizable.backward(self.loss(step, micro, batch))
                self.optimizable.step(lr=0.0)
        tensors = {f"{n}/{name}": getattr(batch, name).cpu() for n, batch in enumerate(batches) for name in DUMPED}
        save_file(tensors, folder / f"batch_{rank():05d}.safetensors")
        samples = [self.run.loader.sample_name(sample) for batch in batches for sample in batch.samples.tolist()]
        noted = {"samples": samples, "layers": maxima.by_layer()}
        (folder / f"layers_{rank():05d}.json").write_text(json.dumps(noted, indent=1) + "\n")
        if is_main():
            self.run.config.write(folder / "config.json")
        barrier()


class LayerMaxima(AbstractContextManager):
    """Within the context: records the largest absolute output, and gradient of it, of every module with own weights.

    NaN and Inf are kept.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self._maxima: dict[tuple[str, str], Tensor] = {}
        self._hooks: list = []

    def __enter__(self) -> "LayerMaxima":
        self._direct = [module for module in self.module.modules() if getattr(module, "direct_calls", False)]
        for module in self._direct:
            module.direct_calls = False  # type: ignore[assignment]  # so that the hooks of their submodules run
        for path, module in self.module.named_modules():
            name = path or type(module).__name__
            lists = [child for child in module.children() if isinstance(child, nn.ParameterList)]
            if any(next(each.parameters(recurse=False), None) is not None for each in (module, *lists)):
                hook = module.register_forward_hook(lambda _, __, out, name=name: self._record_output(name, out))
                self._hooks.append(hook)
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for module in self._direct:
            module.direct_calls = True  # type: ignore[assignment]

    def by_layer(self) -> dict[str, dict[str, float]]:
        """Return {"encoder.blocks.0": {"output": 3.1, "gradient": 0.2}}, in the order in which the layers ran."""
        layers: dict[str, dict[str, float]] = {}
        for (name, kind), value in self._maxima.items():
            layers.setdefault(name, {})[kind] = float(value)
        return layers

    def _record_output(self, name: str, out: object) -> None:
        for each in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(each, Tensor) and each.is_floating_point():
                self._record(name, "output", each)
                if each.requires_grad:
                    each.register_hook(lambda gradient: self._record(name, "gradient", gradient))

    def _record(self, name: str, kind: str, values: Tensor) -> None:
        value, key = values.detach().abs().amax().float(), (name, kind)
        self._maxima[key] = torch.maximum(self._maxima[key], value) if key in self._maxima else value
