"""Stopping when told to: all ranks agree on a step, so that one checkpoint holds it, and leave with exit code 75.

SIGTERM and SIGUSR1 (Slurm's warning) tell a rank; so does the end of the launcher that started it, as `deepspeed` dies
of a signal without a word to its ranks. Of a launcher on another machine a rank sees no more than that nobody reads its
output any longer. One rank that knows is enough.
"""

import os
import select
import signal
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from ddae.distributed.comm import world_size

EXIT_CODE = 75  # EX_TEMPFAIL: the same command goes on
REASONS = ("", "SIGTERM", "SIGUSR1", "the launcher is gone")
LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed")  # words in the command of one


class Stop:
    """Listens from its creation on; `agreed` says in which step all ranks stop."""

    def __init__(self) -> None:
        self._reason = 0  # of REASONS: what this rank was told
        self.patience = 600.0  # seconds that this rank waits for the others; the watchdog's come first
        self._group: Any = None
        self._checked_step, self._checked_at, self._next_step = -1, 0.0, 0  # -1: the pace is unknown
        for number, reason in ((signal.SIGTERM, 1), (signal.SIGUSR1, 2)):
            signal.signal(number, lambda *_, reason=reason: self._tell(reason))
        if launchers := _launchers():
            threading.Thread(target=self._watch, args=(launchers,), daemon=True).start()
        threading.Thread(target=self._watch_output, daemon=True).start()

    def agreed(self, step: int) -> str:
        """Why all ranks stop before this step; empty where they go on. All ranks call it before each step.

        They talk about it once a second or so, by a group of the CPUs', which asks no device.
        """
        if world_size() == 1:
            return REASONS[self._reason]
        if step < self._next_step:
            return ""
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.patience))
        now, pace = time.monotonic(), 1  # steps a second
        if self._checked_step >= 0:
            pace = int((step - self._checked_step) / max(now - self._checked_at, 1e-3))
        told = torch.tensor([self._reason, -max(1, pace)])
        dist.all_reduce(told, dist.ReduceOp.MAX, self._group)
        reason, pace = int(told[0]), -int(told[1])
        self._checked_step, self._checked_at, self._next_step = step, now, step + pace
        return REASONS[reason]

    def changes_pace(self) -> None:
        """What comes next may be slower or faster: at the next look all ranks talk, and find their pace anew. All of
        them call this."""
        self._checked_step, self._next_step = -1, 0

    def _tell(self, reason: int) -> None:
        self._reason = self._reason or reason

    def _watch(self, launchers: list[psutil.Process]) -> None:
        with suppress(psutil.Error):  # gone while it is looked at
            while all(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in launchers):
                time.sleep(1)
        self._tell(3)

    def _watch_output(self) -> None:
        ends = select.poll()
        for end in (1, 2):
            ends.register(end, 0)  # errors alone
        while gone := ends.poll():
            for end, event in gone:
                ends.unregister(end)
                if event & (select.POLLERR | select.POLLHUP):
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, end)  # or the next line printed would end this rank
                    os.close(nowhere)
                    self._tell(3)


def _launchers() -> list[psutil.Process]:
    """The launchers above this process, from the one that started it upwards."""
    found = []
    with suppress(psutil.Error):  # where a user may not see others' processes there is no launcher of his above them
        for process in psutil.Process().parents():
            words = process.cmdline()
            if not words or "python" not in words[0] or not any(name in " ".join(words) for name in LAUNCHERS):
                break
            found.append(process)
    return found
