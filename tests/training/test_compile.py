"""Runs with --engine.compile equal runs without it, at each ZeRO stage, on two ranks."""

import numpy as np
import pytest
import ranks

SIX_STEPS = ("--engine.precision", "fp32", "--train.steps", "6")
STAGES = (0, 1, 2, 3)


@pytest.mark.faults
def test_compiled_runs_equal_eager_runs(shards, tmp_path, record_result):
    """Six steps with --engine.compile and without, fp32, two ranks, stages 0 to 3.

    Stage 0 runs tap by tap. Compiled code sums in another order, which the tolerance allows for.
    """
    commands = []
    for stage in STAGES:
        taps = ("--engine.tap_execution", "batched" if stage else "sequential")
        commands += [ranks.arguments(shards, tmp_path / f"eager_{stage}", stage, *SIX_STEPS, *taps)]
        commands += [
            ranks.arguments(shards, tmp_path / f"compiled_{stage}", stage, *SIX_STEPS, *taps, "--engine.compile")
        ]
    ranks.run_all(2, commands, timeout=3000)
    largest = 0.0
    for stage in STAGES:
        for column in ("loss/total", "error/pixel/tap_02", "error/feature/tap_01", "beta/tap_01", "grad/norm"):
            compiled, eager = (np.array(ranks.column(tmp_path / f"{k}_{stage}", column)) for k in ("compiled", "eager"))
            assert len(compiled) == 6
            np.testing.assert_allclose(compiled, eager, rtol=2e-5, err_msg=f"{column} at stage {stage}")
            largest = max(largest, float(np.abs(compiled / eager - 1).max()))
    record_result(f"largest relative difference of losses, errors, betas and norms {largest:.1e}")
