"""Preemption: on a signal all ranks agree on one step, save one checkpoint, and exit with code 75.

A rank stops on SIGTERM, on SIGUSR1 (Slurm's warning), on Ctrl-C, on SIGHUP unless that is ignored (nohup), or when its
launcher is gone: `deepspeed` may die of a signal without notifying its ranks. Of a launcher on another machine a rank
only notices that its output has no reader. One rank that knows is enough. A second Ctrl-C ends a rank at once.
"""

import os
import select
import signal
import threading
import time
from contextlib import suppress
from typing import Any

import psutil
import torch
import torch.distributed as dist

from ddae.distributed.comm import is_main, new_cpu_group, world_size

EXIT_CODE = 75  # EX_TEMPFAIL: the same command resumes the run
REASONS = ("", "SIGTERM", "SIGUSR1", "the launcher is gone", "SIGHUP", "SIGINT")
SAME_CTRL_C_S = 1.0  # launchers repeat the signal that the terminal sends to all processes
LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed")  # as they appear in a launcher's command line


class StopSignal:
    """Listens from its creation on; poll() says at which step all ranks stop."""

    def __init__(self) -> None:
        self._reason = 0  # index into REASONS, of this rank
        self.timeout_s = 600.0  # that this rank waits for the others; the watchdog's is shorter
        self._group: Any = None
        self._last_step, self._last_time, self._next_step = -1, 0.0, 0  # -1: no poll yet, the rate is unknown
        self._interrupted: float | None = None  # time of the first SIGINT
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, _: self._set(REASONS.index(signal.Signals(number).name)))
        signal.signal(signal.SIGINT, self._interrupt)
        if launchers := _launchers():
            threading.Thread(target=self._watch_launchers, args=(launchers,), daemon=True).start()
        threading.Thread(target=self._watch_output, daemon=True).start()

    def poll(self, step: int) -> str:
        """Return why all ranks stop before this step, "" if they do not. All ranks call it before each step.

        The ranks communicate about once a second, over a gloo group of their CPUs: no device synchronises.
        """
        if world_size() == 1:
            return REASONS[self._reason]
        if step < self._next_step:
            return ""
        if self._group is None:
            self._group = new_cpu_group(self.timeout_s)
        now, interval = time.monotonic(), 1  # steps until the next poll
        if self._last_step >= 0:
            interval = int((step - self._last_step) / max(now - self._last_time, 1e-3))
        message = torch.tensor([self._reason, -max(1, interval)])
        dist.all_reduce(message, dist.ReduceOp.MAX, self._group)
        reason, interval = int(message[0]), -int(message[1])
        self._last_step, self._last_time, self._next_step = step, now, step + interval
        return REASONS[reason]

    def reset_poll_interval(self) -> None:
        """Poll at the next call: what follows may be slower or faster than the steps so far. All ranks call it."""
        self._last_step, self._next_step = -1, 0

    def close(self) -> None:
        """Ignore signals from now on: the process is about to exit, and its exit code is decided.

        The interpreter's own shutdown would restore their default, which ends the process by the signal.
        """
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

    def _interrupt(self, *_: object) -> None:
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
            self._set(REASONS.index("SIGINT"))
            if is_main():
                os.write(2, b"ddae: stopping with a checkpoint; Ctrl-C again ends at once\n")
        elif now > self._interrupted + SAME_CTRL_C_S:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)

    def _set(self, reason: int) -> None:
        self._reason = self._reason or reason

    def _watch_launchers(self, launchers: list[psutil.Process]) -> None:
        with suppress(psutil.Error):  # it ended between two calls
            while all(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in launchers):
                time.sleep(1)
        self._set(3)

    def _watch_output(self) -> None:
        poll = select.poll()
        for descriptor in (1, 2):
            poll.register(descriptor, 0)  # errors alone
        while broken := poll.poll():
            for descriptor, event in broken:
                poll.unregister(descriptor)
                if event & (select.POLLERR | select.POLLHUP):
                    devnull = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(devnull, descriptor)  # otherwise the next line printed would end this rank
                    os.close(devnull)
                    self._set(3)


def _launchers() -> list[psutil.Process]:
    """Return the launchers among this process's ancestors, from its parent upwards."""
    found = []
    with suppress(psutil.Error):  # a user who may not see others' processes has no launcher of their own above them
        for process in psutil.Process().parents():
            command = process.cmdline()
            if not command or "python" not in command[0] or not any(name in " ".join(command) for name in LAUNCHERS):
                break
            found.append(process)
    return found
