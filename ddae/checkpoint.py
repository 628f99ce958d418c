"""Checkpoints: everything a run needs to go on as if it had never stopped, whole or not there at all.

    checkpoints/step_00000100/   DeepSpeed's files, state.pt (step, betas, data set), teacher_rank_00000.pt, ...,
                                 manifest.json (size of every file; written last)
    checkpoints/latest           the newest, by name

A checkpoint is written into a folder of another name, flushed to disk, and renamed when it is complete.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddae.betas import Betas
from ddae.distributed import barrier, is_main, rank, world_size
from ddae.engine import Engine
from ddae.errors import UserError
from ddae.model.teacher import Teacher

MANIFEST = "manifest.json"


class Found(NamedTuple):
    """A complete checkpoint and the number of steps it was saved after."""

    path: Path
    step: int


class Checkpoints:
    """The checkpoints of one run folder; keeps the newest `keep`."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def save(self, step: int, engine: Engine, teacher: Teacher | None, betas: Betas, fingerprint: str) -> None:
        """Save the state after `step` steps; all ranks call it."""
        name, unfinished = f"step_{step:08d}", f".unfinished_{step:08d}"
        path = self.folder / unfinished
        if is_main():
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
        barrier()
        engine.deepspeed.save_checkpoint(str(self.folder), tag=unfinished, save_latest=False)
        if teacher is not None and (engine.sharded or is_main()):
            torch.save(teacher.state_dict(), path / _teacher_file(rank()))
        if is_main():
            state = {"step": step, "ranks": world_size(), "stage": engine.stage, "fingerprint": fingerprint}
            torch.save(state | {"betas": betas.state_dict()}, path / "state.pt")
        _flush([file for file in path.iterdir() if is_main() or file.name == _teacher_file(rank())])
        barrier()
        if is_main():
            sizes = {file.name: file.stat().st_size for file in path.iterdir()}
            (path / MANIFEST).write_text(json.dumps({"step": step, "ranks": world_size(), "files": sizes}, indent=1))
            _flush([path / MANIFEST, path])
            shutil.rmtree(self.folder / name, ignore_errors=True)
            os.rename(path, self.folder / name)
            pointer = self.folder / "latest.part"
            pointer.write_text(name)
            _flush([pointer])
            os.replace(pointer, self.folder / "latest")
            _flush([self.folder])
            for old in self._names()[: -self.keep]:
                shutil.rmtree(self.folder / old)
        barrier()

    def newest(self, allow_scratch: bool) -> Found | None:
        """The newest complete checkpoint, None for a run that has none yet; all ranks see the same.

        UserError where there are checkpoints and none is complete, unless allow_scratch.
        """
        names = self._names()
        for name in reversed(names):
            reason = _damage(self.folder / name)
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

    def load(self, path: Path, engine: Engine, teacher: Teacher | None, betas: Betas, fingerprint: str) -> int:
        """Restore the state; the number of steps done. UserError where it is of other ranks or other data."""
        state: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        if state["ranks"] != world_size() or state["stage"] != engine.stage:
            raise UserError(
                f"{path} was saved by {state['ranks']} ranks at ZeRO stage {state['stage']}, this run has "
                f"{world_size()} at stage {engine.stage}: resume with as many, or choose another --run_dir"
            )
        if state["fingerprint"] != fingerprint:
            raise UserError(f"{path} was trained on other shards than data.train: name the same, or another --run_dir")
        engine.deepspeed.load_checkpoint(str(self.folder), tag=path.name)
        if teacher is not None:
            owner = rank() if engine.sharded else 0
            saved = torch.load(path / _teacher_file(owner), map_location=engine.device, weights_only=True)
            teacher.load_state_dict(saved)
        betas.load_state_dict(state["betas"])
        return state["step"]

    def set_aside_beyond(self, step: int) -> None:
        """Rename what lies beyond the step that a run goes on from, so that it is neither resumed nor counted."""
        for name in self._names():
            if int(name.removeprefix("step_")) > step:
                shutil.rmtree(self.folder / f"broken_{name}", ignore_errors=True)
                os.rename(self.folder / name, self.folder / f"broken_{name}")
        for unfinished in self.folder.glob(".unfinished_*"):
            shutil.rmtree(unfinished)

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("step_*"))


def _teacher_file(of_rank: int) -> str:
    return f"teacher_rank_{of_rank:05d}.pt"


def _damage(path: Path) -> str | None:
    """Why a checkpoint cannot be used; None where all files of its manifest are there, in full length."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest cannot be read ({error})"
    for name, size in files.items():
        if not (path / name).exists():
            return f"{name} is missing"
        if (path / name).stat().st_size != size:
            return f"{name} has {(path / name).stat().st_size} bytes of {size}"
    return None


def _flush(paths: list[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
