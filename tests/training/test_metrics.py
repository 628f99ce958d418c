"""Loss spikes, step times, FLOP rates."""

import json
import math
import time
from dataclasses import replace

import pytest
import ranks
import torch

from ddae.config.presets import preset
from ddae.training.flops import count_model_flops
from ddae.training.metrics import LossMeter, SpikeDetector, StepTimer


def test_a_spike_exceeds_the_usual_deviation():
    spikes = SpikeDetector([])
    usual = [1 + 0.01 * math.sin(step) for step in range(100)]
    assert not any(spikes.is_spike(loss) for loss in usual)
    assert spikes.is_spike(1.2)
    assert not spikes.is_spike(1.005)
    assert not spikes.is_spike(0.5)  # a drop is no spike
    assert spikes.is_spike(math.nan)
    assert spikes.is_spike(math.inf)
    assert not spikes.is_spike(1.0)


def test_a_resumed_run_compares_with_earlier_losses():
    before = [1.0 + 0.001 * (step % 3) for step in range(300)]
    assert SpikeDetector(before).is_spike(2.0)
    assert not SpikeDetector(before[:5]).is_spike(2.0)  # too few losses


def test_the_total_is_summed_and_its_parts_are_averaged():
    meter = LossMeter(["loss/a", "loss/b"])
    for total, part in ((0.5, 1.0), (0.25, 3.0)):
        meter.add(torch.tensor(total), [torch.tensor([part, 2 * part])])
    assert meter.read() == {"loss/total": 0.75, "loss/a": 2.0, "loss/b": 4.0}
    meter.reset()
    meter.add(torch.tensor(1.0), [torch.ones(2)])
    assert meter.read() == {"loss/total": 1.0, "loss/a": 1.0, "loss/b": 1.0}


def test_saving_is_timed_separately():
    timer = StepTimer()
    with timer.measure("save"):
        time.sleep(0.2)
    with timer.measure("data_wait"):
        time.sleep(0.05)
    timer.count_step()
    row = timer.read(batch_size=8)
    assert row["time/save"] == pytest.approx(0.2, abs=0.1)
    assert 0.05 <= row["time/data_wait"] <= row["time/step"] < 0.2 + row["time/data_wait"]
    assert row["time/step_max"] == row["time/step"]
    assert row["time/data_wait_max"] == row["time/data_wait"]
    assert timer.read(8)["time/save"] == 0


SLOW_RANK = """
import json, time
from ddae.distributed.comm import gather, is_main, rank
from ddae.distributed.engine import start_process_group, stop_process_group
from ddae.training.metrics import StepTimer

start_process_group()
timer = StepTimer()
time.sleep(0.3 * (1 - rank()))
with timer.measure("data_wait"):
    time.sleep(0.2 * rank())
timer.count_step()
rows = gather(timer.read(batch_size=8))
if is_main():
    print("ROWS", json.dumps(rows))
stop_process_group()
"""


def test_the_slowest_rank_and_the_longest_wait_are_in_every_ranks_row():
    output = ranks.run_program(2, ["-c", SLOW_RANK], [])
    rows = json.loads(output.partition("ROWS ")[2].splitlines()[0])
    assert 0.3 <= rows[0]["time/step"] == rows[0]["time/step_max"] == rows[1]["time/step_max"]
    assert rows[1]["time/step"] < rows[0]["time/step"]
    assert rows[0]["time/data_wait"] < 0.1
    assert 0.2 <= rows[1]["time/data_wait"] == rows[1]["time/data_wait_max"] == rows[0]["time/data_wait_max"]


def test_utilisation_counts_necessary_operations(monkeypatch):
    """1,000 images/s of ViT-B on an H100: 149 GFLOP an image, of 989 TFLOP/s; recomputed ones do not count."""
    config = preset("ddae_vit_b16_100e")
    flops = count_model_flops(config)
    assert flops.utilisation(1000.0, "bf16").keys() == {"throughput/tflops"}  # the peak of a CPU is unknown
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    row = flops.utilisation(1000.0, "bf16")
    assert row["throughput/tflops"] == pytest.approx(168.3 * (1 - 0.129), rel=0.015)
    assert row["throughput/mfu"] == pytest.approx(row["throughput/tflops"] / 989)
    again = replace(config.engine, activation_checkpointing=True, skip_unused_tokens=False)
    assert count_model_flops(replace(config, engine=again)) == flops
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce RTX 4090")
    assert flops.utilisation(1000.0, "bf16").keys() == {"throughput/tflops"}
