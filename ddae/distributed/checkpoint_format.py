"""The slices of parameters that all ranks left in a checkpoint, and whole parameters from them.

rank_00000.safetensors, ...   "weight/NAME", "exp_avg/NAME", "exp_avg_sq/NAME", "teacher/NAME", ...: fp32, flat;
                              where in the parameter each begins is the file's metadata
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ddae.errors import UserError

MANIFEST = "manifest.json"  # of a complete checkpoint


class Fragment(NamedTuple):
    """The slice of one parameter, or of what goes with it, that this rank owns."""

    name: str
    start: int  # within the flattened parameter
    values: Tensor  # float32, flat


class Saved(Protocol):
    """What a run consists of, as a checkpoint sees it."""

    @property
    def sharded(self) -> bool:
        """Whether each rank owns a part of it; otherwise every rank has it all."""
        ...

    def note(self) -> Any:
        """What is saved besides slices: small, of plain types and tensors."""

    def prepare(self, note: Any) -> None:
        """Take what note() gave, and be ready for state() to be filled."""

    def state(self) -> dict[str, list[Fragment]]:
        """This rank's slices, by what they are of: views."""
        ...

    def publish(self) -> None:
        """Work with what the slices were filled with."""


class Unchanged:
    """A module that nothing trains, whose weights must be the same whenever a run goes on."""

    sharded = False

    def __init__(self, what: str, module: nn.Module):
        self.what, self._module, self._hash = what, module, ""

    def note(self) -> str:
        """A hash of all its tensors."""
        if self._hash:
            return self._hash
        seen = hashlib.sha256()
        for name, values in sorted(self._module.state_dict().items()):
            seen.update(name.encode() + values.detach().float().cpu().numpy().tobytes())
        self._hash = seen.hexdigest()
        return self._hash

    def prepare(self, note: str) -> None:
        """UserError where it is not what note() told of."""
        if note != self.note():
            raise UserError(f"the run was started with another {self.what}: name that one, or choose another --run_dir")

    def state(self) -> dict[str, list[Fragment]]:
        return {}

    def publish(self) -> None:
        """Nothing changes."""


class Slices:
    """What all ranks saved of each parameter; opened for as long as `with` lasts."""

    def __init__(self, path: Path):
        self.path = path
        self.files: list[Any] = []
        self.places: dict[str, list[tuple[int, int, Any]]] = {}  # key -> start, end and file of each slice

    def __enter__(self) -> "Slices":
        for each in sorted(self.path.glob("rank_*.safetensors")):
            file = safe_open(each, "pt")
            self.files.append(file.__enter__())
            for key, start in json.loads(file.metadata()["starts"]).items():
                end = start + file.get_slice(key).get_shape()[0]
                self.places.setdefault(key, []).append((start, end, file))
        return self

    def __exit__(self, *error: object) -> None:
        for file in self.files:
            file.__exit__(*error)

    def fill(self, of: str, fragment: Fragment) -> None:
        """Copy into a fragment's values what was saved of them, from whichever ranks had it."""
        key, start, end = f"{of}/{fragment.name}", fragment.start, fragment.start + fragment.values.numel()
        filled = 0
        for first, last, file in self.places.get(key, []):
            low, high = max(start, first), min(end, last)
            if low < high:
                saved = file.get_slice(key)[low - first : high - first]
                fragment.values[low - start : high - start].copy_(saved)
                filled += high - low
        if filled != end - start:
            raise UserError(f"{self.path} holds {filled} of {end - start} numbers of {key}: it is of another model")


def load_weights(path: Path, of: str, module: nn.Module) -> None:
    """Fill a module with what a checkpoint holds of it, whole: "weight" for the method, "teacher" for its encoder.

    UserError where it does not hold all of it.
    """
    with Slices(path) as slices, torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.empty(parameter.numel())
            slices.fill(of, Fragment(name, 0, values))
            parameter.copy_(values.view_as(parameter))
