"""Other ranks, other stages, other accumulation, other times to stop: one curve. Long: make test-faults."""

import json
import shutil

import numpy as np
import pytest
import ranks

FP32 = ("--engine.precision", "fp32")
COLUMNS = ("loss/total", "error/pixel/tap_02", "error/feature/tap_01", "beta/tap_01", "grad/beta/tap_02")
pytestmark = pytest.mark.faults


def apart(one, other, columns=COLUMNS):
    """The largest relative difference of two runs' curves."""
    worst = 0.0
    for name in columns:
        a, b = np.array(ranks.column(one, name)), np.array(ranks.column(other, name))
        assert a.shape == b.shape
        worst = max(worst, float(np.abs(a / b - 1).max()))
    return worst


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("elastic")


@pytest.fixture(scope="module")
def curves(shards, folder):
    """Twenty steps at every stage by 1, 2 and 4 ranks, and by one rank in four micro-batches of four."""
    for count in (1, 2, 4):
        runs = [
            ranks.arguments(shards, folder / f"{count}_{stage}", stage, *FP32, "--train.steps", "20") for stage in range(4)
        ]
        if count == 1:
            for stage in range(4):
                settings = json.loads((ranks.ROOT / "ds_configs" / f"zero{stage}.json").read_text())
                (folder / f"{stage}.json").write_text(json.dumps(settings | {"train_micro_batch_size_per_gpu": 4}))
                words = ranks.arguments(shards, folder / f"micro_{stage}", stage, *FP32, "--train.steps", "20")
                words[words.index("--ds_config") + 1] = str(folder / f"{stage}.json")
                runs.append([*words, "--optim.clip_grad", "1"])
            runs.append(
                [*ranks.arguments(shards, folder / "clipped", 0, *FP32, "--train.steps", "20"), "--optim.clip_grad", "1"]
            )
        ranks.run_all(count, runs)
    return folder


def test_one_curve_at_every_stage_by_any_ranks(curves, record_result):
    """Losses of 20 steps in fp32, ZeRO stages 0 to 3 on 1, 2 and 4 ranks."""
    found = {
        (count, stage): apart(curves / f"{count}_{stage}", curves / "1_0") for count in (1, 2, 4) for stage in range(4)
    }
    assert max(found.values()) < 1e-6, found
    record_result(f"largest relative difference {max(found.values()):.1e}")


def test_one_curve_in_any_micro_batches(curves, record_result):
    """Losses with one micro-batch of 16 and four of 4, gradient clipping, ZeRO stages 0 to 3."""
    found = {stage: apart(curves / f"micro_{stage}", curves / "clipped") for stage in range(4)}
    assert max(found.values()) < 1e-6, found
    record_result(f"largest relative difference {max(found.values()):.1e}")


def test_ranks_come_and_go(shards, folder, record_result):
    """Losses on 2 ranks, then 1, 4 and 2 again, resumed each time, each at another ZeRO stage."""
    words = [
        *ranks.arguments(shards, folder / "chain", 2, *FP32, "--train.steps", "32"),
        *("--train.save_every", "8", "--train.keep", "9"),
    ]
    ranks.run_all(2, [words])
    shutil.copytree(folder / "chain", folder / "unbroken")
    for number, (count, stage) in enumerate(((1, 0), (4, 3), (2, 1)), 1):
        for step in range(8 * number + 8, 40, 8):
            shutil.rmtree(folder / "chain" / "checkpoints" / f"step_{step:08d}")
        (folder / "chain" / "finished.json").unlink()
        words[words.index("--ds_config") + 1] = str(ranks.ROOT / "ds_configs" / f"zero{stage}.json")
        assert f"steps {8 * number} to 32" in ranks.run_all(count, [words])
    difference = apart(folder / "chain", folder / "unbroken")
    assert difference < 1e-6
    record_result(f"largest relative difference to 2 ranks throughout {difference:.1e}")


def test_resumed_at_an_epochs_end(shards, folder, record_result):
    """Resume after a kill at the end of an epoch, ZeRO stages 0 to 3, fp32 and bf16."""
    cases = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
    runs = []
    for stage, precision in cases:
        options = ("--data.batch_size", "20", "--train.steps", "15", "--train.save_every", "5")
        runs.append(
            ranks.arguments(shards, folder / f"end_{stage}_{precision}", stage, "--engine.precision", precision, *options)
        )
    ranks.run_all(2, runs)
    for case, words in zip(cases, runs, strict=True):
        whole = folder / "end_{}_{}".format(*case)
        resumed = folder / "again_{}_{}".format(*case)
        shutil.copytree(whole, resumed)
        shutil.rmtree(resumed / "checkpoints" / "step_00000015")
        (resumed / "finished.json").unlink()
        words[words.index("--run_dir") + 1] = str(resumed)
    assert ranks.run_all(2, runs).count("steps 10 to 15") == len(cases)
    for case in cases:
        whole, resumed = folder / "end_{}_{}".format(*case), folder / "again_{}_{}".format(*case)
        for name in COLUMNS:
            assert ranks.column(whole, name) == ranks.column(resumed, name), case
    record_result("every later loss, error, beta and gradient is bitwise equal")
