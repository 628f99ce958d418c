"""Whether steps were applied: the device decides it, and the host learns it without making the device wait."""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ddae.config.pretrain import Config
from ddae.data.loader import Batch
from ddae.distributed.comm import barrier, is_main, rank

KEPT = ("images", "seeds", "samples")  # of a Batch: its mask is the seeds'


class Maxima(AbstractContextManager):
    """Within: notes the largest absolute value that every module with weights of its own gives, and of its gradient;
    NaN and inf stay so."""

    def __init__(self, module: nn.Module):
        self.module = module
        self._seen: dict[tuple[str, str], Tensor] = {}
        self._hooks: list = []

    def __enter__(self) -> "Maxima":
        for name, module in self.module.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                self._hooks.append(module.register_forward_hook(lambda _, __, out, name=name: self._note(name, out)))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def by_layer(self) -> dict[str, dict[str, float]]:
        """{"encoder.blocks.0": {"output": 3.1, "gradient": 0.2}}, in the order in which the layers ran."""
        layers: dict[str, dict[str, float]] = {}
        for (name, of), value in self._seen.items():
            layers.setdefault(name, {})[of] = float(value)
        return layers

    def _note(self, name: str, out: object) -> None:
        for each in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(each, Tensor) and each.is_floating_point():
                self._add(name, "output", each)
                if each.requires_grad:
                    each.register_hook(lambda gradient: self._add(name, "gradient", gradient))

    def _add(self, name: str, of: str, values: Tensor) -> None:
        value, key = values.detach().abs().amax().float(), (name, of)
        self._seen[key] = torch.maximum(self._seen[key], value) if key in self._seen else value


def add_batches(
    folder: Path,
    config: Config,
    method: nn.Module,
    batches: Sequence[Batch],
    name_of: Callable[[int], str],
    forward: Callable[[Batch], object],
) -> None:
    """Complete a dump, whose state is in `folder` already: all ranks call it, each adds its own micro-batches.

    forward runs one of them; its layers' largest values are noted.
    """
    with Maxima(method) as maxima, torch.compiler.set_stance("force_eager"):  # compiled layers call no hooks
        for batch in batches:
            forward(batch)
    tensors = {f"{number}/{name}": getattr(batch, name).cpu() for number, batch in enumerate(batches) for name in KEPT}
    save_file(tensors, folder / f"batch_{rank():05d}.safetensors")
    samples = [name_of(sample) for batch in batches for sample in batch.samples.tolist()]
    noted = {"samples": samples, "layers": maxima.by_layer()}
    (folder / f"layers_{rank():05d}.json").write_text(json.dumps(noted, indent=1) + "\n")
    if is_main():
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    barrier()


class Outcomes:
    """Flags on their way from the device. On a GPU that of a step is read after the next one's work is in the queue,
    which is the same moment on all ranks: what they do about it, they do together."""

    def __init__(self) -> None:
        self._coming: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, applied: Tensor) -> None:
        """applied: float32 [], 1 where the step's update was made, else 0."""
        if not applied.is_cuda:
            self._coming.append((step, applied, None))
            return
        there, event = torch.empty((), pin_memory=True), torch.cuda.Event()
        there.copy_(applied, non_blocking=True)
        event.record()
        self._coming.append((step, there, event))

    def known(self, wait: Callable[[], bool] = lambda: False) -> Iterator[tuple[int, bool]]:
        """Steps and whether they were applied, each once, in order; a GPU's last step, too, where wait() says so after
        those before it."""
        while self._coming:
            step, flag, event = self._coming[0]
            if event is not None:
                if len(self._coming) == 1 and not wait():
                    return
                if not event.query():  # the device is a whole step behind: it has enough to do meanwhile
                    event.synchronize()
            self._coming.popleft()
            yield step, bool(flag.numpy())
