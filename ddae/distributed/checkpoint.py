"""Checkpoints: everything a run needs to go on as if it had never stopped, whole or not there at all.

    checkpoints/step_00000100/   rank_00000.safetensors, ...: fp32 slices of weights, Adam's averages and the teacher,
                                 by parameter; state.pt: step, the parts' notes, data set, MLflow's
                                 run;
                                 manifest.json: size and sha256 of every file, written last
    checkpoints/latest           the newest, by name

A checkpoint is written into a folder of another name, flushed to disk, and renamed when it is complete. Slices say
which part of which parameter they are, so that any number of ranks at any ZeRO stage goes on from them. Nothing random
is saved: order, crops and masks are functions of the seed and the step (counter.py), and so are all schedules.
"""

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from ddae.distributed.checkpoint_format import MANIFEST, Saved, Slices
from ddae.distributed.comm import from_main, gather, is_main, rank, world_size
from ddae.errors import UserError

STATE = "state.pt"


class Found(NamedTuple):
    """A complete checkpoint and the number of steps it was saved after."""

    path: Path
    step: int


class Checkpoints:
    """The checkpoints of one run folder; keeps the newest `keep`, and those of every `keep_every` steps for ever."""

    def __init__(self, folder: Path, keep: int, keep_every: int = 0):
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self._failed = False  # whether the last save did

    def save(self, step: int, parts: dict[str, Saved], **facts: Any) -> bool:
        """Save the state after `step` steps, and more facts; whether that worked. All ranks call it.

        A save that fails is told and its remains removed; UserError for the second in a row.
        """
        path = self.folder / f".unfinished_{step:08d}"
        facts |= {"step": step, "notes": {name: part.note() for name, part in parts.items()}}
        problem = from_main(lambda: _attempt(lambda: _make_empty(path)))
        if problem is None:
            written: dict[str, dict[str, Any]] = {}

            def write() -> None:
                written.update(_write_slices(path / _slices_file(rank()), parts))
                if is_main():
                    content = io.BytesIO()  # torch.save itself says a full disk in words of its own
                    torch.save(facts, content)
                    (path / STATE).write_bytes(content.getvalue())
                    written.update(_seal(path / STATE))

            told = gather((_attempt(write), written))
            problem = next((each for each, _ in told if each is not None), None)
            if problem is None:
                files = {name: entry for _, of_rank in told for name, entry in of_rank.items()}
                problem = from_main(lambda: _attempt(lambda: self._complete(path, step, files)))
        if problem is not None:
            if is_main():
                shutil.rmtree(path, ignore_errors=True)
            if self._failed:
                raise UserError(f"{self.folder} cannot be written ({problem}), twice in a row: make room and run again")
            if is_main():
                print(f"no checkpoint of step {step}: {problem}; the run goes on and tries again", flush=True)
        self._failed = problem is not None
        return not self._failed

    def newest(self, allow_scratch: bool) -> Found | None:
        """The newest complete checkpoint, None for a run that has none yet; all ranks call it and see the same.

        UserError where there are checkpoints and none is complete, unless allow_scratch.
        """
        names = from_main(self._names)
        for name in reversed(names):
            reason = next((each for each in gather(_damage(self.folder / name)) if each is not None), None)
            if reason is None:
                return Found(self.folder / name, int(name.removeprefix("step_")))
            if is_main():
                print(f"passing over {self.folder / name}: {reason}", flush=True)
        if names and not allow_scratch:
            raise UserError(
                f"{self.folder} holds only broken checkpoints: restore one, "
                "choose another --run_dir, or start anew with --allow_scratch"
            )
        return None

    def load(self, path: Path, parts: dict[str, Saved], fingerprint: str) -> dict[str, Any]:
        """Restore the state, whatever ranks and ZeRO stage it was saved by; the facts saved with it, "step" among them.

        UserError where it is of other data or another model.
        """
        state: dict[str, Any] = torch.load(path / STATE, map_location="cpu", weights_only=True)
        if state["fingerprint"] != fingerprint:
            raise UserError(f"{path} was trained on other shards than data.train: name the same, or another --run_dir")
        with Slices(path) as slices:
            for name, part in parts.items():
                part.prepare(state["notes"][name])
                for of, fragments in part.state().items():
                    for fragment in fragments:
                        slices.fill(of, fragment)
                part.publish()
        return state

    def set_aside_beyond(self, step: int) -> None:
        """Rename what lies beyond the step that a run goes on from, so that it is neither resumed nor counted."""
        for name in self._names():
            if int(name.removeprefix("step_")) > step:
                shutil.rmtree(self.folder / f"broken_{name}", ignore_errors=True)
                os.rename(self.folder / name, self.folder / f"broken_{name}")
        for unfinished in self.folder.glob(".unfinished_*"):
            shutil.rmtree(unfinished)

    def _complete(self, path: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
        """Write the manifest, give the folder its name, point `latest` at it, and remove what is not kept."""
        manifest = {"step": step, "ranks": world_size(), "files": files}
        (path / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _flush(path / MANIFEST, path)
        name = f"step_{step:08d}"
        shutil.rmtree(self.folder / name, ignore_errors=True)
        os.rename(path, self.folder / name)
        pointer = self.folder / "latest.part"
        pointer.write_text(name)
        _flush(pointer)
        os.replace(pointer, self.folder / "latest")
        _flush(self.folder)
        for old in self._names()[: -self.keep]:
            if not self.keep_every or int(old.removeprefix("step_")) % self.keep_every:
                shutil.rmtree(self.folder / old, ignore_errors=True)  # what somebody still reads goes next time

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name))


def _write_slices(file: Path, parts: dict[str, Saved]) -> dict[str, dict[str, Any]]:
    """Write this rank's slices; the file's entry in the manifest. What every rank has whole they share out."""
    tensors, starts = {}, {}
    for part in parts.values():
        for of, fragments in part.state().items():
            for fragment in fragments if part.sharded else fragments[rank() :: world_size()]:
                tensors[f"{of}/{fragment.name}"] = fragment.values.detach().to("cpu", copy=True)
                starts[f"{of}/{fragment.name}"] = fragment.start
    save_file(tensors, file, {"starts": json.dumps(starts)})
    return _seal(file)


def _seal(file: Path) -> dict[str, dict[str, Any]]:
    """Bring a file to the disk; its entry in the manifest."""
    _flush(file)
    return {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}}


def _slices_file(of_rank: int) -> str:
    return f"rank_{of_rank:05d}.safetensors"


def _make_empty(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _attempt(work: Callable[[], object]) -> str | None:
    """Do it; why that failed, where the disk is to blame."""
    try:
        work()
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # safetensors and torch wrap the disk's errors in their own
        if "(os error " in str(error) or "failed writing" in str(error):
            return " ".join(str(error).split())[:200]
        raise
    return None


def _damage(path: Path) -> str | None:
    """Why a checkpoint cannot be used, as far as this rank looks: all sizes, and the hashes of its share of files."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        for number, (name, entry) in enumerate(files.items()):
            if not (path / name).exists():
                return f"{name} is missing"
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes of {entry['bytes']}"
            if number % world_size() == rank() and _sha256(path / name) != entry["sha256"]:
                return f"{name} has changed since it was written (sha256)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error})"
    return None


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _flush(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
