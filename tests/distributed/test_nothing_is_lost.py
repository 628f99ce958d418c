"""Ends of a run that must not lose its state: Ctrl-C, hang-up, output on a full disk, a last save that fails, NaN."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import ranks
import torch
from test_signals import Job

from ddae.errors import UserError
from ddae.training.tracker import read_metrics

PRETRAIN = "launch/pretrain.py"
LONG = ("--train.steps", "100000", "--train.save_every", "100000", "--engine.precision", "fp32")


def wait_for_rows(run, count=3, seconds=120):
    deadline = time.monotonic() + seconds
    while len(read_metrics(run / "metrics.jsonl")) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


FAULTS = pytest.mark.faults  # of these parameters: others of the same kind run in every suite


ASYNC = ("--train.async_save", "--train.save_every", "2")  # a save is in flight at almost every step


@pytest.mark.parametrize(
    "number, more", [(signal.SIGINT, ()), (signal.SIGHUP, ()), (signal.SIGINT, ASYNC)], ids=["INT", "HUP", "INT-async"]
)
def test_ctrl_c_and_hang_up_stop_with_a_checkpoint(number, more, shards, tmp_path):
    run, server = tmp_path / "run", ranks.forks()
    process = server.start_one([PRETRAIN, *ranks.arguments(shards, run, 2, *LONG, *more)])
    wait_for_rows(run)
    os.kill(process, number)
    assert server.wait(process) == 75, server.log()
    note = json.loads((run / "stopped.json").read_text())
    assert note["reason"] == number.name
    assert (run / "checkpoints" / f"step_{note['step']:08d}").is_dir()
    assert "Traceback" not in server.log()
    assert "The same command resumes the run" in server.log()


def in_python(code, *args):
    """Run code with this package in a process of its own; return it."""
    env = os.environ | {"PYTHONPATH": f"{ranks.ROOT}:{ranks.ROOT / 'kernels'}"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


STOP_SIGNAL = """
    import os, signal, sys, time
    {before}
    from ddae.distributed.preemption import StopSignal
    stop = StopSignal()
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
        print(stop.poll(0), flush=True)
"""


def test_second_ctrl_c_ends_at_once():
    process = in_python(STOP_SIGNAL.format(before=""))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)  # launchers repeat the terminal's signal
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == -signal.SIGINT
    output = process.stdout.read()
    assert "SIGINT\n" in output
    assert "Ctrl-C again ends at once" in output


def test_hang_up_stays_ignored_under_nohup():
    process = in_python(STOP_SIGNAL.format(before="signal.signal(signal.SIGHUP, signal.SIG_IGN)"))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    assert [process.stdout.readline() for _ in range(3)] == ["\n"] * 3
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    "output", ["full disk", pytest.param("closed", marks=FAULTS), pytest.param("closed pipe", marks=FAULTS)]
)
def test_output_that_cannot_be_written_does_not_end_training(output, shards, tmp_path):
    args = ranks.arguments(shards, tmp_path / "run", 2, "--train.steps", "20", "--engine.precision", "fp32")
    redirection = {"full disk": ">/dev/full 2>&1", "closed": ">&- 2>&-", "closed pipe": "2>&1 | true"}[output]
    command = f'"{sys.executable}" "$@" {redirection}; exit ${{PIPESTATUS[0]}}'
    env = os.environ | {"PYTHONPATH": f"{ranks.ROOT}:{ranks.ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        ["bash", "-c", command, "bash", PRETRAIN, *args], cwd=ranks.ROOT, env=env, check=False, timeout=240
    )
    expected = 75 if output == "closed pipe" else 0  # a reader that is gone is a launcher that is gone
    assert finished.returncode == expected
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert (tmp_path / "run" / ("stopped.json" if expected else "encoder/encoder.safetensors")).exists()


FAILING_SAVE = """
    import sys
    from ddae.distributed import checkpoint
    from ddae.config.cli import PRETRAINING, launch
    write, failures = checkpoint._write_shards, int(sys.argv.pop(1))

    def fail(file, parts):
        global failures
        if "_00000020" in str(file.parent) and failures:
            failures -= 1
            raise OSError(28, "No space left on device")
        return write(file, parts)

    checkpoint._write_shards = fail
    launch(PRETRAINING, "ddae.train:pretrain")
"""


@pytest.mark.parametrize("saving", ["no_async_save", "async_save"])
@pytest.mark.parametrize("failures", [pytest.param(1, marks=FAULTS), 2])
def test_a_last_save_that_fails_is_repeated_or_reported(failures, saving, shards, tmp_path):
    options = ("--train.steps", "20", "--engine.precision", "fp32", f"--train.{saving}")
    args = ranks.arguments(shards, tmp_path / "run", 2, *options)
    process = in_python(FAILING_SAVE, failures, *args)
    output, _ = process.communicate(timeout=240)
    if failures == 1:
        assert process.returncode == 0, output
        assert (tmp_path / "run" / "checkpoints" / "step_00000020").is_dir()
    else:
        assert process.returncode == 2, output
        assert "two checkpoints in a row could not be written" in output
        assert "Traceback" not in output
        assert not (tmp_path / "run" / "finished.json").exists()


def test_weights_that_are_not_finite_are_neither_saved_nor_exported(shards, tmp_path):
    options = ("--train.steps", "1", "--optim.lr", "1e38", "--optim.warmup_epochs", "0", "--engine.precision", "fp32")
    code, output = ranks.run_command(PRETRAIN, *ranks.arguments(shards, tmp_path / "run", 2, *options))
    assert code == 2, output
    assert "is not finite after step 1, so that no checkpoint was written" in output
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    assert not (tmp_path / "run" / "encoder").exists()


def test_an_export_with_nan_is_refused(encoder_folder, tmp_path):
    from ddae.export.encoder import load_encoder, write_export

    encoder = load_encoder(encoder_folder)
    write_export(encoder, tmp_path / "bad")
    encoder.norm.weight[3] = torch.nan
    with pytest.raises(UserError, match=r"weights that are not finite \(norm\.weight\)"):
        write_export(encoder, tmp_path / "worse")
    assert not (tmp_path / "worse").exists()


WATCHDOG = """
    import pathlib, sys, time
    from ddae.distributed.watchdog import Watchdog
    watchdog = Watchdog(pathlib.Path(sys.argv[1]), 1.0)
    watchdog.first_step_done()
    print("ready", flush=True)
    for _ in range(int(sys.argv[2])):
        time.sleep(0.2)
        watchdog.heartbeat(1)
    time.sleep(60)
"""


def test_watchdog_does_not_count_the_time_in_which_the_process_was_stopped(tmp_path):
    process = in_python(WATCHDOG, tmp_path, 25)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    time.sleep(1)
    assert process.poll() is None
    assert process.wait(20) == 70  # once the heartbeats end
    assert "made no progress for 1 s since step 1" in process.stdout.read()


def test_watchdog_allows_more_time_before_the_first_step(tmp_path):
    process = in_python(WATCHDOG.replace("watchdog.first_step_done()", ""), tmp_path, 0)
    assert process.stdout.readline() == "ready\n"
    time.sleep(2.5)
    assert process.poll() is None
    process.kill()
    process.wait()


@pytest.mark.faults
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_ctrl_c_in_a_terminal(launcher, shards, tmp_path, record_result):
    """Ctrl-C: SIGINT to launcher, two ranks and their data workers at the same time."""
    args = ranks.arguments(shards, tmp_path / "run", 2, *LONG, "--data.workers", "1")
    job = Job(launcher, args, tmp_path / "log", new_session=True)
    job.wait_until(lambda: len(read_metrics(tmp_path / "run" / "metrics.jsonl")) > 5)
    job.watch()
    os.killpg(job.process.pid, signal.SIGINT)
    since = time.monotonic()
    job.wait_for_exit()
    seconds = time.monotonic() - since
    note = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert (tmp_path / "run" / "checkpoints" / f"step_{note['step']:08d}").is_dir()
    own = [line for line in job.log.read_text().splitlines() if re.search(r'File ".*/(ddae|launch)/', line)]
    assert own == []  # the launcher's own tracebacks have no such line
    record_result(f"checkpoint and stopped.json ({note['reason']}), all processes exited after {seconds:.1f} s")
