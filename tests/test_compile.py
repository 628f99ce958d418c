"""Compiled runs are the others, at each ZeRO stage, on two ranks."""

import numpy as np
import pytest
import ranks

SIX = ("--engine.precision", "fp32", "--train.steps", "6")
STAGES = (0, 1, 2, 3)


@pytest.mark.faults
def test_compiled_runs_are_those_that_are_not(shards, tmp_path):
    """fp32, two ranks; tap by tap at stage 0. Tolerance: other orders of sums."""
    commands = []
    for stage in STAGES:
        taps = ("--engine.taps", "batched" if stage else "sequential")
        commands += [ranks.words(shards, tmp_path / f"plain_{stage}", stage, *SIX, *taps)]
        commands += [ranks.words(shards, tmp_path / f"compiled_{stage}", stage, *SIX, *taps, "--engine.compile")]
    ranks.run_all(2, commands, timeout=3000)
    for stage in STAGES:
        for column in ("loss/total", "error/pixel/tap_02", "error/feature/tap_01", "beta/tap_01", "grad/norm"):
            of_both = [ranks.column(tmp_path / f"{kind}_{stage}", column) for kind in ("compiled", "plain")]
            assert len(of_both[0]) == 6
            np.testing.assert_allclose(*of_both, rtol=2e-5, err_msg=f"{column} at stage {stage}")
