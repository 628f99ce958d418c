"""The launch count of a training step is a budget: more launches than measured today fail."""

import pytest

from ddae.errors import UserError
from ddae.tools.bench_launches import benchmark_launches, narrow_arguments
from ddae.tools.bench_step import LAUNCH_VARIANTS, VariantProcess

BUDGET = {"teacher": 130, "betas": 34, "student": 225, "backward": 433, "optimizer": 27, "EMA update": 12, "rest": 14}


def start(variant):
    """Start the process of a variant of ViT-B."""
    name = "ddae_vit_b16_100e"
    args = ["--preset", name, *narrow_arguments(name), "--data.backend", "synthetic", "--ds_config", "zero2"]
    args += ["--engine.loss_backend", "triton"]
    (chosen,) = (each for each in LAUNCH_VARIANTS if each.name == variant)
    return VariantProcess(chosen, "", args, fake_ranks=True)


@pytest.fixture(scope="module")
def measured():
    """Return the launches and the host time, by phase, of the finished step of ViT-B."""
    process = start("lean reduction")
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


@pytest.mark.slow
def test_stand_ins_for_graphs_leave_the_launches_around_them():
    """One launch a compiled segment or decoder; gradients still arrive one by one in DeepSpeed's buckets."""
    process = start("graphs")
    try:
        process.request("build 5")
        launches = process.request("launches 1")
    finally:
        process.kill()
    assert {phase: launches[phase] for phase in ("student", "backward")} == {"student": 20, "backward": 46}
    assert {phase: launches[phase] for phase in ("optimizer", "betas")} == {"optimizer": 27, "betas": 34}


def test_an_older_version_must_be_a_checkout(tmp_path):
    flags = type("Flags", (), {"preset": [], "before": f"{tmp_path} --engine.compile"})()
    with pytest.raises(UserError, match=f"--before names {tmp_path}, which is no checkout"):
        benchmark_launches(flags, [])


def test_presets_that_cannot_be_narrowed_are_refused():
    flags = type("Flags", (), {"preset": ["own"], "steps": 1, "rounds": 1, "json": "", "before": ""})()
    with pytest.raises(UserError, match="cannot narrow the preset own"):
        benchmark_launches(flags, [])
