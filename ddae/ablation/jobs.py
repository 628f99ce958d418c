"""Run several commands at a time on one machine, sharing its GPUs and cores."""

import logging
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

POLL_INTERVAL_S = 0.2
logger = logging.getLogger(__name__)


class Job(NamedTuple):
    """A command, its name, and the file for its output."""

    name: str
    command: list[str]
    log: Path


def run_jobs(jobs: Sequence[Job], parallel: int) -> None:
    """Run all jobs, `parallel` at a time, each on the GPU with fewest jobs and with an equal share of the cores.

    SIGTERM and SIGUSR1 are forwarded to the running jobs. No job is started after a signal or a failure, and the
    running ones may finish; then raise SystemExit, with code 75 after a signal, else with the failed job's code.
    Raise UserError if this process is a rank of a launcher.
    """
    require_no_launcher()
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: signals.append(number))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    jobs_on = Counter(dict.fromkeys(gpus.split(","), 0))  # by GPU; without GPUs all jobs count for ""
    threads = max(1, len(os.sched_getaffinity(0)) // parallel)
    waiting, failed_code, stopping = list(jobs), 0, False
    running: dict[subprocess.Popen, tuple[Job, str, float]] = {}
    try:
        while running or (waiting and not stopping and not failed_code):
            while waiting and len(running) < parallel and not stopping and not failed_code:
                job, gpu = waiting.pop(0), min(jobs_on, key=lambda gpu: jobs_on[gpu])
                env = os.environ | {"OMP_NUM_THREADS": str(threads)} | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
                with open(job.log, "a") as log:
                    process = subprocess.Popen(job.command, env=env, stdout=log, stderr=subprocess.STDOUT)
                running[process] = job, gpu, time.monotonic()
                jobs_on[gpu] += 1
            time.sleep(POLL_INTERVAL_S)
            while signals:
                stopping, number = True, signals.pop()
                for process in running:
                    process.send_signal(number)
            for process in [each for each in running if each.poll() is not None]:
                job, gpu, start = running.pop(process)
                jobs_on[gpu] -= 1
                if process.returncode:
                    failed_code = failed_code or process.returncode
                    reason = f"{last_line(job.log)} ({job.log})"
                    logger.warning("%s: failed with code %d: %s", job.name, process.returncode, reason)
                else:
                    seconds = time.monotonic() - start
                    logger.info("%s: done in %.0f s; %d jobs waiting", job.name, seconds, len(waiting))
    finally:
        for process in running:  # only after an error in this function
            process.terminate()
    if stopping or failed_code:
        raise SystemExit(EXIT_CODE if stopping else failed_code)


def require_no_launcher() -> None:
    """Raise UserError if this process is a rank: the processes that it starts would inherit its rank."""
    if "RANK" in os.environ:
        raise UserError("--parallel starts processes itself. Start this command with python, not with a launcher.")


def last_line(log: Path) -> str:
    """Return the last line of a log that is not empty."""
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no output")
