"""Watchdog: a rank that makes no progress for too long writes the stacks of its threads and exits.

    heartbeats/rank_00000.json    host, process, step and its time, written about every ten seconds
    heartbeats/rank_00000.txt     stacks of all threads of a rank that was ended

A rank that waits for another cannot know which of them hangs: all of them exit, and the stacks show the cause.
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
from ddae.distributed.comm import rank

EXIT_CODE = 70  # EX_SOFTWARE
HEARTBEAT_INTERVAL_S = 10.0


class Watchdog:
    """Watches from its creation to stop(); heartbeat() reports progress."""

    def __init__(self, folder: Path, timeout_s: float):
        self.timeout_s = timeout_s
        self.stem = folder / "heartbeats" / f"rank_{rank():05d}"
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        self.stem.with_suffix(".txt").unlink(missing_ok=True)
        self._step, self._time = 0, time.monotonic()
        self._stopped = threading.Event()
        for target in (self._watch, self._write_heartbeats):  # two threads: the disk may be what hangs
            threading.Thread(target=target, daemon=True).start()

    def heartbeat(self, step: int) -> None:
        """Report that `step` steps are done."""
        self._step, self._time = step, time.monotonic()

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()

    def _watch(self) -> None:
        remaining = self.timeout_s
        while not self._stopped.wait(remaining):
            remaining = self._time + self.timeout_s - time.monotonic()
            if remaining <= 0:
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
            f"ddae: rank {rank()} on {platform.node()} made no progress for {self.timeout_s:g} s since step "
            f"{self._step} and exits. {stacks} and those of the other ranks show where each one was. "
            "The same command resumes the run.",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.stderr)

        def write() -> None:
            with suppress(OSError), open(stacks, "w") as file:
                faulthandler.dump_traceback(file)

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(5)
        os._exit(EXIT_CODE)
