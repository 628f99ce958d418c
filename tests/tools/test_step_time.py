"""ddae/tools/step_time.py: identities that a predicted step satisfies."""

from dataclasses import replace

import pytest

from ddae.config.deepspeed import load
from ddae.config.presets import preset
from ddae.tools.step_time import NETWORKS, Assumptions, efficiency, predict_step
from ddae.training.flops import GPUS, count_flops

CONFIG, GPU = preset("ddae_vit_b16_100e"), GPUS["h100-80g"]
FAST = Assumptions(host_ms=1e-6, loader_rate=1e9)  # the GPU alone limits the step


def step_of(stage: int, gpus: int, network: str = "infiniband-400", assumed: Assumptions = FAST, **overlap: bool):
    settings = load(f"zero{stage}")
    settings["zero_optimization"] |= overlap
    micro = CONFIG.data.batch_size // gpus
    return predict_step(CONFIG, settings, stage, gpus, GPU, NETWORKS[network], micro, assumed)


@pytest.mark.parametrize("stage", range(4))
def test_one_gpu_sends_nothing_and_computes_all(stage):
    step = step_of(stage, 1)
    assert (step.gradients, step.prefetch, step.gather, step.teacher) == (0, 0, 0, 0)
    assert step.compute == pytest.approx(4096 * count_flops(CONFIG).total / (0.4 * 989e12))
    assert efficiency(step, CONFIG, stage, 1) == pytest.approx(1)


@pytest.mark.parametrize("stage", range(4))
def test_a_faster_network_is_never_slower(stage):
    times = [step_of(stage, 64, name).device for name in ("ethernet-100", *list(NETWORKS)[:3])]
    assert times == sorted(times, reverse=True)
    inside = [step_of(stage, 8, name).device for name in NETWORKS]
    assert len(set(inside)) == 1  # within a node the network is not used


def test_only_overlapped_communication_is_hidden():
    assert step_of(0, 64).hidden == 0
    assert step_of(2, 64, overlap_comm=False).hidden == 0
    step = step_of(2, 64)
    assert 0 < step.hidden < step.gradients  # the last bucket has to be awaited
    slow = step_of(2, 64, "ethernet-100")
    assert slow.hidden <= slow.compute
    assert step_of(3, 64).hidden > 0


def test_a_step_waits_for_what_takes_longest():
    gpu = step_of(2, 64)
    assert (gpu.bound, gpu.total) == ("GPU", gpu.device)
    host = step_of(2, 64, assumed=replace(FAST, host_ms=100.0))
    assert (host.bound, host.total) == ("host", pytest.approx(0.1 * 16))  # 12 blocks of the encoder, 4 of decoders
    loader = step_of(2, 64, assumed=replace(FAST, loader_rate=10.0))
    assert (loader.bound, loader.total) == ("loader", pytest.approx(6.4))
    assert efficiency(host, CONFIG, 2, 64) < efficiency(gpu, CONFIG, 2, 64) < 1
