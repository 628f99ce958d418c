"""A run's folder: what it was started with, and whether it may be gone on with."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ddae.config.base import Experiment, flatten
from ddae.distributed.comm import from_main, world_size
from ddae.errors import UserError

LENGTH = {"train.steps", "train.epochs"}
FINISHED, STOPPED, LOCK = "finished.json", "stopped.json", ".lock"
PACKAGES = ("torch", "deepspeed", "timm", "webdataset", "mlflow", "triton", "numpy", "pillow", "nvidia-dali-cuda130")


def check(config: Experiment) -> None:
    """UserError where the folder cannot be written, or was started with another value of a field that changes the
    curve."""
    folder = Path(config.folder)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"run_dir {folder} cannot be made or written: choose another --run_dir")
    path = folder / "config.json"
    if not path.exists():
        return
    before, now = json.loads(path.read_text()), flatten(config.to_dict())
    with contextlib.suppress(KeyError, TypeError):  # of another kind of experiment
        before = type(config).from_dict(before).to_dict()  # what an earlier version did not know has its default
    before = flatten(before)
    for key in sorted(before.keys() | now.keys()):
        if key in config.FREE_ON_RESUME or before.get(key) == now.get(key):
            continue
        if key in LENGTH and config.train.extend and (now[key] or 0) >= (before[key] or 0):
            continue
        mend = (
            "a longer run wants --train.extend, a shorter one another --run_dir"
            if key in LENGTH
            else f"choose another --run_dir, or --{key} as before"
        )
        raise UserError(f"{config.folder} was started with {key} = {before.get(key)}, not {now.get(key)}: {mend}")


def lock(config: Experiment) -> None:
    """Hold the folder against other runs for as long as this process lives; all ranks call it."""
    folder = Path(config.folder)

    def attempt() -> None:
        if folder.absolute() in _held:
            return
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which, unlike flock, no data worker inherits
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                who = os.read(file, 200).decode(errors="replace").strip() or "another process"
                os.close(file)
                raise UserError(f"{who} trains in {folder}: wait for it, or choose another --run_dir") from None
            print(f"{folder} cannot be locked ({error.strerror}): see to it that nobody else trains there", flush=True)
        else:
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {platform.node()}\n".encode())
        _held[folder.absolute()] = file

    from_main(attempt)


_held: dict[Path, int] = {}  # descriptors of the locks of this process


def check_history(config: Experiment) -> None:
    """UserError where a run that has no checkpoint must have had one: its folder was moved, or is not mounted."""
    folder = Path(config.folder)
    try:
        before = json.loads((folder / "config.json").read_text())["train"]["save_every"]
        last = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()[-2:-1]]
    except (OSError, ValueError, KeyError):
        return
    stopped = any((folder / name).exists() for name in (FINISHED, STOPPED))
    if not config.allow_scratch and (stopped or max(last, default=0) > before):
        raise UserError(
            f"{folder} has been trained for {max(last, default=0)} steps and more, but holds no checkpoint: bring back "
            "its checkpoints/, choose another --run_dir, or start anew with --allow_scratch"
        )


def write(config: Experiment, ds_json: dict[str, Any], backend: str) -> None:
    """Write config.json, ds_config.json and environment.json; backend: the one that decodes, which "auto" may have
    chosen."""
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STOPPED).unlink(missing_ok=True)
    documents = {"config": config.to_dict(), "ds_config": ds_json, "environment": environment() | {"backend": backend}}
    for name, content in documents.items():
        _replace(folder / f"{name}.json", content)


def backend_before(config: Experiment) -> str | None:
    """The back end that an earlier start of the run decoded with: another would give other pixels."""
    path = Path(config.folder) / "environment.json"
    return json.loads(path.read_text()).get("backend") if path.exists() else None


def finished(config: Experiment) -> int:
    """After how many steps the run was last exported and shown; 0 if never."""
    path = Path(config.folder) / FINISHED
    return json.loads(path.read_text())["steps"] if path.exists() else 0


def set_finished(config: Experiment, steps: int) -> None:
    """Say that nothing is left to do after this many steps."""
    _replace(Path(config.folder) / FINISHED, {"steps": steps})


def set_stopped(config: Experiment, reason: str, step: int) -> None:
    """Say that the run was told to stop after this many steps, and waits to be gone on with."""
    _replace(Path(config.folder) / STOPPED, {"reason": reason, "step": step})


def _replace(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(unfinished, path)


def environment() -> dict[str, Any]:
    """Commit, versions and hardware, as far as they can be known."""
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


def git(*words: str) -> str | None:
    """What git says of the code's own checkout; None where there is none."""
    here = Path(__file__).parent
    try:
        answer = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
