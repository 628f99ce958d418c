"""Watchdog: a rank that makes no progress for too long writes the stacks of its threads and exits.

    heartbeats/rank_00000.json    host, process, step and its time, written about every ten seconds
    heartbeats/rank_00000.txt     stacks of all threads of a rank that was ended
    heartbeats/collectives_0      its last collectives, from torch's flight recorder

`torchfrtrace RUN/heartbeats -p collectives_` compares the collectives of all ranks. A rank that waits for another
cannot know which of them hangs: all of them exit, and the stacks show the cause. Time in which the process was
stopped is not counted. The limit is higher before the first step, when kernels are compiled and DeepSpeed's operators
are built.
"""

import faulthandler
import os
import platform
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from ddae import atomic
from ddae.distributed.comm import last_collectives, rank

EXIT_CODE = 70  # EX_SOFTWARE
HEARTBEAT_INTERVAL_S = 10.0
CHECK_INTERVAL_S = 10.0
WRITE_S = 10.0  # that an ending rank allows for its files
FIRST_STEP_EXTRA_S = 3600.0  # before the first step


class Watchdog:
    """Watches from its creation to stop(); heartbeat() reports progress."""

    def __init__(self, folder: Path, timeout_s: float):
        self.timeout_s = timeout_s
        self.stem = folder / "heartbeats" / f"rank_{rank():05d}"
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        self.stem.with_suffix(".txt").unlink(missing_ok=True)
        self._step, self._time, self._waited = 0, time.monotonic(), 0.0  # seconds since the last progress
        self._limit_s = timeout_s + FIRST_STEP_EXTRA_S
        self._stopped = threading.Event()
        for target in (self._watch, self._write_heartbeats):  # two threads: the disk may be what hangs
            threading.Thread(target=target, daemon=True).start()

    def heartbeat(self, step: int) -> None:
        """Report that `step` steps are done."""
        self._step, self._time, self._waited = step, time.monotonic(), 0.0

    def first_step_done(self) -> None:
        """End the longer limit that holds before the first step: from now on it is `timeout_s`."""
        self._limit_s = self.timeout_s

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()

    def _watch(self) -> None:
        interval = min(CHECK_INTERVAL_S, self.timeout_s / 10)
        before = time.monotonic()
        while not self._stopped.wait(interval):
            now = time.monotonic()
            self._waited += min(now - before, 2 * interval)  # more has passed if the process was stopped
            before = now
            if self._waited >= self._limit_s:
                self._exit()

    def _write_heartbeats(self) -> None:
        written = -1.0
        while not self._stopped.wait(min(HEARTBEAT_INTERVAL_S, self.timeout_s / 4)):
            if self._time != written:
                written = self._time
                beat = {"host": platform.node(), "pid": os.getpid(), "step": self._step, "time": time.time()}
                with suppress(OSError):  # a full disk must not end the run here
                    atomic.write_json(self.stem.with_suffix(".json"), beat, indent=None)

    def _exit(self) -> None:
        stacks = self.stem.with_suffix(".txt")
        print(
            f"ddae: rank {rank()} on {platform.node()} made no progress for {self._waited:.0f} s since step "
            f"{self._step} and exits. {stacks} and those of the other ranks show where each one was. "
            "The same command resumes the run.",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.stderr)

        def write() -> None:
            with suppress(OSError), open(stacks, "w") as file:
                faulthandler.dump_traceback(file)
            with suppress(OSError):
                (self.stem.parent / f"collectives_{rank()}").write_bytes(last_collectives())

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(WRITE_S)
        os._exit(EXIT_CODE)
