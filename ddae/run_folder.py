"""A run's folder: what it was started with, and whether it may be gone on with."""

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ddae.config import FREE_ON_RESUME, Config, flatten
from ddae.distributed import world_size
from ddae.errors import UserError

LENGTH = {"train.steps", "train.epochs"}
PACKAGES = ("torch", "deepspeed", "timm", "webdataset", "mlflow", "triton", "numpy", "pillow", "nvidia-dali-cuda130")


def check_same(config: Config) -> None:
    """UserError where the run folder was started with another value of a field that changes the curve."""
    path = Path(config.folder) / "config.json"
    if not path.exists():
        return
    before, now = flatten(json.loads(path.read_text())), flatten(config.to_dict())
    for key in sorted(before.keys() | now.keys()):
        if key in FREE_ON_RESUME or before.get(key) == now.get(key):
            continue
        if key in LENGTH and config.train.extend:
            continue
        mend = "add --train.extend to train on" if key in LENGTH else f"choose another --run_dir, or --{key} as before"
        raise UserError(f"{config.folder} was started with {key} = {before.get(key)}, not {now.get(key)}: {mend}")


def write(config: Config, ds_json: dict[str, Any]) -> None:
    """Write config.json, ds_config.json and environment.json."""
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    documents = {"config": config.to_dict(), "ds_config": ds_json, "environment": environment()}
    for name, content in documents.items():
        unfinished = folder / f"{name}.json.part"
        unfinished.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(unfinished, folder / f"{name}.json")


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
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "versions": versions,
        "hardware": {"cpus": os.cpu_count(), "gpus": gpus, "ranks": world_size(), "system": platform.platform()},
    }


def _git(*words: str) -> str | None:
    """What git says of the code's own checkout; None where there is none."""
    here = Path(__file__).parent
    try:
        answer = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=20, check=False)
    except OSError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
