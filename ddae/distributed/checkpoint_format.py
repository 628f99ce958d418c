"""The files of a checkpoint: tensors as flat slices of parameters, written by all ranks, read by any number of ranks.

rank_00000.safetensors, ...   "weight/NAME", "exp_avg/NAME", "exp_avg_sq/NAME", "teacher/NAME", ...: fp32, flat;
                              the metadata holds each slice's offset within its flattened parameter
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ddae.errors import UserError

MANIFEST = "manifest.json"  # of a complete checkpoint
STATE = "state.pt"
NOT_PERMITTED = "no permission to read"  # how a problem of find_damage() begins that is no damage


class TensorShard(NamedTuple):
    """A slice of one flattened parameter, or of a tensor of the same shape that belongs to it."""

    name: str
    start: int  # offset within the flattened parameter
    values: Tensor  # float32, flat


@runtime_checkable
class Stateful(Protocol):
    """An object with small state: plain types and tensors that every rank has."""

    def state_dict(self) -> Any:
        """Return a copy of the state."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Restore what state_dict() returned."""
        ...


@runtime_checkable
class Sharded(Protocol):
    """An object with large state, saved as slices. If it is Stateful, too, load_state_dict() comes first."""

    @property
    def sharded(self) -> bool:
        """Whether each rank owns a part of the state; otherwise every rank has all of it."""
        ...

    def local_shards(self) -> dict[str, list[TensorShard]]:
        """Return this rank's slices by kind ("weight", "exp_avg", ...), as views that can be read and filled."""
        ...

    def sync_model_weights(self) -> None:
        """Copy the filled slices into the weights that run forward. All ranks call it."""
        ...


Checkpointable = Stateful | Sharded


class FrozenModule:
    """A module that is not trained; a resumed run must use one with the same weights."""

    def __init__(self, what: str, module: nn.Module):
        self.what, self._module, self._hash = what, module, ""

    def state_dict(self) -> str:
        """Return a SHA-256 hash of all tensors."""
        self._hash = self._hash or weights_hash(self._module)
        return self._hash

    def load_state_dict(self, state: str) -> None:
        """Raise UserError if the weights differ from those of the saved run."""
        if state != self.state_dict():
            raise UserError(
                f"the run was started with another {self.what}. Name the same {self.what}, or choose another --run_dir."
            )


def weights_hash(module: nn.Module, facts: str = "") -> str:
    """Return a SHA-256 hash of a module's parameters and buffers, by name, in fp32, and of further facts."""
    digest = hashlib.sha256(facts.encode())
    for name, values in sorted(module.state_dict().items()):
        digest.update(name.encode() + values.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


class ShardReader:
    """Context manager that reads parameters from the slices of all ranks."""

    def __init__(self, path: Path):
        self.path = path
        self.files: list[Any] = []
        self.slices: dict[str, list[tuple[int, int, Any]]] = {}  # key -> start, end and file of each slice

    def __enter__(self) -> "ShardReader":
        for each in sorted(self.path.glob("rank_*.safetensors")):
            file = safe_open(each, "pt")
            self.files.append(file.__enter__())
            for key, start in json.loads(file.metadata()["starts"]).items():
                end = start + file.get_slice(key).get_shape()[0]
                self.slices.setdefault(key, []).append((start, end, file))
        return self

    def __exit__(self, *error: object) -> None:
        for file in self.files:
            file.__exit__(*error)

    def fill(self, kind: str, shard: TensorShard) -> None:
        """Copy the saved numbers into `shard.values`. Raise UserError if some of them are missing."""
        key, start, end = f"{kind}/{shard.name}", shard.start, shard.start + shard.values.numel()
        filled = 0
        for first, last, file in self.slices.get(key, []):
            low, high = max(start, first), min(end, last)
            if low < high:
                saved = file.get_slice(key)[low - first : high - first]
                shard.values[low - start : high - start].copy_(saved)
                filled += high - low
        if filled != end - start:
            raise UserError(
                f"{self.path} holds {filled} of {end - start} values of {key}. "
                "It belongs to another model: resume with the model settings it was trained with."
            )


def load_weights(path: Path, kind: str, module: nn.Module) -> None:
    """Fill a module from a checkpoint: kind "weight" for the pretraining model, "teacher" for the teacher's encoder.

    Raise UserError if the checkpoint lacks some of its parameters.
    """
    with ShardReader(path) as reader, torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.empty(parameter.numel())
            reader.fill(kind, TensorShard(name, 0, values))
            parameter.copy_(values.view_as(parameter))


def find_damage(path: Path, first: int = 0, step: int = 1) -> str | None:
    """Return why a checkpoint is unusable: a file that is missing, or has another size or hash than in its manifest.

    first, step: check the hashes of every step-th file only, as ranks do that share the work.
    """
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        for number, (name, entry) in enumerate(files.items()):
            if not (path / name).exists():
                return f"{name} is missing"
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} of {entry['bytes']} bytes"
            if number % step == first and sha256(path / name) != entry["sha256"]:
                return f"{name} has changed since it was written (SHA-256)"
    except PermissionError as error:
        return f"{NOT_PERMITTED} {Path(error.filename).name}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error})"
    return None


def sha256(file: Path) -> str:
    """Return the SHA-256 hash of a file."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
