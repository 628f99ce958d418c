"""Losses that stand out, and where a step's time goes."""

import math
import time

import pytest

from ddae.meter import Clock, Spikes


def test_a_spike_stands_out_of_what_is_usual():
    spikes = Spikes([])
    usual = [1 + 0.01 * math.sin(step) for step in range(100)]
    assert not any(spikes.is_one(loss) for loss in usual)
    assert spikes.is_one(1.2)
    assert not spikes.is_one(1.005)
    assert not spikes.is_one(0.5)  # downwards is what one wants
    assert spikes.is_one(math.nan)
    assert spikes.is_one(math.inf)
    assert not spikes.is_one(1.0)


def test_a_resumed_run_knows_what_was_usual():
    before = [1.0 + 0.001 * (step % 3) for step in range(300)]
    assert Spikes(before).is_one(2.0)
    assert not Spikes(before[:5]).is_one(2.0)  # too few to tell


def test_saving_counts_apart():
    clock = Clock()
    with clock.spending("save"):
        time.sleep(0.2)
    with clock.spending("data_wait"):
        time.sleep(0.05)
    clock.count_step()
    row = clock.read(batch_size=8)
    assert row["time/save"] == pytest.approx(0.2, abs=0.1)
    assert 0.05 <= row["time/data_wait"] <= row["time/step"] < 0.2 + row["time/data_wait"]
    assert clock.read(8)["time/save"] == 0
