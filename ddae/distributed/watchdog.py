"""A run that hangs ends: each rank leaves a heartbeat and, when nothing has moved for too long, its stacks.

    heartbeats/rank_00000.json    host, process, step and when it was reached, written every ten seconds or so
    heartbeats/rank_00000.txt     stacks of all threads, where the rank was ended

A rank that waits in vain for another cannot know which of them hangs: all of them end, and the stacks tell.
"""

import faulthandler
import json
import os
import platform
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from ddae.distributed.comm import rank

EXIT_CODE = 70  # EX_SOFTWARE
EVERY = 10.0  # seconds between heartbeats


class Watchdog:
    """Watches from its creation to stop(); `beat` says that the run has moved."""

    def __init__(self, folder: Path, limit: float):
        self.limit = limit
        self.stem = folder / "heartbeats" / f"rank_{rank():05d}"
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        self.stem.with_suffix(".txt").unlink(missing_ok=True)
        self._step, self._at = 0, time.monotonic()
        self._over = threading.Event()
        for task in (self._watch, self._write_heartbeats):  # apart: the disk may be what hangs
            threading.Thread(target=task, daemon=True).start()

    def beat(self, step: int) -> None:
        """`step` steps are done."""
        self._step, self._at = step, time.monotonic()

    def stop(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        left = self.limit
        while not self._over.wait(left):
            left = self._at + self.limit - time.monotonic()
            if left <= 0:
                self._end()

    def _write_heartbeats(self) -> None:
        told, unfinished = -1.0, self.stem.with_suffix(".part")
        while not self._over.wait(min(EVERY, self.limit / 4)):
            if self._at != told:
                told = self._at
                beat = {"host": platform.node(), "pid": os.getpid(), "step": self._step, "time": time.time()}
                with suppress(OSError):  # a disk that is full ends no run here
                    unfinished.write_text(json.dumps(beat) + "\n")
                    unfinished.replace(self.stem.with_suffix(".json"))

    def _end(self) -> None:
        stacks = self.stem.with_suffix(".txt")
        print(
            f"ddae: rank {rank()} on {platform.node()} has not moved for {self.limit:g} s since step {self._step} "
            f"and ends; {stacks} and its like say where each rank was. The same command goes on",
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
