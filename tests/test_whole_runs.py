"""Whole runs: equal curves at all ZeRO stages and rank counts, exact resume, signals, non-finite gradients, reports."""

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
COLUMNS = ("loss/total", "error/pixel/tap_02", "error/feature/tap_01", "beta/tap_01")
TWO_RANKS = {"two": ("fp32", (1, 3)), "two_bf16": ("bf16", STAGES)}  # test_golden.py has the other stages in fp32
RESUMED = [f"{name}_{stage}" for name, (_, stages) in TWO_RANKS.items() for stage in stages]


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """Return the folder of all runs that the tests below compare, by name; each set of ranks starts once."""
    folder = tmp_path_factory.mktemp("runs")
    steps, recompute = ("--train.steps", "20"), "--engine.activation_checkpointing"

    def command(name, stage, *options):
        return ranks.arguments(shards, folder / name, stage, *options)

    def stage_2(file, micro_batch, **zero):
        """Return the arguments for a DeepSpeed JSON of ZeRO stage 2; later arguments override earlier ones."""
        ds_json = {"zero_optimization": {"stage": 2} | zero, "train_micro_batch_size_per_gpu": micro_batch}
        (folder / file).write_text(json.dumps(ds_json))
        return "--ds_config", str(folder / file)

    micro_4, micro_1 = stage_2("micro_4.json", 4), stage_2("micro_1.json", 1)
    offload = stage_2("offload.json", 4, offload_optimizer={"device": "cpu"})
    one = [
        command("one_0", 0, *FP32, *steps, "--train.report"),
        command("one_2", 2, *FP32, *steps),
        command("micro_2", 2, *FP32, *steps, *micro_4),
        command("recompute", 0, *FP32, *steps, recompute),
        command("bf16", 2, *steps),
        command("autocast", 2, "--engine.precision", "autocast", *steps),
        command("long", 2, "--train.steps", "200", "--optim.clip_grad", "0.01"),
        command("mae", 1, "--feature.no_enabled", "--pixel.no_dynamic", *FP32, *steps),
    ]
    parts = ("--taps_per_step", "1", "--decode_fraction", "0.4")
    one += [command("parts_one", 0, *FP32, *steps, *parts)]
    small = (
        "--train.steps",
        "8",
        "--pixel.norm",
        "per_channel",
        "--data.batch_size",
        "2",
    )  # Triton's interpreter is slow
    for backend in ("reference", "triton"):
        for precision in ("fp32", "bf16"):
            options = ("--engine.loss_backend", backend, "--engine.precision", precision)
            one.append(command(f"{backend}_{precision}", 2, *options, *small, *micro_1))
    two = [
        command(f"{name}_{stage}", stage, "--engine.precision", precision, *steps)
        for name, (precision, stages) in TWO_RANKS.items()
        for stage in stages
    ]
    two += [
        command("parts_two", 3, *FP32, *steps, *parts),
        command("two_recompute", 3, *FP32, *steps, recompute),
        command("offload_micro", 2, *FP32, *steps, *offload),
        command("dali", 3, *FP32, *steps, "--train.report", "--data.backend", "dali"),
    ]
    for count, commands in ((1, one), (2, two)):
        (folder / f"output_{count}.txt").write_text(ranks.run_all(count, commands))
    resumed = []
    for name, args in zip(RESUMED, two[: len(RESUMED)], strict=True):
        copy = folder / f"resumed_{name}"  # as if killed after the checkpoint of step 12
        shutil.copytree(folder / name, copy)
        shutil.rmtree(copy / "checkpoints" / "step_00000020")
        (copy / "finished.json").unlink()
        resumed.append([*args, "--run_dir", str(copy)])
    ranks.run_all(2, resumed)
    return folder


def assert_same_curves(runs, name, other, tolerance):
    for column in COLUMNS:
        np.testing.assert_allclose(
            ranks.column(runs / name, column), ranks.column(runs / other, column), rtol=tolerance
        )


@pytest.mark.parametrize("name", ["one_2", "micro_2", "offload_micro", "two_1", "two_3", "recompute", "two_recompute"])
def test_stages_ranks_and_accumulation_give_one_curve_in_fp32(runs, name):
    assert len(ranks.column(runs / name)) == 20
    assert_same_curves(runs, name, "one_0", 1e-6)


def test_random_taps_and_patches_do_not_depend_on_ranks(runs):
    """All ranks draw the taps of a step, and a sample's patches, alike; taps that are not drawn are not logged."""
    one, two = (
        [row for row in ranks.metrics(runs / f"parts_{name}") if "loss/total" in row] for name in ("one", "two")
    )
    supervised = [[name for name in row if name.startswith(("loss/pixel", "loss/feature"))] for row in one]
    assert supervised == [[name for name in row if name.startswith(("loss/pixel", "loss/feature"))] for row in two]
    assert {len(names) for names in supervised} == {2}  # one tap of each branch
    assert len({tuple(names) for names in supervised}) == 2
    for row, other in zip(one, two, strict=True):
        for name in ("loss/total", "beta/tap_01", "beta/tap_02"):
            np.testing.assert_allclose(row[name], other[name], rtol=1e-6)


@pytest.mark.parametrize("name", ["bf16", *(f"two_bf16_{stage}" for stage in STAGES), "autocast"])
def test_bf16_is_close_to_fp32(runs, name):
    assert_same_curves(runs, name, "one_0", 0.03)
    assert ranks.column(runs / name) != ranks.column(runs / "one_0")


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_stages_give_one_curve_in_bf16(runs, stage):
    assert_same_curves(runs, f"two_bf16_{stage}", "two_bf16_2", 0.005)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 5e-3)])
def test_reference_and_triton_give_the_same_curve(runs, precision, tolerance):
    """Eight steps with per-patch pixel normalisation, standardised features and learned betas."""
    for column in COLUMNS:
        curves = [ranks.column(runs / f"{backend}_{precision}", column) for backend in ("reference", "triton")]
        assert len(curves[0]) == 8
        assert column != "error/feature/tap_01" or curves[0] != curves[1]  # two implementations: not bitwise equal
        np.testing.assert_allclose(*curves, rtol=tolerance)


def test_upstream_gradients_of_triton_losses_are_1(runs):
    """Tap weights, feature weight and accumulation are inside the loss, so its gradients need no scaling afterwards."""
    assert "upstream gradients of Triton's losses: [1.0]" in (runs / "output_1.txt").read_text()


def test_dali_gives_the_curve_of_pillow(runs):
    """Two ranks at stage 3, up to the report. Single pixels of the two JPEG decoders differ by one level of 255."""
    assert_same_curves(runs, "dali", "one_0", 0.01)
    assert (runs / "dali" / "report.html").exists()


def test_the_loss_decreases(runs):
    errors = ranks.column(runs / "long", "error/pixel/tap_02")
    assert np.mean(errors[-20:]) < 0.8 * errors[0]


def test_logged_betas_are_adam_applied_to_logged_gradients(runs):
    """200 steps of a clipped bf16 run, recomputed in float64 from the log."""
    rows = ranks.metrics(runs / "long")
    assert len(rows) == 200
    for tap in ("tap_01", "tap_02"):
        value, first, second = rows[0][f"beta/{tap}"], 0.0, 0.0
        for step, row in enumerate(rows, 1):
            assert row[f"beta/{tap}"] == pytest.approx(value, abs=3e-6)  # fp32 over 200 steps
            gradient = row[f"grad/beta/{tap}"]
            first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
            lr = 4 * row["lr"]
            value -= lr * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.95**step)) + 1e-8)
        assert abs(value - rows[0][f"beta/{tap}"]) > 0.1


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one(runs, name):
    """Bitwise, from step 12 on: every metric except times."""
    uninterrupted, resumed = ranks.metrics(runs / name), ranks.metrics(runs / f"resumed_{name}")
    assert [row["step"] for row in resumed] == list(range(1, 21))
    assert resumed[12]["time/step"] != uninterrupted[12]["time/step"]  # recomputed, not copied
    for a, b in zip(uninterrupted, resumed, strict=True):
        compared = [key for key in a if not key.startswith(("time/", "throughput/", "system/"))]
        assert {key: a[key] for key in compared} == {key: b[key] for key in compared}


@pytest.mark.parametrize("number, receivers", [(signal.SIGTERM, "one"), (signal.SIGUSR1, "all")])
def test_after_a_signal_all_ranks_save_and_exit(number, receivers, shards, tmp_path):
    options = (*FP32, "--train.steps", "400", "--train.save_every", "400", "--data.workers", "1")
    command = ranks.arguments(shards, tmp_path / "run", 2, *options)
    forks = ranks.forks()
    processes = forks.start(["launch/pretrain.py", *command], 2)
    wait_for_rows(tmp_path / "run", 5)
    for rank in processes if receivers == "all" else processes[1:]:
        os.kill(rank, number)
    assert forks.wait_all(processes, 60) == [75, 75], forks.log()
    note = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert note["reason"] == number.name
    assert f"stopped after {note['step']} steps ({number.name})" in forks.log()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == [f"step_{note['step']:08d}"]
    assert 5 <= note["step"] == len(ranks.column(tmp_path / "run")) < 400


def wait_for_rows(run, count):
    """Wait until a run has logged `count` steps."""
    deadline = time.monotonic() + 120
    while len(read_metrics(run / "metrics.jsonl")) < count:
        assert time.monotonic() < deadline, ranks.forks().log()
        time.sleep(0.02)


POISON = """
import json, sys
from ddae import train
from ddae.config.cli import parse
from ddae.distributed.comm import rank
from ddae.distributed.logs import configure_logging
from ddae.distributed.engine import stop_process_group
configure_logging()
class Poisoned(train.ForwardPass):
    def __call__(self, *inputs, **options):
        losses = super().__call__(*inputs, **options)
        calls[0] += 1
        if calls[0] in bad and rank() == 1:
            return losses._replace(total=losses.total * float("nan"))
        return losses
train.ForwardPass = Poisoned
for args in json.loads(sys.argv[1]):
    calls, name = [0], args[args.index("--run_dir") + 1]
    bad = {6} if "/once" in name else {6, 7, 8} if name.endswith("thrice") else set()
    try:
        train.pretrain(parse(args))
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
    ids=["two", "all"],
)
def test_non_finite_gradients_are_not_applied(cases, shards, tmp_path, record_result):
    """A non-finite loss on one of two ranks, at each ZeRO stage and precision; then in three consecutive steps."""
    options = ("--train.steps", "10")
    runs = [
        ranks.arguments(
            shards, tmp_path / f"once_{stage}_{precision}", stage, "--engine.precision", precision, *options
        )
        for stage, precision in cases
    ]
    runs += [ranks.arguments(shards, tmp_path / "once_clipped", 0, *FP32, *options, "--optim.clip_grad", "3")]
    runs += [ranks.arguments(shards, tmp_path / "thrice", 0, *FP32, *options)]
    runs += [
        ranks.arguments(shards, tmp_path / "diverged", 3, *FP32, *options, "--optim.lr", "1e36", "--train.seed", "1")
    ]
    forks = ranks.forks()
    assert forks.wait_all(forks.start(["-c", POISON, json.dumps(runs)], 2), 600) == [0, 0], forks.log()
    log = forks.log()
    for name in [*("{}_{}".format(*case) for case in cases), "clipped"]:
        rows = ranks.metrics(tmp_path / f"once_{name}")
        assert len(rows) == 10
        losses = [row["loss/total"] for row in rows]
        assert np.isnan(losses[5])
        assert [row["loss/spike"] for row in rows] == [0.0] * 5 + [1.0] + [0.0] * 4
        assert np.isfinite(losses[:5] + losses[6:]).all()
        assert rows[5]["beta/tap_01"] == rows[6]["beta/tap_01"] != rows[7]["beta/tap_01"]
    assert log.count("skipped: non-finite gradients in 1 consecutive steps") == len(cases) + 3
    assert re.search(r"non-finite gradients in 3 consecutive steps, up to step 8\. .*train-\d+.tar:s\d+", log)
    assert not list((tmp_path / "thrice" / "checkpoints").glob("*"))
    check_dumps(tmp_path, log)
    record_result(f"skipped on both in {len(cases)} of {len(cases)} settings, no beta changed; the third left a dump")


def check_dumps(folder, log):
    """Replay two dumps: one with finite weights reproduces the run's values, the diverged one shows the first layer."""
    (finite,), (diverged,) = ((folder / name / "dumps").glob("step_*") for name in ("thrice", "diverged"))
    assert f"python launch/replay.py {finite}" in log
    outputs = {}
    for dump, expected in ((finite, 0), (diverged, 1)):
        code, outputs[dump] = ranks.run_command("launch/replay.py", str(dump))
        assert code == expected, outputs[dump]
    for rank in (0, 1):
        recorded = json.loads((finite / f"layers_{rank:05d}.json").read_text())
        assert len(recorded["samples"]) == 8
        assert f"rank {rank:05d}: largest absolute values" in outputs[finite]
    for line in outputs[finite].splitlines():
        if line.startswith(("encoder.", "branches.")):
            replayed, in_the_run = (float(cell) for cell in line.split()[1:3])
            assert replayed == pytest.approx(in_the_run, rel=1e-3), line
    assert outputs[finite].count("with a non-finite output: none") == 2
    assert outputs[finite].count("samples with a non-finite loss: none") == 2
    assert "<-- non-finite" in outputs[diverged]
    first_layer_and_sample = r"with a non-finite output: encoder\.\S+\nsamples with a non-finite loss: \S+tar:s\d+"
    assert re.search(first_layer_and_sample, outputs[diverged])


def test_replay_refuses_a_folder_that_is_not_a_dump(tmp_path):
    code, output = ranks.run_command("launch/replay.py", str(tmp_path))
    assert code == 2
    assert f"replay: {tmp_path} is not a dump: config.json is missing." in output


def test_a_run_directory_in_use_is_refused(shards, tmp_path):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        lock.write("process 7 on node1\n")
        lock.flush()
        command = ranks.arguments(shards, tmp_path / "run", 0, *FP32, "--train.steps", "2")
        forks = ranks.forks()
        code = forks.wait(*forks.start(["launch/pretrain.py", *command]), 120)
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{forks.ports[-1]}_*"))
    assert code == 2
    assert "process 7 on node1 trains there" in forks.log()
    assert "Traceback" not in forks.log()


@pytest.mark.reliability
def test_training_continues_after_a_full_disk(shards, tmp_path, record_result):
    """A full disk at one save, simulated by a limit on file size."""
    options = (*FP32, "--train.steps", "3", "--train.save_every", "1")
    program = (
        "import resource, sys; from ddae.distributed.checkpoint import Checkpoints; from ddae.config.cli import parse\n"
        "from ddae.distributed.engine import stop_process_group; from ddae.train import pretrain\n"
        "save, unlimited = Checkpoints.save, resource.RLIM_INFINITY\n"
        "def limited(self, step, *more, **facts):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if step == 1 else unlimited, unlimited))\n"
        "    saved = save(self, step, *more, **facts)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))\n"
        "    return saved\n"
        "Checkpoints.save = limited\n"
        "pretrain(parse(sys.argv[1:])); stop_process_group()"
    )
    code, log = ranks.run_command("-c", program, *ranks.arguments(shards, tmp_path / "run", 2, *options))
    assert code == 0, log
    assert re.search("checkpoint of step 1 failed: .*File too large.*The next save retries", log)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["latest", "step_00000002", "step_00000003"]
    record_result("logged, and the partial files were removed; training continued, and the next save succeeded")


def test_a_longer_run_that_was_killed_before_its_export_is_not_complete(runs, shards, tmp_path):
    """The export and the report of the shorter run are replaced."""
    shutil.copytree(runs / "one_0", tmp_path / "run")
    command = ranks.arguments(
        shards, tmp_path / "run", 0, *FP32, "--train.report", "--train.allow_longer", "--train.steps", "24"
    )
    (tmp_path / "run" / "checkpoints" / "step_00000099").mkdir()  # damaged, and later
    log = ranks.run_all(1, [command])
    assert "skipping checkpoint" in log
    assert "steps 20 to 24" in log
    finished = tmp_path / "run" / "finished.json"
    finished.write_text('{"steps": 20}')  # as after a kill between the last checkpoint and the export
    exported = (tmp_path / "run" / "encoder" / "encoder.safetensors").stat().st_mtime_ns
    assert "is complete" not in ranks.run_all(1, [command])
    assert (tmp_path / "run" / "encoder" / "encoder.safetensors").stat().st_mtime_ns > exported
    assert "is complete" in ranks.run_all(1, [command])


def test_mae_logs_neither_betas_nor_features(runs):
    row = ranks.metrics(runs / "mae")[-1]
    assert not [name for name in row if "beta" in name or "feature/" in name]


def test_exported_encoders_are_equal_at_all_stages(runs):
    encoders = [ddae.load_encoder(runs / name) for name in ("one_0", "two_1", "two_3")]
    images = torch.rand(2, 3, 32, 32)
    outputs = [encoder(images) for encoder in encoders]
    assert outputs[0].shape == (2, 17, 32)
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-4)
    assert encoders[0].features(images, [1])[0].shape == (2, 17, 32)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--optim.lr", "0.5"], "was started with optim.lr = 0.003, not 0.5"),
        (["--train.steps", "40"], "Pass --train.allow_longer for a longer run"),
        (["--data.batch_size", "8"], "was started with data.batch_size = 16"),
        (["--train.steps", "10", "--train.allow_longer"], "choose another --run_dir for a shorter one"),
    ],
)
def test_another_config_is_refused(runs, shards, more, message):
    command = [*ranks.arguments(shards, runs / "one_0", 0, *FP32, "--train.steps", "20", "--train.report"), *more]
    before = {path: path.stat().st_mtime_ns for path in (runs / "one_0").rglob("*")}
    code, output = ranks.run_command("launch/pretrain.py", *command)
    assert code == 2
    assert message in output
    assert before == {path: path.stat().st_mtime_ns for path in (runs / "one_0").rglob("*")}


def test_a_run_writes_its_report(runs):
    page = (runs / "one_0" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6  # one of them of the collapse monitor
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)  # self-contained
    assert "Training images;" in page  # the data set has no validation split
    for name in ("config.json", "ds_config.json", "environment.json", "figures/reconstructions.png"):
        assert (runs / "one_0" / name).exists()


def test_after_kill_9_the_same_command_gives_the_uninterrupted_curve(shards, tmp_path):
    """A run is killed at an arbitrary instant and resumed; every loss equals the uninterrupted run's."""
    options = (*FP32, "--train.steps", "60", "--train.save_every", "10", "--data.workers", "1", "--train.report")
    command = ["launch/pretrain.py", *ranks.arguments(shards, tmp_path / "killed", 2, *options)]
    forks = ranks.forks()
    (killed,) = forks.start(command)
    wait_for_rows(tmp_path / "killed", 25)
    os.kill(killed, signal.SIGKILL)
    assert forks.wait(killed) == -signal.SIGKILL
    before = len(ranks.column(tmp_path / "killed"))
    assert before < 60
    log = ranks.run_all(1, [command[1:], ranks.arguments(shards, tmp_path / "uninterrupted", 2, *options), command[1:]])
    assert f"steps {before // 10 * 10} to 60" in log or f"steps {before // 10 * 10 - 10} to 60" in log
    assert "is complete: 60 of 60 steps" in log
    assert ranks.column(tmp_path / "killed") == ranks.column(tmp_path / "uninterrupted")
    assert ranks.column(tmp_path / "killed", "beta/tap_02") == ranks.column(tmp_path / "uninterrupted", "beta/tap_02")
