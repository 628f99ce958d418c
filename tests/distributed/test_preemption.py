"""Steps at which ranks poll for signals, with a simulated clock; test_signals.py stops whole runs."""

from types import SimpleNamespace

import pytest

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
