"""Whole runs: ZeRO stages and rank counts agree, resumed runs are the unbroken ones, the betas are Adam's."""

import fcntl
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch

import ddae
from ddae.training.tracker import read_metrics

STAGES = (0, 1, 2, 3)
FP32 = ("--engine.precision", "fp32")


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """Every run that the tests below compare, by name; each set of ranks starts once."""
    folder = tmp_path_factory.mktemp("runs")
    twenty = ("--train.steps", "20")
    one = [ranks.words(shards, folder / "one_0", 0, *FP32, *twenty, "--train.report")]
    one += [ranks.words(shards, folder / "one_2", 2, *FP32, *twenty)]
    one += [ranks.words(shards, folder / "micro_2", 2, *FP32, *twenty)]  # overwritten below with a smaller micro-batch
    small = folder / "micro.json"
    small.write_text('{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 4}')
    one[2][one[2].index("--ds_config") + 1] = str(small)
    halves = folder / "halves.json"
    halves.write_text('{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1}')
    one += [ranks.words(shards, folder / "recompute", 0, *FP32, *twenty, "--engine.activation_checkpointing")]
    one += [ranks.words(shards, folder / "bf16", 2, *twenty)]
    one += [ranks.words(shards, folder / "autocast", 2, "--engine.precision", "autocast", *twenty)]
    one += [ranks.words(shards, folder / "long", 2, "--train.steps", "200", "--optim.clip_grad", "0.01")]
    one += [ranks.words(shards, folder / "mae", 1, "--feature.no_enabled", "--pixel.no_dynamic", *FP32, *twenty)]
    norm = ("--pixel.norm", "per_channel")
    for kernels in ("reference", "triton"):  # small, for the interpreter; two micro-batches a step
        for precision in ("fp32", "bf16"):
            what = ("--engine.loss_backend", kernels, "--engine.precision", precision, "--train.steps", "8", *norm)
            one += [ranks.words(shards, folder / f"{kernels}_{precision}", 2, *what, "--data.batch_size", "2")]
            one[-1][one[-1].index("--ds_config") + 1] = str(halves)
    offload = folder / "offload.json"
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    offload.write_text(json.dumps({"zero_optimization": zero, "train_micro_batch_size_per_gpu": 4}))
    two = [ranks.words(shards, folder / f"two_{stage}", stage, *FP32, *twenty) for stage in STAGES]
    two += [ranks.words(shards, folder / f"two_bf16_{stage}", stage, *twenty) for stage in STAGES]
    two += [ranks.words(shards, folder / "two_recompute", 3, *FP32, *twenty, "--engine.activation_checkpointing")]
    two += [ranks.words(shards, folder / "offload_micro", 2, *FP32, *twenty)]
    two[-1][two[-1].index("--ds_config") + 1] = str(offload)
    two += [ranks.words(shards, folder / "dali", 3, *FP32, *twenty, "--train.report", "--data.backend", "dali")]
    for count, commands in ((1, one), (2, two)):
        (folder / f"said_{count}.txt").write_text(ranks.run_all(count, commands))
    resumed = []
    for name in (f"{precision}_{stage}" for precision in ("two", "two_bf16") for stage in STAGES):
        shutil.copytree(folder / name, folder / f"resumed_{name}")  # as it was after step 12
        shutil.rmtree(folder / f"resumed_{name}" / "checkpoints" / "step_00000020")
        (folder / f"resumed_{name}" / "finished.json").unlink()
        command = two[len(resumed)]
        resumed.append([f"{folder}/resumed_{name}" if word == f"{folder / name}" else word for word in command])
    ranks.run_all(2, resumed)
    return folder


def agree(runs, name, other, tolerance):
    for column in ("loss/total", "error/pixel/tap_02", "error/feature/tap_01", "beta/tap_01"):
        np.testing.assert_allclose(
            ranks.column(runs / name, column), ranks.column(runs / other, column), rtol=tolerance
        )


@pytest.mark.parametrize(
    "name", ["one_2", "micro_2", "offload_micro", "two_0", "two_1", "two_2", "two_3", "recompute", "two_recompute"]
)
def test_stages_ranks_and_accumulation_agree_in_fp32(runs, name):
    assert len(ranks.column(runs / name)) == 20
    agree(runs, name, "one_0", 1e-6)


@pytest.mark.parametrize("name", ["bf16", *(f"two_bf16_{s}" for s in STAGES), "autocast"])
def test_bf16_stays_near_fp32(runs, name):
    agree(runs, name, "one_0", 0.03)
    assert ranks.column(runs / name) != ranks.column(runs / "one_0")


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_stages_agree_in_bf16(runs, stage):
    agree(runs, f"two_bf16_{stage}", "two_bf16_2", 0.005)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 5e-3)])
def test_reference_and_triton_give_the_same_curve(runs, precision, tolerance):
    """Eight steps; per-patch normalised pixels, features standardised on both sides, betas that learn."""
    for column in ("loss/total", "error/pixel/tap_02", "error/feature/tap_01", "beta/tap_01"):
        curves = [ranks.column(runs / f"{kernels}_{precision}", column) for kernels in ("reference", "triton")]
        assert len(curves[0]) == 8
        assert column != "error/feature/tap_01" or curves[0] != curves[1]  # they are two implementations
        np.testing.assert_allclose(*curves, rtol=tolerance)


def test_backward_finds_nothing_to_scale(runs):
    """Tap weights, ramp and accumulation stand within the loss: its upstream gradient is 1, in fp32 and in bf16."""
    assert "upstream gradients of Triton's losses: [1.0]" in (runs / "said_1.txt").read_text()


def test_dali_feeds_a_run_as_pillow_does(runs):
    """Two ranks at stage 3, up to the report; the decoders differ by a level here and there."""
    agree(runs, "dali", "one_0", 0.01)
    assert (runs / "dali" / "report.html").exists()


def test_the_loss_falls(runs):
    errors = ranks.column(runs / "long", "error/pixel/tap_02")
    assert np.mean(errors[-20:]) < 0.8 * errors[0]


def test_logged_beta_gradients_are_what_adam_was_given(runs):
    """200 steps of a clipped bf16 run, replayed in float64 from the log."""
    rows = ranks.metrics(runs / "long")
    assert len(rows) == 200
    for tap in ("tap_01", "tap_02"):
        value, first, second = rows[0][f"beta/{tap}"], 0.0, 0.0
        for step, row in enumerate(rows, 1):
            assert row[f"beta/{tap}"] == pytest.approx(value, abs=1e-6)
            gradient = row[f"grad/beta/{tap}"]
            first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
            lr = 4 * row["lr"]
            value -= lr * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.95**step)) + 1e-8)
        assert abs(value - rows[0][f"beta/{tap}"]) > 0.1


@pytest.mark.parametrize("name", [f"{precision}_{stage}" for precision in ("two", "two_bf16") for stage in STAGES])
def test_a_resumed_run_is_the_unbroken_one(runs, name):
    """Bit for bit, from step 12 on: every metric but the times."""
    whole, resumed = ranks.metrics(runs / name), ranks.metrics(runs / f"resumed_{name}")
    assert [row["step"] for row in resumed] == list(range(1, 21))
    assert resumed[12]["time/step"] != whole[12]["time/step"]  # it did run again
    for a, b in zip(whole, resumed, strict=True):
        same = [key for key in a if not key.startswith(("time/", "throughput/", "system/"))]
        assert {key: a[key] for key in same} == {key: b[key] for key in same}


@pytest.mark.parametrize("number, told", [(signal.SIGTERM, "one"), (signal.SIGUSR1, "all")])
def test_told_to_stop_all_ranks_leave_and_the_run_goes_on(number, told, shards, tmp_path):
    options = (*FP32, "--train.steps", "400", "--train.save_every", "400", "--data.workers", "1")
    command = ranks.words(shards, tmp_path / "run", 2, *options)
    forks = ranks.forks()
    stopped = forks.start(["launch/pretrain.py", *command], 2)
    wait_for_rows(tmp_path / "run", 5)
    for rank in stopped if told == "all" else stopped[1:]:
        os.kill(rank, number)
    assert forks.wait_all(stopped, 60) == [75, 75], forks.log()
    note = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert note["reason"] == number.name
    assert f"stopped after {note['step']} steps ({number.name})" in forks.log()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == [f"step_{note['step']:08d}"]
    assert 5 <= note["step"] == len(ranks.column(tmp_path / "run")) < 400


def wait_for_rows(run, count):
    """Until a run has logged so many steps."""
    deadline = time.monotonic() + 120
    while len(read_metrics(run / "metrics.jsonl")) < count:
        assert time.monotonic() < deadline, ranks.forks().log()
        time.sleep(0.02)


POISON = """
import json, sys
from ddae import train
from ddae.config.cli import parse
from ddae.distributed.comm import configure_logging, rank
from ddae.distributed.engine import stop_process_group
configure_logging()
class Poisoned(train.ForwardPass):
    def __call__(self, *inputs):
        losses = super().__call__(*inputs)
        calls[0] += 1
        lost = calls[0] in bad and rank() == 1
        return losses._replace(total=losses.total * float("nan")) if lost else losses
train.ForwardPass = Poisoned
for line in json.loads(sys.argv[1]):
    calls, name = [0], line[line.index("--run_dir") + 1]
    bad = {6} if "/once" in name else {6, 7, 8} if name.endswith("thrice") else set()
    try:
        train.pretrain(parse(line))
    except RuntimeError as error:
        print(error)
stop_process_group()
"""


@pytest.mark.parametrize(
    "cases",
    [
        [(0, "fp32"), (2, "bf16")],
        pytest.param([(s, p) for s in STAGES for p in ("fp32", "bf16", "autocast")], marks=pytest.mark.faults),
    ],
    ids=["two of them", "all"],
)
def test_a_gradient_that_is_no_number_updates_nothing(cases, shards, tmp_path, tell):
    """A loss that is no number on one of two ranks, ZeRO stages and precisions; then three in a row."""
    options = ("--train.steps", "10")
    runs = [
        ranks.words(shards, tmp_path / f"once_{stage}_{precision}", stage, "--engine.precision", precision, *options)
        for stage, precision in cases
    ]
    runs += [ranks.words(shards, tmp_path / "once_clipped", 0, *FP32, *options, "--optim.clip_grad", "3")]
    runs += [ranks.words(shards, tmp_path / "thrice", 0, *FP32, *options)]
    runs += [ranks.words(shards, tmp_path / "wild", 3, *FP32, *options, "--optim.lr", "1e36", "--train.seed", "1")]
    forks = ranks.forks()
    assert forks.wait_all(forks.start(["-c", POISON, json.dumps(runs)], 2), 600) == [0, 0], forks.log()
    said = forks.log()
    for name in [*("{}_{}".format(*case) for case in cases), "clipped"]:
        rows = ranks.metrics(tmp_path / f"once_{name}")
        assert len(rows) == 10
        losses = [row["loss/total"] for row in rows]
        assert np.isnan(losses[5])
        assert [row["loss/spike"] for row in rows] == [0.0] * 5 + [1.0] + [0.0] * 4
        assert np.isfinite(losses[:5] + losses[6:]).all()
        assert rows[5]["beta/tap_01"] == rows[6]["beta/tap_01"] != rows[7]["beta/tap_01"]
    assert said.count("skipped: non-finite gradients in 1 consecutive steps") == len(cases) + 3
    assert re.search(r"non-finite gradients in 3 consecutive steps, up to step 8\. .*train-\d+.tar:s\d+", said)
    assert not list((tmp_path / "thrice" / "checkpoints").glob("*"))
    check_dumps(tmp_path, said)
    tell(f"left out on both in {len(cases)} of {len(cases)} settings, no beta moved; the third in a row left a dump")


def check_dumps(folder, said):
    """The poisoned run's weights are sound, and so is its replay; the wild one's are not, and it shows where."""
    (sound,), (wild,) = ((folder / name / "dumps").glob("step_*") for name in ("thrice", "wild"))
    assert f"python launch/replay.py {sound}" in said
    told = {}
    for dump, code in ((sound, 0), (wild, 1)):
        found, told[dump] = ranks.run_command("launch/replay.py", str(dump))
        assert found == code, told[dump]
    for rank in (0, 1):
        noted = json.loads((sound / f"layers_{rank:05d}.json").read_text())
        assert len(noted["samples"]) == 8
        assert f"rank {rank:05d}: largest absolute values" in told[sound]
    for line in told[sound].splitlines():
        if line.startswith(("encoder.", "branches.")):
            again, in_the_run = (float(cell) for cell in line.split()[1:3])
            assert again == pytest.approx(in_the_run, rel=1e-3), line
    assert told[sound].count("with a non-finite output: none") == 2
    assert told[sound].count("samples with a non-finite loss: none") == 2
    assert "<-- non-finite" in told[wild]
    assert re.search(r"with a non-finite output: encoder\.\S+\nsamples with a non-finite loss: \S+tar:s\d+", told[wild])


def test_a_folder_that_is_no_dump_is_told(tmp_path):
    code, said = ranks.run_command("launch/replay.py", str(tmp_path))
    assert code == 2
    assert f"replay: {tmp_path} is not a dump: config.json is missing." in said


def test_a_folder_that_another_process_trains_in_is_refused(shards, tmp_path):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        held.write("process 7 on node1\n")
        held.flush()
        command = ranks.words(shards, tmp_path / "run", 0, *FP32, "--train.steps", "2")
        forks = ranks.forks()
        code = forks.wait(*forks.start(["launch/pretrain.py", *command]), 120)
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{forks.ports[-1]}_*"))  # by itself
    assert code == 2
    assert "process 7 on node1 trains there" in forks.log()
    assert "Traceback" not in forks.log()


@pytest.mark.reliability
def test_a_disk_that_is_full_once_does_not_end_the_run(shards, tmp_path, tell):
    """A disk that is full at one save (a limit on the size of files stands in for it)."""
    options = (*FP32, "--train.steps", "3", "--train.save_every", "1")
    program = (
        "import resource, sys; from ddae.distributed.checkpoint import Checkpoints; from ddae.config.cli import parse\n"
        "from ddae.distributed.engine import stop_process_group; from ddae.train import pretrain\n"
        "save, whole = Checkpoints.save, resource.RLIM_INFINITY\n"
        "def limited(self, step, *more, **facts):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if step == 1 else whole, whole))\n"
        "    done = save(self, step, *more, **facts)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (whole, whole))\n"
        "    return done\n"
        "Checkpoints.save = limited\n"
        "pretrain(parse(sys.argv[1:])); stop_process_group()"
    )
    code, said = ranks.run_command("-c", program, *ranks.words(shards, tmp_path / "run", 2, *options))
    assert code == 0, said
    assert re.search("checkpoint of step 1 failed: .*File too large.*Training continues", said)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["latest", "step_00000002", "step_00000003"]
    tell("told, its remains removed; the run went on, and saved at the next interval")


def test_a_run_extended_and_killed_before_its_end_is_not_complete(runs, shards, tmp_path):
    """The export and the report of the shorter run do not stand for the longer one."""
    shutil.copytree(runs / "one_0", tmp_path / "run")
    command = ranks.words(
        shards, tmp_path / "run", 0, *FP32, "--train.report", "--train.allow_longer", "--train.steps", "24"
    )
    (tmp_path / "run" / "checkpoints" / "step_00000099").mkdir()  # broken, and beyond
    said = ranks.run_all(1, [command])
    assert "skipping checkpoint" in said
    assert "steps 20 to 24" in said
    finished = tmp_path / "run" / "finished.json"
    finished.write_text('{"steps": 20}')  # as a kill between the last checkpoint and the export leaves it
    exported = (tmp_path / "run" / "encoder" / "encoder.safetensors").stat().st_mtime_ns
    assert "is complete" not in ranks.run_all(1, [command])
    assert (tmp_path / "run" / "encoder" / "encoder.safetensors").stat().st_mtime_ns > exported
    assert "is complete" in ranks.run_all(1, [command])


def test_mae_has_neither_teacher_nor_betas(runs):
    row = ranks.metrics(runs / "mae")[-1]
    assert not [name for name in row if "beta" in name or "feature/" in name]


def test_the_export_is_the_student(runs):
    encoders = [ddae.load_encoder(runs / name) for name in ("one_0", "two_1", "two_2", "two_3")]
    images = torch.rand(2, 3, 32, 32)
    outputs = [encoder(images) for encoder in encoders]
    assert outputs[0].shape == (2, 17, 32)
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-4)
    assert encoders[0].features(images, [1])[0].shape == (2, 17, 32)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--optim.lr", "0.5"], "was started with optim.lr = 0.003, not 0.5"),
        (["--train.steps", "40"], "Pass --train.allow_longer for a longer run"),
        (["--data.batch_size", "8"], "was started with data.batch_size = 16"),
        (["--train.steps", "10", "--train.allow_longer"], "choose another --run_dir for a shorter one"),
    ],
)
def test_another_config_is_refused(runs, shards, words, message):
    command = [*ranks.words(shards, runs / "one_0", 0, *FP32, "--train.steps", "20", "--train.report"), *words]
    before = {path: path.stat().st_mtime_ns for path in (runs / "one_0").rglob("*")}
    code, said = ranks.run_command("launch/pretrain.py", *command)
    assert code == 2
    assert message in said
    assert before == {path: path.stat().st_mtime_ns for path in (runs / "one_0").rglob("*")}


def test_a_run_leaves_its_report(runs):
    page = (runs / "one_0" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)  # nothing is fetched
    assert "Training images (left)" in page  # there are no held-out ones here
    for name in ("config.json", "ds_config.json", "environment.json", "figures/reconstructions.png"):
        assert (runs / "one_0" / name).exists()


def test_kill_9_changes_nothing(shards, tmp_path):
    """Killed in mid-run, at no special place, the same command goes on: every loss equals the unbroken run's."""
    options = (*FP32, "--train.steps", "60", "--train.save_every", "10", "--data.workers", "1", "--train.report")
    command = ["launch/pretrain.py", *ranks.words(shards, tmp_path / "killed", 2, *options)]
    forks = ranks.forks()
    (killed,) = forks.start(command)
    wait_for_rows(tmp_path / "killed", 25)
    os.kill(killed, signal.SIGKILL)
    assert forks.wait(killed) == -signal.SIGKILL
    before = len(ranks.column(tmp_path / "killed"))
    assert before < 60
    said = ranks.run_all(1, [command[1:], ranks.words(shards, tmp_path / "whole", 2, *options), command[1:]])
    assert f"steps {before // 10 * 10} to 60" in said or f"steps {before // 10 * 10 - 10} to 60" in said
    assert "is complete: 60 of 60 steps" in said
    assert ranks.column(tmp_path / "killed") == ranks.column(tmp_path / "whole")
    assert ranks.column(tmp_path / "killed", "beta/tap_02") == ranks.column(tmp_path / "whole", "beta/tap_02")
