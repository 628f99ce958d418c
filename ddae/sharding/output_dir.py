"""The folder that shards are made in: whose it is, what in it is done, whether there is room.

.progress/plan.json              settings and sources; a run with others is refused
.progress/train-000000.tar.json  what the manifest and the report will say of that shard, once it is whole
"""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddae.data.shard_writer import replace_text
from ddae.data.shards import MANIFEST
from ddae.errors import UserError

PROGRESS = ".progress"


def is_complete(out: Path, identity: dict[str, Any]) -> bool:
    """Whether the folder holds the very shards that this identity stands for; UserError where it holds others."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    for path, verb in ((out / MANIFEST, "made"), (out / PROGRESS / "plan.json", "begun")):
        if path.exists():
            before = _read(path) or {}
            settings = before.get("settings")
            if isinstance(settings, dict) and settings.get("on_bad") == "stop" and path.name != MANIFEST:
                settings["on_bad"] = identity["settings"]["on_bad"]  # no shard with a bad image was finished
            for key, value in identity.items():
                if before.get(key) != value:
                    raise UserError(
                        f"--out {out} holds shards {verb} with another {key} "
                        f"({_difference(before.get(key), value)}): choose another folder or delete it"
                    )
            if path.name != MANIFEST:
                return False
            lost = next((name for name, entry in before["shards"].items() if not _is_there(out / name, entry)), None)
            if lost is not None:
                raise UserError(
                    f"--out {out} lacks {lost} or its index as its {MANIFEST} lists it: delete the folder to begin anew"
                )
            forget(out)
            return True
    if out.exists() and any(out.glob("*.tar")):
        raise UserError(f"--out {out} holds tars without {MANIFEST}: choose an empty folder")
    return False


@contextmanager
def own(out: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Hold the folder against other processes while shards are made in it; a mistake leaves nothing half-written."""
    made = [folder for folder in (out, *out.absolute().parents) if not folder.exists()]
    try:
        (out / PROGRESS).mkdir(parents=True, exist_ok=True)
        lock = open(out / PROGRESS / "lock", "w")  # noqa: SIM115 - held as long as the work
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}): choose another folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--out {out}: another process makes shards there, wait for it") from None
        sweep(out)
        replace_text(out / PROGRESS / "plan.json", json.dumps(identity))
        try:
            yield
        except UserError:
            if not any(out.glob("*.tar")):
                shutil.rmtree(out if made else out / PROGRESS)
                for folder in made[1:]:
                    folder.rmdir()
            raise
        finally:
            if out.exists():
                sweep(out)


def sweep(out: Path) -> None:
    """Remove what was being written when a process ended."""
    for pattern in ("*.tar.part", "*.idx.part", "report.*.part", f"{MANIFEST}.part", f"{PROGRESS}/*.part"):
        for unfinished in out.glob(pattern):
            unfinished.unlink(missing_ok=True)


def note(out: Path, name: str, record: dict[str, Any]) -> None:
    """A shard is whole: note what is to be said of it."""
    replace_text(out / PROGRESS / f"{name}.json", json.dumps(record))


def noted(out: Path, name: str) -> dict[str, Any] | None:
    """What was noted of a shard; None if nothing was, or the shard is not there as noted."""
    record = _read(out / PROGRESS / f"{name}.json")
    return record if record is not None and _is_there(out / name, record.get("entry")) else None


def forget(out: Path) -> None:
    """All is done: clear the notes away."""
    shutil.rmtree(out / PROGRESS, ignore_errors=True)


def check_room(out: Path, needed: int) -> None:
    """UserError where so many bytes will not fit."""
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"no space left on {out}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} free, make room"
        )


def _is_there(shard: Path, entry: Any) -> bool:
    """Whether a shard is there in its full length, with its index."""
    try:
        return shard.stat().st_size == entry["bytes"] and shard.with_suffix(".idx").exists()
    except (OSError, KeyError, TypeError):
        return False


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _difference(before: Any, now: Any) -> str:
    """The first field that two dicts do not share, as "max_count 10, not 20"."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in now:
            if before.get(key) != now[key]:
                inner = isinstance(now[key], dict) and isinstance(before.get(key), dict)
                return _difference(before[key], now[key]) if inner else f"{key} {before.get(key)}, not {now[key]}"
    return "it names none" if before is None else f"{before}, not {now}"
