"""Check whether this machine, or a set of ranks, can train: run everything that training depends on once.

A single process checks its own machine. Started as ranks by a launcher, it also times communication between them.
"""

import io
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ddae_kernels.implementation import resolve_impl
from PIL import Image, features

from ddae.atomic import fsync
from ddae.config import deepspeed as ds_config
from ddae.config.presets import preset
from ddae.config.pretrain import beta_names
from ddae.data.backend import dali_installed
from ddae.data.decode import decode_crop
from ddae.distributed.checkpoint import Checkpoints
from ddae.distributed.comm import barrier, broadcast_from_main, device, gather, is_main, world_size
from ddae.distributed.engine import Engine, start_process_group
from ddae.distributed.watchdog import Watchdog
from ddae.errors import UserError, one_line
from ddae.method.betas import Betas
from ddae.method.model import build_model
from ddae.tools.bench_worker import synchronise
from ddae.training import run_dir
from ddae.training.optimizer import build_optimizer

SIZES_MB = (1, 16, 128)  # of the tensors to all-reduce
ROUNDS = 5
TIMEOUT_S = 240.0  # of one check, including the time in which DeepSpeed builds an op


def check_flags(folder: Path, json_path: str) -> None:
    """Raise UserError if the folder cannot be created, or the JSON cannot be read."""
    ds_config.load(json_path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"--folder {folder} cannot be created or written ({error.strerror}). Name another folder."
        raise UserError(problem) from None


def run_checks(folder: Path, json_path: str) -> int:
    """Run every check and print its result on rank 0. Return the number of failed checks. All ranks call it.

    folder: where runs will be written; checkpoints are tried there. json_path: the DeepSpeed JSON to try them with.
    """
    start_process_group()
    broadcast_from_main(lambda: (folder / ".doctor").mkdir(parents=True, exist_ok=True))
    watchdog = Watchdog(folder / ".doctor", TIMEOUT_S)  # if one rank fails, the others would wait for it forever
    watchdog.first_step_done()
    num_failed = 0
    for name, check in {
        "versions": versions,
        "ranks": ranks_and_devices,
        "deepspeed": deepspeed_report,
        "loss": lambda: f"kernels: {resolve_impl('auto', device(), quiet=True)}",
        "images": decoders,
        "disk": lambda: disk(folder),
        "checkpoint": lambda: checkpoint(folder, json_path),
        "all-reduce": all_reduce,
        "gloo": gloo,
    }.items():
        watchdog.heartbeat(0)
        problem, result = "", ""
        try:
            result = check()
        except Exception as error:  # any failure is a result of this command
            problem = f"{type(error).__name__}: {one_line(error, 300)}"
        if problems := list(filter(None, gather(problem))):
            num_failed += 1
            result = f"FAILED on {len(problems)} of {world_size()} ranks: {problems[0]}"
        if is_main():
            print(f"{name:12}" + ("\n" + " " * 12).join(result.splitlines()), flush=True)
    watchdog.stop()
    barrier()
    if is_main():
        shutil.rmtree(folder / ".doctor", ignore_errors=True)
        print(f"\n{num_failed} checks failed" if num_failed else "\nall checks passed", flush=True)
    return num_failed


def versions() -> str:
    """Return the versions of Python, the packages and the JPEG library."""
    packages = {name: version for name, version in run_dir.environment()["versions"].items() if version}
    simd = " (pillow-simd)" if re.search(r"\.post\d", Image.__version__) else ""
    turbo = "" if features.check("libjpeg_turbo") else ", without libjpeg-turbo"
    return f"Python {platform.python_version()}, " + ", ".join(f"{k} {v}" for k, v in packages.items()) + simd + turbo


def ranks_and_devices() -> str:
    """Return the nodes with their ranks and devices. Raise RuntimeError if package versions differ between ranks."""
    name = f"{os.cpu_count()} cores"
    if device().type == "cuda":
        gpu = torch.cuda.get_device_properties(device())
        name = f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}"
    of_ranks = gather((platform.node(), name, run_dir.environment()["versions"]))
    packages = of_ranks[0][2]
    if others := [each[2] for each in of_ranks if each[2] != packages]:
        raise RuntimeError(f"package versions differ between ranks: {packages} and {others[0]}")
    counts = Counter((node, name) for node, name, _ in of_ranks)
    return "\n".join(f"{node}: {count} x {name}" for (node, name), count in counts.items())


def deepspeed_report() -> str:
    """Return the relevant lines of ds_report: versions, compilers and the ops that can be built."""

    def run_ds_report() -> str:
        command = [sys.executable, "-m", "deepspeed.env_report"]
        env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        process = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=env)
        return re.sub(r"\x1b\[[0-9;]*m", "", process.stdout)

    text = broadcast_from_main(run_ds_report)
    ops = re.findall(r"^(\w+) \.+ \S+ \.+ \[(\w+)\]", text, re.MULTILINE)
    usable = [name for name, compatible in ops if compatible == "OKAY" and name != "deepspeed_not_implemented"]
    names = r"nvcc version|deepspeed wheel compiled w\.|shared memory \(/dev/shm\) size|deepspeed info"
    facts = [f"{name}: {value.strip()}" for name, value in re.findall(rf"^({names}) \.+ (.*)$", text, re.MULTILINE)]
    compilers = [f"{name} {'found' if shutil.which(name) else 'MISSING'}" for name in ("g++", "ninja")]
    return "\n".join([", ".join(facts), f"ops it can build: {', '.join(usable)}; {', '.join(compilers)}"])


def decoders() -> str:
    """Decode the same small JPEG with each back end. Raise RuntimeError if their pixels differ too much."""
    rows, columns = np.mgrid[0:96, 0:128]
    pixels, file = np.stack([rows * 2, columns, rows + columns], 2).astype(np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    box = (8, 8, 72, 72)
    crop = decode_crop(file.getvalue(), box, False, 64)
    result = f"Pillow decodes, libjpeg-turbo {features.version('libjpeg_turbo')}"
    if not dali_installed():
        return result + "; DALI is not installed (make venv)"
    from ddae.data.dali import DaliDecoder

    files = [np.frombuffer(file.getvalue(), np.uint8)]
    from_dali = DaliDecoder(64, 1, 1, device()).decode(files, torch.tensor([box]), torch.tensor([False]))
    difference = float((from_dali[0].cpu().float() - torch.as_tensor(np.asarray(crop)).float()).abs().mean())
    if difference > 3:
        raise RuntimeError(f"pixels of DALI and Pillow differ by {difference:.1f} of 255 on average; expected <= 3")
    return result + f"; DALI decodes on the {device().type}, mean difference {difference:.2f} of 255"


def disk(folder: Path) -> str:
    """Write and flush 64 MB from every rank at the same time. Raise RuntimeError if nodes do not share the folder."""
    path = folder / ".doctor" / f"rank_{dist.get_rank():05d}"
    if lacking := [node for node, exists in gather((platform.node(), path.parent.is_dir())) if not exists]:
        raise RuntimeError(f"{folder} is not shared with node {lacking[0]}. Name a folder that all nodes share.")
    start, problem = time.perf_counter(), ""
    try:
        path.write_bytes(os.urandom(2**16) * 1000)
        fsync(path)
    except OSError as error:
        problem = f"{error.strerror} on {platform.node()}"
    of_ranks = gather((time.perf_counter() - start, problem))
    path.unlink(missing_ok=True)
    if problems := [problem for _, problem in of_ranks if problem]:
        raise RuntimeError(problems[0])
    seconds = max(seconds for seconds, _ in of_ranks)
    free = shutil.disk_usage(folder).free / 2**30
    return f"{folder}: {world_size() * 65.536 / seconds:,.0f} MB/s over all ranks, flushed; {free:,.0f} GiB free"


def checkpoint(folder: Path, json_path: str) -> str:
    """Save the state of a small model on all ranks, verify it and load it. Raise RuntimeError if that fails."""
    settings, config = ds_config.load(json_path), preset("demo")
    config = replace(config, data=replace(config.data, batch_size=8 * world_size()))
    if settings.get("bf16", {}).get("enabled"):
        config = replace(config, engine=replace(config.engine, precision="bf16"))
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    for key in (*batch, "gradient_clipping"):
        settings.pop(key, None)  # of the run, not of this check
    resolved = ds_config.resolve(settings, config, world_size())
    model = build_model(config)
    engine = Engine(model, build_optimizer(model, config.optim), resolved.json)
    betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)
    checkpoints, parts = Checkpoints(folder / ".doctor", 1), {"engine": engine, "betas": betas}
    start = time.perf_counter()
    if not checkpoints.save(1, parts, fingerprint="doctor"):
        raise RuntimeError("the checkpoint cannot be written")
    saved = time.perf_counter()
    newest = checkpoints.newest(allow_restart=False)
    if newest is None:
        raise RuntimeError("the checkpoint was written but cannot be found")
    checkpoints.load(newest.path, parts, "doctor")
    loaded = time.perf_counter()
    return f"ZeRO {engine.stage}: written in {saved - start:.2f} s, verified and loaded in {loaded - saved:.2f} s"


def all_reduce() -> str:
    """Time an all-reduce, on the slowest rank. A rank sends 2 (W - 1) / W of the bytes, W ranks."""
    if world_size() == 1:
        return "skipped with one rank; start this command with deepspeed, torchrun or srun to time it"
    lines = []
    for size in SIZES_MB:
        values, times = torch.ones(size * 10**6 // 4, device=device()), []
        for _ in range(ROUNDS):
            barrier()
            synchronise()
            start = time.perf_counter()
            dist.all_reduce(values)
            synchronise()
            times.append(max(gather(time.perf_counter() - start)))
        bandwidth = 2 * (world_size() - 1) / world_size() * size / 1000 / min(times)
        lines.append(f"{size:4} MB in {min(times) * 1000:8.2f} ms: {bandwidth:6.2f} GB/s a rank")
    return "\n".join(lines)


def gloo() -> str:
    """Connect the ranks by gloo, by which they agree to stop. Raise RuntimeError if they cannot connect."""
    if world_size() == 1:
        return "skipped with one rank"
    try:
        group: Any = dist.new_group(backend="gloo")
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        fix = "Set GLOO_SOCKET_IFNAME to the network interface that joins the nodes."
        raise RuntimeError(f"{one_line(error, 150)}. {fix}") from None
    return "the ranks connect over the CPU's network"
