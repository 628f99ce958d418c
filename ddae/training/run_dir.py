"""A run directory: its lock, the settings it was started with, and whether it may be resumed with others."""

import errno
import fcntl
import json
import logging
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ddae import atomic
from ddae.config.base import Experiment, flatten, read_run_file, read_settings
from ddae.data.backend import Decoding
from ddae.distributed.comm import broadcast_from_main, world_size
from ddae.errors import UserError

LENGTH = {"train.steps", "train.epochs"}
FINISHED, STOPPED, LOCK = "finished.json", "stopped.json", ".lock"
PACKAGES = ("torch", "deepspeed", "timm", "webdataset", "mlflow", "triton", "numpy", "pillow")
PACKAGES += ("nvidia-dali-cuda120", "nvidia-dali-cuda130")  # one of them
logger = logging.getLogger(__name__)


def check(config: Experiment) -> None:
    """Raise UserError if the directory is not writable, or was started with other settings that change the curve."""
    folder = Path(config.folder)
    try:
        if folder.is_symlink() and not folder.exists():
            target = os.readlink(folder)
            raise UserError(f"run_dir {folder} is a link to {target}, which does not exist. Mount or create it.")
        existing = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
        if existing.is_symlink() and not existing.exists():
            target = os.readlink(existing)
            raise UserError(f"{existing}, above run_dir, is a link to {target}, which does not exist. Create it.")
        usable = existing.is_dir() and os.access(existing, os.W_OK)
    except OSError as error:  # such as a name that is too long
        raise UserError(
            f"run_dir {str(folder)[:80]} is unusable ({error.strerror}). Choose another --run_dir."
        ) from None
    if not usable:
        raise UserError(f"run_dir {folder} cannot be created or written. Choose another --run_dir.")
    path = folder / "config.json"
    if not path.exists():
        return
    before, now = flatten(_read_settings(config, path)), flatten(config.to_dict())
    for key in sorted(before.keys() | now.keys()):
        if key in config.FREE_ON_RESUME or before.get(key) == now.get(key):
            continue
        if key in LENGTH and config.train.allow_longer and (now[key] or 0) >= (before[key] or 0):
            continue
        fix = f"Choose another --run_dir, or --{key} as before."
        if key in LENGTH:
            fix = "Pass --train.allow_longer for a longer run; choose another --run_dir for a shorter one."
        raise UserError(f"{config.folder} was started with {key} = {before.get(key)}, not {now.get(key)}. {fix}")


def _read_settings(config: Experiment, path: Path) -> dict[str, Any]:
    """Return the settings that the run was started with, which may be of another kind of experiment."""
    settings = read_settings(path)
    try:
        return type(config).from_dict(settings).to_dict()
    except (KeyError, TypeError, AttributeError):
        return settings


def lock(config: Experiment) -> None:
    """Lock the directory against other runs for as long as this process lives. All ranks call it."""
    folder = Path(config.folder)

    def acquire() -> None:
        if folder.absolute() in _locks:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:  # such as the lock of another user, or a name that is too long
            fix = "Choose another --run_dir, or ask for permission."
            raise UserError(f"{folder / LOCK} cannot be opened ({error.strerror}). {fix}") from None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock not inherited by data workers
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                owner = os.read(file, 200).decode(errors="replace").strip() or "another process"
                os.close(file)
                raise UserError(
                    f"run_dir {folder} is in use: {owner} trains there. Wait for it, or choose another --run_dir."
                ) from None
            logger.warning("%s cannot be locked (%s). Make sure that no other run uses it.", folder, error.strerror)
        else:
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {platform.node()}\n".encode())
        _locks[folder.absolute()] = file
        atomic.remove_stale_partial_files(folder, folder / "heartbeats")

    broadcast_from_main(acquire)


_locks: dict[Path, int] = {}  # file descriptors of the locks that this process holds


def check_history(config: Experiment) -> None:
    """Raise UserError if a run without a checkpoint must have had one: it was moved, or its disk is not mounted."""
    folder = Path(config.folder)
    try:
        train = json.loads((folder / "config.json").read_text())["train"]
        # the first checkpoint is complete before the next step, or in the background before the second save begins
        due = train["save_every"] * (2 if train.get("async_save") else 1)
        last = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()[-2:-1]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return
    stopped = any((folder / name).exists() for name in (FINISHED, STOPPED))
    if not config.allow_restart and (stopped or max(last, default=0) > due):
        raise UserError(
            f"{folder} was trained for at least {max(last, default=0)} steps but holds no checkpoint. "
            "Restore its checkpoints/, choose another --run_dir, or train from the start with --allow_restart."
        )


def write(config: Experiment, ds_json: dict[str, Any], decoding: Decoding) -> None:
    """Write config.json, ds_config.json and environment.json. decoding: of images, which a resumed run keeps."""
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STOPPED).unlink(missing_ok=True)
    config.write(folder / "config.json")
    atomic.write_json(folder / "ds_config.json", ds_json)
    decoded = {"backend": decoding.backend, "decode_regions": decoding.regions}
    atomic.write_json(folder / "environment.json", environment() | decoded)


def previous_decoding(config: Experiment) -> Decoding | None:
    """Return how an earlier start of the run decoded images; another way would give other pixels."""
    path = Path(config.folder) / "environment.json"
    facts = read_run_file(path) if path.exists() else {}
    return Decoding(facts["backend"], facts.get("decode_regions", True)) if "backend" in facts else None


def finished(config: Experiment) -> dict[str, Any]:
    """Return how the run was last completed and exported: "steps" and "encoder" of set_finished(); 0 steps if never."""
    path = Path(config.folder) / FINISHED
    facts = read_run_file(path) if path.exists() else {"steps": 0}
    if not isinstance(facts.get("steps"), int):
        reason = "steps is missing or not an integer"
        raise UserError(f"{path} cannot be read ({reason}). Restore it, or choose another --run_dir.")
    return facts


def set_finished(config: Experiment, steps: int, encoder: str) -> None:
    """Record that the run is complete after this many steps. encoder: hash of the one that was evaluated, if any."""
    atomic.write_json(Path(config.folder) / FINISHED, {"steps": steps, **({"encoder": encoder} if encoder else {})})


def set_stopped(config: Experiment, reason: str, step: int) -> None:
    """Record that a signal stopped the run after this many steps."""
    atomic.write_json(Path(config.folder) / STOPPED, {"reason": reason, "step": step})


def environment() -> dict[str, Any]:
    """Return commit, package versions and hardware, as far as they are known."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if git("rev-parse") is None else git("status", "--porcelain") != "",
        "python": platform.python_version(),
        "versions": versions,
        "hardware": {"cpus": os.cpu_count(), "gpus": gpus, "ranks": world_size(), "system": platform.platform()},
    }


def git(*args: str) -> str | None:
    """Return the output of git in this package's checkout; None if it is not one."""
    here = Path(__file__).parent
    try:
        answer = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
