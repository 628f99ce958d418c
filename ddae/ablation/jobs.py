"""Several commands at a time on one machine, which share its GPUs and processors."""

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ddae.distributed.preemption import EXIT_CODE
from ddae.errors import UserError


class Job(NamedTuple):
    """A command, what to call it, and the file for what it says."""

    name: str
    words: list[str]
    log: Path


def run_packed(jobs: Sequence[Job], parallel: int) -> None:
    """Run all jobs, `parallel` at a time, each on the GPU that has fewest of them and with its share of the processors.

    SystemExit with the code of a job that fails, after those that run beside it have ended; with code 75 where this
    process is told to stop, which it tells them. UserError where a launcher has started it.
    """
    refuse_launchers()
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: told.append(number))
    shown = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    load = Counter(dict.fromkeys(shown.split(","), 0))  # of jobs that run on each; without GPUs all are on ""
    threads = max(1, len(os.sched_getaffinity(0)) // parallel)
    waiting, failed, stopping = list(jobs), 0, False
    running: dict[subprocess.Popen, tuple[Job, str, float]] = {}
    try:
        while running or (waiting and not stopping and not failed):
            while waiting and len(running) < parallel and not stopping and not failed:
                job, gpu = waiting.pop(0), min(load, key=lambda gpu: load[gpu])
                here = {"OMP_NUM_THREADS": str(threads)} | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
                with open(job.log, "a") as log:
                    process = subprocess.Popen(job.words, env=os.environ | here, stdout=log, stderr=subprocess.STDOUT)
                running[process] = job, gpu, time.monotonic()
                load[gpu] += 1
            time.sleep(0.2)
            while told:
                stopping, number = True, told.pop()
                for process in running:
                    process.send_signal(number)
            for process in [each for each in running if each.poll() is not None]:
                job, gpu, start = running.pop(process)
                load[gpu] -= 1
                if process.returncode:
                    failed = failed or process.returncode
                    why = f"code {process.returncode}: {last_line(job.log)} ({job.log})"
                    print(f"--- {job.name} ended with {why}", flush=True)
                else:
                    print(f"--- {job.name}: {time.monotonic() - start:.0f} s; {len(waiting)} wait", flush=True)
    finally:
        for process in running:  # after an error here: nobody would look after them
            process.terminate()
    if stopping or failed:
        raise SystemExit(EXIT_CODE if stopping else failed)


def refuse_launchers() -> None:
    """UserError where this process is a rank of a launcher's: processes that it starts would take themselves for it."""
    if "RANK" in os.environ:
        raise UserError("--parallel starts processes of its own: start it with python, not with a launcher")


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it said nothing")
