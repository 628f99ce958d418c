"""The launch count of a training step is a budget: more launches than measured today fail."""

import pytest

from ddae.errors import UserError
from ddae.tools.bench_launches import benchmark_launches, narrow_arguments
from ddae.tools.bench_step import LAUNCH_VARIANTS, VariantProcess

BUDGET = {"teacher": 130, "betas": 34, "student": 225, "backward": 445, "optimizer": 27, "EMA update": 12, "rest": 14}


@pytest.fixture(scope="module")
def measured():
    """Return the launches and the host time, by phase, of the finished step of ViT-B."""
    name = "ddae_vit_b16_100e"
    args = ["--preset", name, *narrow_arguments(name), "--data.backend", "synthetic", "--ds_config", "zero2"]
    process = VariantProcess(LAUNCH_VARIANTS[-1], "", [*args, "--engine.loss_backend", "triton"], fake_ranks=True)
    try:
        process.request("build 2")
        yield process.request("launches 1"), process.request("host 2")
    finally:
        process.kill()


def test_launches_stay_within_their_budget(measured):
    launches, _ = measured
    assert launches.keys() == BUDGET.keys()
    assert {phase: count for phase, count in launches.items() if count > BUDGET[phase]} == {}
    assert sum(launches.values()) > 0.9 * sum(BUDGET.values()), "lower the budget to what is measured"


def test_host_time_is_divided_among_the_same_phases(measured):
    launches, host = measured
    assert host.keys() == launches.keys()
    assert all(value > 0 for value in host.values())


def test_presets_that_cannot_be_narrowed_are_refused():
    flags = type("Flags", (), {"preset": ["own"], "steps": 1, "rounds": 1, "json": ""})()
    with pytest.raises(UserError, match="cannot narrow the preset own"):
        benchmark_launches(flags, [])
