"""Diagnostics of single steps: a profiler trace of chosen steps, and snapshots of GPU memory on request.

    profile/rank_0_steps_50_55.json.gz   Chrome trace of each rank (--train.profile_steps 50:55)
    memory_snapshot.request              created or touched by the user at any time: each GPU's rank writes
    memory/rank_0_step_120.pickle        a snapshot of its memory after its next step, with that step's allocations,
                                         for https://pytorch.org/memory_viz

Outside the window a step costs two comparisons of integers; the request is looked up once a second.
"""

import logging
import re
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ddae.distributed.comm import device, rank
from ddae.errors import UserError

REQUEST = "memory_snapshot.request"
CHECK_INTERVAL_S = 1.0  # between two looks for a request: on a network file system each may take a millisecond
MAX_ALLOCATIONS = 1_000_000  # of a step that a snapshot lists
logger = logging.getLogger(__name__)


class StepProfiler:
    """Records the steps of a window, and writes one Chrome trace per rank. A run that ends earlier writes its part."""

    def __init__(self, steps: str, num_steps: int, folder: Path):
        """steps: FIRST:LAST, both included and counted from 1, as in the log; empty: none.

        Raise UserError if it is no such range, or not within the run.
        """
        self._first, self._last = _window(steps, num_steps) if steps else (0, 0)
        self._folder, self._profile, self._begun, self._done = folder / "profile", None, 0, 0

    def warn_if_over(self, start: int) -> None:
        """Log that no trace is written if this start, which follows step `start`, has no step of the window."""
        if 0 < self._last <= start:
            logger.warning("steps %d to %d are over: no profile is written", self._first, self._last)

    def begin_step(self, number: int) -> None:
        """Start to record at the first step of the window that runs; mark the step in the trace."""
        if not self._first <= number <= self._last:
            return
        if self._profile is None:
            cuda = [ProfilerActivity.CUDA] if device().type == "cuda" else []
            self._profile, self._begun = profile(activities=[ProfilerActivity.CPU, *cuda]), number
            self._profile.start()
        self._mark = record_function(f"step {number}")
        self._mark.__enter__()

    def end_step(self, number: int) -> None:
        """End the step's mark; after the last step of the window write the trace."""
        if self._profile is None:
            return
        self._mark.__exit__(None, None, None)
        self._done = number
        if number == self._last:
            self.close()

    def close(self) -> None:
        """Write what was recorded so far, if anything was. A trace that cannot be written is logged."""
        if self._profile is None:
            return
        self._profile.stop()
        file = self._folder / f"rank_{rank()}_steps_{self._begun}_{self._done}.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            self._profile.export_chrome_trace(str(file))
            logger.info("profile of steps %d to %d: %s", self._begun, self._done, file)
        except OSError as error:
            logger.warning("%s cannot be written (%s)", file, error.strerror)
        self._profile = None


def _window(steps: str, num_steps: int) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+):(\d+)", steps)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= last <= num_steps:
        raise UserError(
            f"train.profile_steps is {steps}; expected FIRST:LAST with steps from 1 to {num_steps}, such as "
            f"{max(1, num_steps // 2)}:{min(num_steps, num_steps // 2 + 5)}."
        )
    return first, last


class MemorySnapshots:
    """Writes a snapshot of the GPU's memory after the next step whenever REQUEST was created or touched."""

    def __init__(self, folder: Path):
        self._request, self._folder = folder / REQUEST, folder / "memory"
        self._answered = self._requested()  # of an earlier start
        self._next_check, self._records = 0.0, False

    def begin_step(self) -> None:
        """Look for a request, at most once a second; record the step's allocations if there is one."""
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check, requested = now + CHECK_INTERVAL_S, self._requested()
        if requested in (0, self._answered):
            return
        self._answered = requested
        if device().type == "cpu":
            logger.info("%s: this run is on a CPU, which has no snapshot of GPU memory", REQUEST)
            return
        torch.cuda.memory._record_memory_history(max_entries=MAX_ALLOCATIONS)
        self._records = True

    def end_step(self, number: int) -> None:
        """Write the snapshot that was requested, if any. One that cannot be written is logged."""
        if not self._records:
            return
        self._records = False
        file = self._folder / f"rank_{rank()}_step_{number}.pickle"
        try:
            self._folder.mkdir(exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(file))
            logger.info("snapshot of GPU memory: %s", file)
        except OSError as error:
            logger.warning("%s cannot be written (%s)", file, error.strerror)
        torch.cuda.memory._record_memory_history(enabled=None)

    def _requested(self) -> int:
        """Return when the request was made, in ns; 0 if there is none."""
        try:
            return self._request.stat().st_mtime_ns
        except OSError:
            return 0
