"""Steps at which ranks poll for signals, with a simulated clock; test_signals.py stops whole runs."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import ranks

from ddae.distributed import preemption


@pytest.fixture
def stop(monkeypatch):
    """Return a StopSignal of one of two ranks. `polled`: steps at which it communicated; `clock`: seconds."""
    clock, polled = [0.0], []
    monkeypatch.setattr(preemption.signal, "signal", lambda *_: None)
    monkeypatch.setattr(preemption.threading, "Thread", lambda **_: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(preemption.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(preemption, "world_size", lambda: 2)
    monkeypatch.setattr(preemption.dist, "new_group", lambda **_: None)
    monkeypatch.setattr(preemption.dist, "all_reduce", lambda *_: polled.append(stop.now))
    stop = preemption.StopSignal()
    stop.clock, stop.polled, stop.now = clock, polled, 0
    return stop


def run_steps(stop, count, seconds):
    """Run `count` steps of this many seconds each."""
    for _ in range(count):
        stop.now += 1
        assert stop.poll(stop.now) == ""
        stop.clock[0] += seconds


def test_ranks_communicate_once_a_second(stop):
    run_steps(stop, 100, 0.1)
    assert 9 <= len(stop.polled) <= 13
    run_steps(stop, 20, 3)
    assert stop.polled[-8:] == list(range(113, 121))  # steps of more than one second: at each


def test_after_a_reset_ranks_communicate_at_the_next_step(stop):
    run_steps(stop, 100, 0.01)
    stop.reset_poll_interval()
    run_steps(stop, 3, 10)
    assert stop.polled[-3:] == [101, 102, 103]
    stop._set(1)
    assert stop.poll(104) == "SIGTERM"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("closed", [True, False])
def test_signals_at_the_very_end_do_not_change_the_exit_code(number, closed):
    """They arrive while the interpreter shuts down, when Python's own handlers are gone."""
    close = "stop.close()" if closed else ""
    program = f"""
import os, signal, subprocess, sys
from ddae.distributed.preemption import StopSignal
stop = StopSignal()
{close}
class Last:
    def __del__(self, kill=os.kill, pid=os.getpid()):
        kill(pid, {int(number)})
sys.modules["last"] = Last()  # deleted after the handlers were restored
sys.exit(75)
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ranks.ROOT)
    assert finished.returncode == (75 if closed else -number), finished.stderr
