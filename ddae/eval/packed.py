"""Several commands at a time on one machine, which share its GPUs and processors."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ddae.errors import UserError
from ddae.stopping import EXIT_CODE


class Job(NamedTuple):
    """A command, what to call it, and the file for what it says."""

    name: str
    words: list[str]
    log: Path


def run_packed(jobs: Sequence[Job], parallel: int) -> None:
    """Run all jobs, `parallel` at a time, GPU after GPU; each has its share of the processors' threads.

    SystemExit with the code of a job that fails, after those that run beside it have ended; with code 75 where this
    process is told to stop, which it tells them. UserError where it is one of several ranks.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--parallel starts processes of its own: start it with python, not with a launcher")
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: stop.append(number))
    gpus, threads = torch.cuda.device_count(), max(1, len(os.sched_getaffinity(0)) // parallel)
    waiting, failed = list(enumerate(jobs)), 0
    running: dict[subprocess.Popen, tuple[Job, float]] = {}
    while running or (waiting and not stop and not failed):
        while waiting and len(running) < parallel and not stop and not failed:
            place, job = waiting.pop(0)
            here = {"OMP_NUM_THREADS": str(threads)}
            if gpus > 1:
                here["CUDA_VISIBLE_DEVICES"] = str(place % gpus)
            with open(job.log, "a") as log:
                process = subprocess.Popen(job.words, env=os.environ | here, stdout=log, stderr=subprocess.STDOUT)
            running[process] = job, time.monotonic()
        if stop and stop != [0]:
            for process in running:
                process.send_signal(stop[0])
            stop[:] = [0]  # told once
        for process in [each for each in running if each.poll() is not None]:
            job, start = running.pop(process)
            if process.returncode:
                failed = failed or process.returncode
                print(f"--- {job.name} ended with code {process.returncode}: see {job.log}", flush=True)
            else:
                print(f"--- {job.name}: {time.monotonic() - start:.0f} s; {len(waiting)} wait", flush=True)
        time.sleep(0.2)
    if stop or failed:
        raise SystemExit(EXIT_CODE if stop else failed)
