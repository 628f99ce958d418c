"""Whether this machine, or these ranks, can train: each thing that a run leans on is tried, and the answer told.

As one process it looks at its machine; started as ranks, by whichever launcher, it also times what goes between them.
"""

import io
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ddae_kernels.implementation import choose
from PIL import Image, features

from ddae.config import deepspeed as ds_config
from ddae.config.presets import preset
from ddae.config.pretrain import beta_names
from ddae.data.backend import dali_installed
from ddae.data.decode import decode_crop
from ddae.distributed.checkpoint import Checkpoints
from ddae.distributed.comm import barrier, broadcast_from_main, device, gather, is_main, world_size
from ddae.distributed.engine import Engine, start_process_group
from ddae.distributed.watchdog import Watchdog
from ddae.errors import UserError
from ddae.method.betas import Betas
from ddae.method.model import build_model
from ddae.training import run_dir
from ddae.training.optimizer import build_optimizer

SIZES = (1, 16, 128)  # MB that go between the ranks
ROUNDS = 5
PATIENCE = 240.0  # seconds for one of the tries, DeepSpeed's building of an op included


def examine(folder: Path, json_path: str) -> int:
    """Print what was found; the number of things that do not work. All ranks call it.

    folder: where runs are to be, tried for checkpoints; json_path: the DeepSpeed JSON to try them with.
    """
    start_process_group()
    broadcast_from_main(lambda: (folder / ".doctor").mkdir(parents=True, exist_ok=True))
    watchdog = Watchdog(folder / ".doctor", PATIENCE)  # a rank that fails alone leaves the others waiting
    failed = 0
    for name, look in {
        "versions": versions,
        "ranks": ranks_and_devices,
        "deepspeed": deepspeed_report,
        "loss": lambda: f"kernels: {choose('auto', device(), quiet=True)}",
        "images": decoders,
        "disk": lambda: disk(folder),
        "checkpoint": lambda: checkpoint(folder, json_path),
        "all-reduce": all_reduce,
        "gloo": gloo,
    }.items():
        watchdog.heartbeat(0)
        problem, said = "", ""
        try:
            said = look()
        except Exception as error:  # whatever is broken here is what the user wants to know
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        problems = [each for each in gather(problem) if each]
        failed += bool(problems)
        watchdog.heartbeat(0)
        if is_main():
            lines = (
                f"FAILS on {len(problems)} of {world_size()} ranks: {problems[0]}" if problems else said
            ).splitlines()
            print(f"{name:12}" + ("\n" + " " * 12).join(lines), flush=True)
    watchdog.stop()
    barrier()
    if is_main():
        shutil.rmtree(folder / ".doctor", ignore_errors=True)
        print(f"\n{failed} of the above do not work" if failed else "\nall of it works", flush=True)
    return failed


def versions() -> str:
    found = {name: version for name, version in run_dir.environment()["versions"].items() if version}
    simd = " (pillow-simd)" if re.search(r"\.post\d", Image.__version__) else ""
    turbo = "" if features.check("libjpeg_turbo") else ", without libjpeg-turbo"
    return f"Python {platform.python_version()}, " + ", ".join(f"{k} {v}" for k, v in found.items()) + simd + turbo


def ranks_and_devices() -> str:
    """Nodes with their ranks and devices; RuntimeError where nodes have other versions."""
    mine = device()
    what = f"{os.cpu_count()} cores" if mine.type == "cpu" else torch.cuda.get_device_name(mine)
    if mine.type == "cuda":
        what += f", {torch.cuda.get_device_properties(mine).total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}"
    seen = gather((platform.node(), what, run_dir.environment()["versions"]))
    if len({str(each[2]) for each in seen}) > 1:
        raise RuntimeError(
            f"the ranks have other packages: {seen[0][2]} and {next(s[2] for s in seen if s[2] != seen[0][2])}"
        )
    lines = []
    for node in dict.fromkeys(each[0] for each in seen):
        of_node = [each[1] for each in seen if each[0] == node]
        lines.append(f"{node}: {len(of_node)} x {of_node[0]}")
    return "\n".join(lines)


def deepspeed_report() -> str:
    """What ds_report knows, in the lines that matter."""

    def ask() -> str:
        command = [sys.executable, "-m", "deepspeed.env_report"]
        alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=alone)
        return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)

    report = broadcast_from_main(ask)
    ops = re.findall(r"^(\w+) \.+ \S+ \.+ \[(\w+)\]", report, re.MULTILINE)
    usable = [name for name, compatible in ops if compatible == "OKAY" and name != "deepspeed_not_implemented"]
    wanted = (
        r"^((?:nvcc version|deepspeed wheel compiled w\.|shared memory \(/dev/shm\) size|deepspeed info)) \.+ (.*)$"
    )
    facts = [f"{name}: {value.strip()}" for name, value in re.findall(wanted, report, re.MULTILINE)]
    compilers = [f"{name} {'found' if shutil.which(name) else 'MISSING'}" for name in ("g++", "ninja")]
    return "\n".join([", ".join(facts), f"ops it can build: {', '.join(usable)}; {', '.join(compilers)}"])


def decoders() -> str:
    """Each back end decodes the same small image."""
    rows, columns = np.mgrid[0:96, 0:128]
    picture, file = np.stack([rows * 2, columns, rows + columns], 2).astype(np.uint8), io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=95)
    box = (8, 8, 72, 72)
    crop = decode_crop(file.getvalue(), box, False, 64)
    said = f"Pillow decodes, libjpeg-turbo {features.version('libjpeg_turbo')}"
    if not dali_installed():
        return said + "; DALI is not installed (pip install -e '.[cu13]')"
    from ddae.data.dali import DaliDecoder

    files = [np.frombuffer(file.getvalue(), np.uint8)]
    other = DaliDecoder(64, 1, 1, device()).decode(files, torch.tensor([box]), torch.tensor([False]))
    apart = float((other[0].cpu().float() - torch.as_tensor(np.asarray(crop)).float()).abs().mean())
    if apart > 3:
        raise RuntimeError(f"DALI's pixels are {apart:.1f} of 255 away from Pillow's")
    return said + f"; DALI decodes on the {device().type}, {apart:.2f} of 255 apart"


def disk(folder: Path) -> str:
    """Every rank writes and flushes 64 MB at once; all must see the folder that rank 0 made."""

    own = folder / ".doctor" / f"rank_{dist.get_rank():05d}"
    lacking = [node for node, there in gather((platform.node(), own.parent.is_dir())) if not there]
    if lacking:
        raise RuntimeError(f"{folder} is another folder on {lacking[0]}: runs need one that all nodes share")
    start, problem = time.perf_counter(), ""
    try:
        with open(own, "wb") as file:
            file.write(os.urandom(2**16) * 1000)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        problem = f"{error.strerror} on {platform.node()}"
    told = gather((time.perf_counter() - start, problem))
    own.unlink(missing_ok=True)
    if problems := [problem for _, problem in told if problem]:
        raise RuntimeError(problems[0])
    seconds = max(seconds for seconds, _ in told)
    free = shutil.disk_usage(folder).free / 2**30
    return f"{folder}: {world_size() * 65.536 / seconds:,.0f} MB/s over all ranks, flushed; {free:,.0f} GiB free"


def checkpoint(folder: Path, json_path: str) -> str:
    """A small model's state is saved, checked and read back by all ranks."""
    settings, config = ds_config.load(json_path), preset("demo")
    if settings.get("bf16", {}).get("enabled"):
        config = replace(config, engine=replace(config.engine, precision="bf16"))
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        settings.pop(key, None)  # of the run's own batch
    settings.pop("gradient_clipping", None)
    config = replace(config, data=replace(config.data, batch_size=8 * world_size()))
    resolved = ds_config.resolve(settings, config, world_size())
    method = build_model(config)
    engine = Engine(method, build_optimizer(method, config.optim), resolved.json)
    betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)
    checkpoints, parts = Checkpoints(folder / ".doctor", 1), {"engine": engine, "betas": betas}
    start = time.perf_counter()
    if not checkpoints.save(1, parts, fingerprint="doctor"):
        raise RuntimeError("it cannot be written")
    saved = time.perf_counter()
    newest = checkpoints.newest(allow_restart=False)
    if newest is None:
        raise RuntimeError("what was written is not found")
    checkpoints.load(newest.path, parts, "doctor")
    loaded = time.perf_counter()
    return f"ZeRO {engine.stage}: written in {saved - start:.2f} s, checked and read in {loaded - saved:.2f} s"


def all_reduce() -> str:
    """Seconds of a sum over all ranks, and what each rank's link carries: 2 (W - 1) / W of the bytes."""
    if world_size() == 1:
        return "one rank has nobody to talk to: start this with deepspeed, torchrun or srun to time it"
    lines = []
    for size in SIZES:
        values = torch.ones(size * 10**6 // 4, device=device())
        seconds = min(_timed(lambda values=values: dist.all_reduce(values)) for _ in range(ROUNDS))
        carried = 2 * (world_size() - 1) / world_size() * size / 1000 / seconds
        lines.append(f"{size:4} MB in {seconds * 1000:8.2f} ms: {carried:6.2f} GB/s a rank")
    return "\n".join(lines)


def gloo() -> str:
    """The processors' own way to talk, by which ranks agree to stop."""
    if world_size() == 1:
        return "one rank has nobody to talk to"
    try:
        group: Any = dist.new_group(backend="gloo")
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"{' '.join(str(error).split())[:150]}: let GLOO_SOCKET_IFNAME name the network device that joins the nodes"
        ) from None
    return "the ranks' processors meet"


def _timed(work: Callable[[], object]) -> float:
    def wait() -> None:
        if device().type == "cuda":
            torch.cuda.synchronize()

    barrier()
    wait()
    start = time.perf_counter()
    work()
    wait()
    return max(gather(time.perf_counter() - start))


def check(folder: Path, json_path: str) -> None:
    """UserError where the folder cannot be made, or the JSON cannot be read."""
    ds_config.load(json_path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--folder {folder} cannot be made or written ({error.strerror}): name another") from None
