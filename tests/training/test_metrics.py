"""Losses that stand out, and where a step's time goes."""

import math
import time
from dataclasses import replace

import pytest
import torch

from ddae.config.presets import preset
from ddae.training.flops import rates
from ddae.training.metrics import SpikeDetector, StepTimer


def test_a_spike_stands_out_of_what_is_usual():
    spikes = SpikeDetector([])
    usual = [1 + 0.01 * math.sin(step) for step in range(100)]
    assert not any(spikes.is_spike(loss) for loss in usual)
    assert spikes.is_spike(1.2)
    assert not spikes.is_spike(1.005)
    assert not spikes.is_spike(0.5)  # downwards is what one wants
    assert spikes.is_spike(math.nan)
    assert spikes.is_spike(math.inf)
    assert not spikes.is_spike(1.0)


def test_a_resumed_run_knows_what_was_usual():
    before = [1.0 + 0.001 * (step % 3) for step in range(300)]
    assert SpikeDetector(before).is_spike(2.0)
    assert not SpikeDetector(before[:5]).is_spike(2.0)  # too few to tell


def test_saving_counts_apart():
    clock = StepTimer()
    with clock.spending("save"):
        time.sleep(0.2)
    with clock.spending("data_wait"):
        time.sleep(0.05)
    clock.count_step()
    row = clock.read(batch_size=8)
    assert row["time/save"] == pytest.approx(0.2, abs=0.1)
    assert 0.05 <= row["time/data_wait"] <= row["time/step"] < 0.2 + row["time/data_wait"]
    assert clock.read(8)["time/save"] == 0


def test_rates_count_what_has_to_be_computed(monkeypatch):
    """1,000 images/s of ViT-B on an H100: 149 GFLOP an image, of 989 TFLOP/s; recomputing does not count."""
    config = preset("ddae_vit_b16_100e")
    assert rates(config, 1000.0).keys() == {"throughput/tflops"}  # of a CPU nobody knows what it could do
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    row = rates(config, 1000.0)
    assert row["throughput/tflops"] == pytest.approx(168.3 * (1 - 0.129), rel=0.01)
    assert row["throughput/mfu"] == pytest.approx(row["throughput/tflops"] / 989)
    again = replace(config, engine=replace(config.engine, activation_checkpointing=True, shortcuts=False))
    assert rates(again, 1000.0) == row
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce RTX 4090")
    assert rates(config, 1000.0).keys() == {"throughput/tflops"}
