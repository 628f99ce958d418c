"""Checkpoints: all that a run needs to resume exactly, written atomically.

    checkpoints/step_00000100/   rank_00000.safetensors, ...: fp32 slices of weights, Adam's averages and the teacher,
                                 by parameter; state.pt: step, small state, data set's fingerprint, MLflow's run;
                                 manifest.json: size and SHA-256 of every file, written last
    checkpoints/latest           name of the newest

A checkpoint is written into a folder of another name, flushed to the disk, and renamed when it is complete. Slices name
their place in their parameter, so that any number of ranks at any ZeRO stage can resume. No random state is saved:
order, crops and masks are functions of seed and step (data/rng.py), and so are all schedules.

An asynchronous save copies the state to host memory, and training continues while a thread writes the files. The
threads of all ranks communicate through a process group of their own. At most one save is in flight.
"""

import io
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from ddae import atomic
from ddae.distributed.checkpoint_format import (
    MANIFEST,
    NOT_PERMITTED,
    STATE,
    Checkpointable,
    Sharded,
    ShardReader,
    Stateful,
    find_damage,
    sha256,
)
from ddae.distributed.comm import broadcast_from_main, gather, is_main, new_cpu_group, rank, world_size
from ddae.errors import UserError, one_line

FORMAT = 2  # of a checkpoint
logger = logging.getLogger(__name__)


class CheckpointInfo(NamedTuple):
    """A complete checkpoint and the number of steps after which it was saved."""

    path: Path
    step: int


class HostShards(NamedTuple):
    """A rank's slices in host memory, by key, and the offset of each within its flattened parameter."""

    tensors: dict[str, Tensor]
    starts: dict[str, int]


class Background:
    """Thread that writes checkpoints, its process group, and the host memory from which it writes."""

    def __init__(self, timeout_s: float):
        """timeout_s: seconds after which a rank that waits for another gives up. All ranks call it."""
        self.group = new_cpu_group(timeout_s)
        self.buffers: dict[str, Tensor] = {}
        self.in_flight: Future[None] | None = None
        self.thread = ThreadPoolExecutor(1, "checkpoint")  # which the interpreter's end waits for


class Checkpoints:
    """The checkpoints of one run directory: the newest `keep`, and those of every `keep_every` steps for ever."""

    def __init__(self, folder: Path, keep: int, keep_every: int = 0, background: Background | None = None):
        """background: where save() leaves the writing; None: save() writes."""
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self.saved_step = -1  # of the newest complete checkpoint; known after wait()
        self._background = background
        self._failed = False  # whether the last save did

    def save(self, step: int, parts: dict[str, Checkpointable], allow_non_finite: bool = False, **facts: Any) -> bool:
        """Save the state after `step` steps, and more facts. Return whether that is done. All ranks call it.

        A failed save is logged and its files are removed; the second in a row raises UserError. So does the first
        with a number that is not finite, unless allow_non_finite. With a background thread it waits for the save
        before, which may raise, copies the state and returns False: wait() raises, and `saved_step` shows success.
        """
        self.wait()
        states = {name: part.state_dict() for name, part in parts.items() if isinstance(part, Stateful)}
        facts |= {"step": step, "states": states}
        if self._background is None:
            self._write(step, _copy_to_host(parts, {}, pin=False), facts, allow_non_finite)
            return not self._failed
        shards = _copy_to_host(parts, self._background.buffers, pin=True)
        self._background.in_flight = self._background.thread.submit(self._write, step, shards, facts, allow_non_finite)
        return False

    def wait(self) -> None:
        """Wait until the save in the background has ended, if there is one, and raise what it raised."""
        if self._background is not None and self._background.in_flight is not None:
            ended, self._background.in_flight = self._background.in_flight, None
            ended.result()

    def raise_if_failed(self) -> None:
        """Raise what the save in the background raised, if it has ended on all ranks. All ranks call it."""
        in_flight = None if self._background is None else self._background.in_flight
        if in_flight is not None and all(gather(in_flight.done())):
            self.wait()

    def _write(self, step: int, shards: HostShards, facts: dict[str, Any], allow_non_finite: bool) -> None:
        """Write a checkpoint as save() describes. All ranks call it, in the background on its thread."""
        group = None if self._background is None else self._background.group
        path = self.folder / f".unfinished_{step:08d}"
        problem = broadcast_from_main(lambda: _attempt(lambda: _make_empty(path)), group)
        if problem is None:
            entries: dict[str, dict[str, Any]] = {}

            def write() -> None:
                entries.update(_write_shards(path / f"rank_{rank():05d}.safetensors", shards))
                if is_main():
                    content = io.BytesIO()  # torch.save to a file would hide the disk's error
                    torch.save(facts, content)
                    (path / STATE).write_bytes(content.getvalue())
                    entries.update(_manifest_entry(path / STATE))

            non_finite = [] if allow_non_finite else _non_finite(shards.tensors)
            of_ranks = gather((None if non_finite else _attempt(write), entries, non_finite), group)
            problem = next((each for each, *_ in of_ranks if each is not None), None)
            if names := [name for *_, of_rank in of_ranks for name in of_rank]:
                if is_main():
                    shutil.rmtree(path, ignore_errors=True)
                raise UserError(
                    f"{names[0]} is not finite after step {step}, so that no checkpoint was written. "
                    "Train with a lower --optim.lr in another --run_dir."
                )
            if problem is None:
                files = {name: entry for _, of_rank, _ in of_ranks for name, entry in of_rank.items()}
                problem = broadcast_from_main(lambda: _attempt(lambda: self._complete(path, step, files)), group)
        if problem is not None:
            if is_main():
                shutil.rmtree(path, ignore_errors=True)
            if self._failed:
                raise UserError(
                    f"two checkpoints in a row could not be written to {self.folder} ({problem}). "
                    "Free space there and run the same command again."
                )
            if is_main():
                reason = "checkpoint of step %d failed: %s. The next save retries."
                logger.warning(reason, step, problem)
        else:
            self.saved_step = step
        self._failed = problem is not None

    def newest(self, allow_restart: bool) -> CheckpointInfo | None:
        """Return the newest complete checkpoint, None for a run that has none yet. All ranks call it.

        Raise UserError if there are checkpoints and none is complete, unless allow_restart.
        """
        names = broadcast_from_main(self._names)
        for name in reversed(names):
            broadcast_from_main(lambda path=self.folder / name: _check_format(path))
            of_ranks = gather(find_damage(self.folder / name, rank(), world_size()))
            damage = next((each for each in of_ranks if each is not None), None)
            if damage is None:
                self.saved_step = int(name.removeprefix("step_"))
                return CheckpointInfo(self.folder / name, self.saved_step)
            if damage.startswith(NOT_PERMITTED):
                raise UserError(f"{self.folder / name}: {damage}. Give this user permission to read it.")
            if is_main():
                logger.warning("skipping checkpoint %s: %s", self.folder / name, damage)
        if names and not allow_restart:
            raise UserError(
                f"{self.folder} holds only damaged checkpoints. Restore one, choose another --run_dir, "
                "or train from the start with --allow_restart."
            )
        return None

    def load(self, path: Path, parts: dict[str, Checkpointable], fingerprint: str) -> dict[str, Any]:
        """Restore all parts, whatever ranks and ZeRO stage saved them. Return the facts saved with them.

        Raise UserError if the checkpoint belongs to another data set or another model.
        """
        facts: dict[str, Any] = torch.load(path / STATE, map_location="cpu", weights_only=True)
        if facts["fingerprint"] != fingerprint:
            raise UserError(f"{path} was trained on other shards than data.train. Name those, or another --run_dir.")
        with ShardReader(path) as reader:
            for name, part in parts.items():
                if isinstance(part, Stateful):
                    part.load_state_dict(facts["states"][name])
                if isinstance(part, Sharded):
                    for kind, shards in part.local_shards().items():
                        for shard in shards:
                            reader.fill(kind, shard)
                    part.sync_model_weights()
        return facts

    def quarantine_after(self, step: int) -> None:
        """Rename checkpoints of later steps, so that they are neither resumed nor counted; remove unfinished ones.

        Those that an earlier call has renamed are removed, as they would fill the disk.
        """
        later = [name for name in self._names() if int(name.removeprefix("step_")) > step]
        for broken in self.folder.glob("broken_*") if later else ():
            shutil.rmtree(broken, ignore_errors=True)
        for name in later:
            os.rename(self.folder / name, self.folder / f"broken_{name}")
        for unfinished in self.folder.glob(".unfinished_*"):
            shutil.rmtree(unfinished)

    def _complete(self, path: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
        """Write the manifest, rename the folder, point `latest` at it, and remove old checkpoints."""
        manifest = {"format": FORMAT, "step": step, "ranks": world_size(), "files": files}
        (path / MANIFEST).write_text(json.dumps(manifest, indent=1))
        atomic.fsync(path / MANIFEST)
        name = f"step_{step:08d}"
        atomic.rename_folder(path, self.folder / name)
        atomic.write_text_durably(self.folder / "latest", name)
        atomic.fsync(self.folder)
        for old in self._names()[: -self.keep]:
            if not self.keep_every or int(old.removeprefix("step_")) % self.keep_every:
                shutil.rmtree(self.folder / old, ignore_errors=True)  # files that are still open: at the next save

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name))


def _copy_to_host(parts: dict[str, Checkpointable], buffers: dict[str, Tensor], pin: bool) -> HostShards:
    """Copy this rank's slices into `buffers`, which are allocated by the first copy; what every rank has whole is
    divided among the ranks. pin: allocate pinned memory for slices on a GPU, which pays if buffers are reused.
    """
    starts: dict[str, int] = {}
    for part in parts.values():
        for kind, shards in part.local_shards().items() if isinstance(part, Sharded) else ():
            for shard in shards if part.sharded else shards[rank() :: world_size()]:  # type: ignore[union-attr]
                key, values = f"{kind}/{shard.name}", shard.values.detach()
                if key not in buffers:
                    buffers[key] = torch.empty(values.shape, dtype=values.dtype, pin_memory=pin and values.is_cuda)
                buffers[key].copy_(values, non_blocking=pin)
                starts[key] = shard.start
    if pin and torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return HostShards({key: buffers[key] for key in starts}, starts)


def _write_shards(file: Path, shards: HostShards) -> dict[str, dict[str, Any]]:
    """Write this rank's slices. Return the manifest's entry."""
    save_file(shards.tensors, file, {"starts": json.dumps(shards.starts)})
    atomic.share(file)
    return _manifest_entry(file)


def _non_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors that contain NaN or Inf, in one pass over each without temporary tensors."""
    return [name for name, values in tensors.items() if not bool(torch.stack(values.aminmax()).isfinite().all())]


def _manifest_entry(file: Path) -> dict[str, dict[str, Any]]:
    """Flush a file to the disk and return its entry in the manifest."""
    atomic.fsync(file)
    return {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}}


def _make_empty(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _attempt(write: Callable[[], object]) -> str | None:
    """Call it. Return the reason if the disk made it fail."""
    try:
        write()
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # safetensors and torch wrap the disk's errors in their own
        if "(os error " in str(error) or "failed writing" in str(error):
            return one_line(error)
        raise
    return None


def _check_format(path: Path) -> None:
    """Raise UserError for a checkpoint of another version. A damaged manifest is left to find_damage()."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        is_other = "files" in manifest and manifest.get("format") != FORMAT
    except (OSError, ValueError, TypeError, AttributeError):
        return
    if is_other:
        raise UserError(
            f"{path} was written by another version of ddae; this one reads format {FORMAT}. "
            "Resume with that version, or choose another --run_dir."
        )
