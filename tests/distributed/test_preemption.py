"""When ranks synchronise about stopping, by a clock set by hand; test_signals.py stops whole runs."""

from types import SimpleNamespace

import pytest

from ddae.distributed import preemption as stopping


@pytest.fixture
def stop(monkeypatch):
    """A Stop of one of two ranks; `talks` lists the looks at which it asked the other, `clock` holds the time."""
    clock, talks = [0.0], []
    monkeypatch.setattr(stopping.signal, "signal", lambda *_: None)
    monkeypatch.setattr(stopping.threading, "Thread", lambda **_: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(stopping, "world_size", lambda: 2)
    monkeypatch.setattr(stopping.dist, "new_group", lambda **_: None)
    monkeypatch.setattr(stopping.dist, "all_reduce", lambda *_: talks.append(stop.look))
    stop = stopping.Stop()
    stop.clock, stop.talks, stop.look = clock, talks, 0
    return stop


def look(stop, times, seconds):
    """So many looks, so many seconds apart."""
    for _ in range(times):
        stop.look += 1
        assert stop.agreed(stop.look) == ""
        stop.clock[0] += seconds


def test_ranks_talk_once_a_second(stop):
    look(stop, 100, 0.1)
    assert 9 <= len(stop.talks) <= 13
    look(stop, 20, 3)
    assert stop.talks[-8:] == list(range(113, 121))  # steps grew long


def test_after_an_evaluation_they_talk_before_the_next_slow_step(stop):
    look(stop, 100, 0.01)
    stop.reset_poll_interval()
    look(stop, 3, 10)
    assert stop.talks[-3:] == [101, 102, 103]
    stop._tell(1)
    assert stop.agreed(104) == "SIGTERM"
