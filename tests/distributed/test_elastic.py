"""Rank counts, ZeRO stages, gradient accumulation and resumed runs give the same curve. Long: make test-faults."""

import json
import shutil

import numpy as np
import pytest
import ranks

FP32 = ("--engine.precision", "fp32")
COLUMNS = ("loss/total", "error/pixel/tap_02", "error/feature/tap_01", "beta/tap_01", "grad/beta/tap_02")
pytestmark = pytest.mark.faults


def difference(run, other):
    """Return the largest relative difference of two runs' curves."""
    largest = 0.0
    for name in COLUMNS:
        a, b = np.array(ranks.column(run, name)), np.array(ranks.column(other, name))
        assert a.shape == b.shape
        largest = max(largest, float(np.abs(a / b - 1).max()))
    return largest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("elastic")


@pytest.fixture(scope="module")
def curves(shards, folder):
    """Train 20 steps at every stage on 1, 2 and 4 ranks, and on one rank with four micro-batches of 4 images."""
    for count in (1, 2, 4):
        options = (*FP32, "--train.steps", "20")
        runs = [ranks.arguments(shards, folder / f"{count}_{stage}", stage, *options) for stage in range(4)]
        if count == 1:
            options = (*options, "--optim.clip_grad", "1")
            for stage in range(4):
                ds_json = json.loads((ranks.ROOT / "ds_configs" / f"zero{stage}.json").read_text())
                file = folder / f"{stage}.json"
                file.write_text(json.dumps(ds_json | {"train_micro_batch_size_per_gpu": 4}))
                micro = (*options, "--ds_config", str(file))
                runs.append(ranks.arguments(shards, folder / f"micro_{stage}", stage, *micro))
            runs.append(ranks.arguments(shards, folder / "clipped", 0, *options))
        ranks.run_all(count, runs)
    return folder


def test_rank_counts_and_stages_give_one_curve(curves, record_result):
    """Losses of 20 steps in fp32, ZeRO stages 0 to 3 on 1, 2 and 4 ranks."""
    differences = {
        (count, stage): difference(curves / f"{count}_{stage}", curves / "1_0")
        for count in (1, 2, 4)
        for stage in range(4)
    }
    assert max(differences.values()) < 1e-6, differences
    record_result(f"largest relative difference {max(differences.values()):.1e}")


def test_gradient_accumulation_gives_the_same_curve(curves, record_result):
    """Losses with one micro-batch of 16 and four of 4, gradient clipping, ZeRO stages 0 to 3."""
    differences = {stage: difference(curves / f"micro_{stage}", curves / "clipped") for stage in range(4)}
    assert max(differences.values()) < 1e-6, differences
    record_result(f"largest relative difference {max(differences.values()):.1e}")


def test_resuming_on_other_rank_counts_and_stages(shards, folder, record_result):
    """Losses on 2 ranks, then 1, 4 and 2 again, resumed each time, each at another ZeRO stage."""
    options = (*FP32, "--train.steps", "32", "--train.save_every", "8", "--train.keep", "9")
    args = ranks.arguments(shards, folder / "chain", 2, *options)
    ranks.run_all(2, [args])
    shutil.copytree(folder / "chain", folder / "uninterrupted")
    for number, (count, stage) in enumerate(((1, 0), (4, 3), (2, 1)), 1):
        for step in range(8 * number + 8, 40, 8):
            shutil.rmtree(folder / "chain" / "checkpoints" / f"step_{step:08d}")
        (folder / "chain" / "finished.json").unlink()
        args = ranks.arguments(shards, folder / "chain", stage, *options)
        assert f"steps {8 * number} to 32" in ranks.run_all(count, [args])
    largest = difference(folder / "chain", folder / "uninterrupted")
    assert largest < 1e-6
    record_result(f"largest relative difference to 2 ranks throughout {largest:.1e}")


def test_resuming_at_the_end_of_an_epoch(shards, folder, record_result):
    """Resume after a kill at the end of an epoch, ZeRO stages 0 to 3, fp32 and bf16."""
    cases = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
    runs = []
    for stage, precision in cases:
        options = ("--data.batch_size", "20", "--train.steps", "15", "--train.save_every", "5")
        runs.append(
            ranks.arguments(
                shards, folder / f"end_{stage}_{precision}", stage, "--engine.precision", precision, *options
            )
        )
    ranks.run_all(2, runs)
    for case, args in zip(cases, runs, strict=True):
        uninterrupted = folder / "end_{}_{}".format(*case)
        resumed = folder / "again_{}_{}".format(*case)
        shutil.copytree(uninterrupted, resumed)
        shutil.rmtree(resumed / "checkpoints" / "step_00000015")
        (resumed / "finished.json").unlink()
        args[args.index("--run_dir") + 1] = str(resumed)
    assert ranks.run_all(2, runs).count("steps 10 to 15") == len(cases)
    for case in cases:
        uninterrupted, resumed = folder / "end_{}_{}".format(*case), folder / "again_{}_{}".format(*case)
        for name in COLUMNS:
            assert ranks.column(uninterrupted, name) == ranks.column(resumed, name), case
    record_result("every later loss, error, beta and gradient is bitwise equal")
