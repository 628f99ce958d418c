"""The sharder's output directory: lock, progress of earlier runs, completeness, disk space.

.progress/plan.json              settings and sources; a run with others is rejected
.progress/train-000000.tar.json  data for manifest and report of that shard, written when the shard is complete
.progress/train-0.source         a compressed source, decompressed
"""

import fcntl
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ddae import atomic
from ddae.data.manifest import MANIFEST
from ddae.errors import UserError

PROGRESS = ".progress"
LOCK_TIMEOUT_S = 3.0  # within which the workers of a killed process end


def is_complete(out: Path, identity: dict[str, Any]) -> bool:
    """Return whether the directory contains all shards of this identity (settings and sources).

    Raise UserError if it contains anything else, or complete shards of which one was lost.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file. Pass a folder.")
    complete, plan = (out / MANIFEST).exists(), out / PROGRESS / "plan.json"
    if not complete and not plan.exists():
        if any(out.glob("*.tar")):
            raise UserError(f"--out {out} contains tars without {MANIFEST}. Pass an empty folder.")
        return False
    previous = _read_json(out / MANIFEST if complete else plan) or {}
    settings = previous.get("settings")
    if not complete and isinstance(settings, dict) and settings.get("on_bad") == "stop":
        settings["on_bad"] = identity["settings"]["on_bad"]  # no shard with a reported image was completed
    for key, value in identity.items():
        if previous.get(key) != value:
            problem = f"--out {out} contains shards {'made' if complete else 'begun'} with another {key}"
            difference = _difference(previous.get(key), value)
            raise UserError(f"{problem} ({difference}). Pass another folder, or delete this one.")
    if complete:
        missing = [name for name, entry in previous["shards"].items() if not _has_shard(out / name, entry)]
        if missing:
            fix = "Delete the folder and run the same command again."
            raise UserError(f"--out {out} lacks {missing[0]} or its index as listed in {MANIFEST}. {fix}")
        clear_progress(out)
    return complete


@contextmanager
def locked(out: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Create and lock the directory while shards are written, and remove partial files at the end.

    After a UserError everything that was created is removed too, unless a shard is complete. Raise UserError if the
    directory is not writable or another process has locked it.
    """
    created = [folder for folder in (out, *out.absolute().parents) if not folder.exists()]
    try:
        (out / PROGRESS).mkdir(parents=True, exist_ok=True)
        lock = open(out / PROGRESS / "lock", "w")  # noqa: SIM115 - closed by the with statement below
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}). Pass another folder.") from None
    with lock:
        if not _lock_within(lock, LOCK_TIMEOUT_S):
            raise UserError(f"--out {out} is in use by another process. Wait until that ends.")
        remove_partial_files(out)
        atomic.write_text_durably(out / PROGRESS / "plan.json", json.dumps(identity))
        try:
            yield
        except UserError:
            if not any(out.glob("*.tar")):
                shutil.rmtree(out if created else out / PROGRESS)
                for folder in created[1:]:
                    folder.rmdir()
            raise
        finally:
            if out.exists():
                remove_partial_files(out)


def _lock_within(file: IO, seconds: float) -> bool:
    """Lock a file, for which the workers of a killed process may need a moment. Return whether that succeeded."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)


def remove_partial_files(out: Path) -> None:
    """Remove files that were incomplete when a process ended."""
    for pattern in ("*.tar.part", "*.idx.part", "report.*.part", f"{MANIFEST}.part", f"{PROGRESS}/*.part"):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)


def save_record(out: Path, name: str, record: dict[str, Any]) -> None:
    """Save the record of a complete shard: its manifest entry and what the report needs."""
    atomic.write_text_durably(out / PROGRESS / f"{name}.json", json.dumps(record))


def has_record(out: Path, name: str) -> bool:
    """Return whether a shard has a record that its files match."""
    record = _read_json(out / PROGRESS / f"{name}.json")
    return record is not None and _has_shard(out / name, record.get("entry"))


def load_record(out: Path, name: str) -> dict[str, Any]:
    """Return the record of a complete shard. Raise UserError if it has been removed."""
    record = _read_json(out / PROGRESS / f"{name}.json")
    if record is None:
        raise UserError(f"{out / PROGRESS}/{name}.json was changed during the run. Run the same command again.")
    return record


class Entries(Mapping[str, dict[str, Any]]):
    """The manifest entries of complete shards, by name, each read from its record when it is used."""

    def __init__(self, out: Path, names: list[str]):
        self.out, self.names = out, names

    def __getitem__(self, name: str) -> dict[str, Any]:
        return load_record(self.out, name)["entry"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def clear_progress(out: Path) -> None:
    """Remove the records, after the manifest was written."""
    shutil.rmtree(out / PROGRESS, ignore_errors=True)


def check_disk_space(out: Path, needed: int) -> None:
    """Raise UserError if less than `needed` bytes are free."""
    free = shutil.disk_usage(out).free
    if needed > free:
        sizes = f"{free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed"
        raise UserError(f"no space left on {out}: {sizes}. Free space there, or pass another --out.")


def _has_shard(shard: Path, entry: Any) -> bool:
    """Return whether a shard has the size of its manifest entry and an index."""
    try:
        return shard.stat().st_size == entry["bytes"] and shard.with_suffix(".idx").exists()
    except (OSError, KeyError, TypeError):
        return False


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON object; None if the file is missing or has another content."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _difference(previous: Any, current: Any, field: str = "") -> str:
    """Return the first field in which two dicts differ, as "max_count 10, not 20"."""
    if isinstance(previous, dict) and isinstance(current, dict):
        for key, value in current.items():
            if previous.get(key) != value:
                return _difference(previous.get(key), value, f"{key} ")
    return f"{field}not recorded" if previous is None else f"{field}{previous}, not {current}"
