"""Compiled runs are the others, at each ZeRO stage, on two ranks."""

import numpy as np
import pytest
import ranks

SIX = ("--engine.precision", "fp32", "--train.steps", "6")
STAGES = (0, 1, 2, 3)


@pytest.mark.faults
def test_compiled_runs_are_those_that_are_not(shards, tmp_path, tell):
    """Six steps with --engine.compile and without, fp32, two ranks, stages 0 to 3.

    Tap by tap at stage 0. Tolerance: other orders of sums.
    """
    commands = []
    for stage in STAGES:
        taps = ("--engine.tap_execution", "batched" if stage else "sequential")
        commands += [ranks.words(shards, tmp_path / f"plain_{stage}", stage, *SIX, *taps)]
        commands += [ranks.words(shards, tmp_path / f"compiled_{stage}", stage, *SIX, *taps, "--engine.compile")]
    ranks.run_all(2, commands, timeout=3000)
    worst = 0.0
    for stage in STAGES:
        for column in ("loss/total", "error/pixel/tap_02", "error/feature/tap_01", "beta/tap_01", "grad/norm"):
            compiled, plain = (np.array(ranks.column(tmp_path / f"{k}_{stage}", column)) for k in ("compiled", "plain"))
            assert len(compiled) == 6
            np.testing.assert_allclose(compiled, plain, rtol=2e-5, err_msg=f"{column} at stage {stage}")
            worst = max(worst, float(np.abs(compiled / plain - 1).max()))
    tell(f"the worst relative difference of losses, errors, betas and norms is {worst:.1e}")
