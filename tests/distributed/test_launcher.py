"""Launchers as users call them: `deepspeed`, and launch/slurm_pretrain.sh with stubs of Slurm's commands."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ranks

from ddae.training.tracker import read_metrics


def launch(count, args):
    """Run `deepspeed --num_gpus count launch/pretrain.py args` from the project's folder. Return the ended process."""
    port = ranks.free_port()
    command = ["deepspeed", "--num_gpus", str(count), "--master_port", str(port), "launch/pretrain.py", *args]
    process = subprocess.run(command, cwd=ranks.ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
    return process


def test_two_ranks_train_and_clean_up(shards, tmp_path):
    process = launch(2, ranks.arguments(shards, tmp_path / "run", 2, "--train.steps", "3"))
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    assert "on 2 ranks" in process.stdout
    assert process.stdout.count("step 3/3") == 1
    assert len(ranks.metrics(tmp_path / "run")) == 3


def test_an_error_of_all_ranks_is_printed_once(tmp_path):
    process = launch(2, ["--preset", "demo", "--ds_confg", "x", "--run_dir", str(tmp_path / "run")])
    assert process.returncode == 2
    assert (process.stdout + process.stderr).count("ddae: unknown flag --ds_confg; the nearest is --ds_config") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "file, code, requeued",
    [("stopped.json", 75, True), ("finished.json", 0, False), ("nothing", 2, False), ("nothing", 1, False)],
)
def test_slurm_script_requeues_a_stopped_run(file, code, requeued, tmp_path):
    """Stubs of srun, which records its arguments and creates a file in the run directory, and of scontrol."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stopped.json").touch()  # left by an earlier start
    stubs = {
        "srun": f'echo "$MASTER_ADDR $MASTER_PORT $@" > {tmp_path}/ran; touch {tmp_path}/run/{file}; exit {code}',
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol; [ "$1" = show ] && printf "node1\\nnode2\\n"; exit 0',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "1234577", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "6"}
    script = ranks.ROOT / "launch" / "slurm_pretrain.sh"
    process = subprocess.run(
        [script, "--preset", "demo", "--run_dir", str(tmp_path / "run"), "--data.train", "a b"],
        env=os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        cwd=tmp_path,
        timeout=60,
        check=False,
    )
    assert ("requeue 1234577" in (tmp_path / "scontrol").read_text()) == requeued
    assert process.returncode == (0 if requeued else code)
    command = f"launch/pretrain.py --preset demo --run_dir {tmp_path}/run --data.train a b\n"
    expected = f"node1 24577 --kill-on-bad-exit=1 --cpus-per-task=6 python {command}"
    assert (tmp_path / "ran").read_text() == expected


@pytest.mark.slow
def test_srun_alone_starts_ranks(shards, tmp_path):
    """A stub of srun starts two tasks with Slurm's variables; after SIGUSR1 the job is requeued."""
    stubs = {
        "srun": f"#!{sys.executable}\n"
        "import os, subprocess, sys\n"
        "envs = [{'SLURM_PROCID': n, 'SLURM_LOCALID': n, 'SLURM_STEP_NUM_TASKS': '2'} for n in '01']\n"
        "tasks = [subprocess.Popen(sys.argv[3:], env=os.environ | env) for env in envs]\n"
        "sys.exit(max(task.wait() for task in tasks))\n",
        "scontrol": f'#!/bin/bash\necho "$@" >> {tmp_path}/scontrol\n[ "$1" = show ] && echo 127.0.0.1\nexit 0\n',
        "python": f'#!/bin/bash\nexec {sys.executable} "$@"\n',
    }
    (tmp_path / "bin").mkdir()
    for name, body in stubs.items():
        (tmp_path / "bin" / name).write_text(body)
        (tmp_path / "bin" / name).chmod(0o755)
    job = str(free_job_id())
    slurm = {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "node1", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    args = ranks.arguments(shards, tmp_path / "run", 2, "--train.steps", "3000", "--train.save_every", "3000")
    command = [ranks.ROOT / "launch" / "slurm_pretrain.sh", *args]
    with subprocess.Popen(command, env=os.environ | slurm, cwd=ranks.ROOT, stdout=subprocess.DEVNULL) as script:
        wait_for_rows(tmp_path / "run", script)
        for process in psutil.Process(script.pid).children(recursive=True):
            if process.cmdline()[1:2] == ["launch/pretrain.py"]:
                process.send_signal(signal.SIGUSR1)
        script.wait(timeout=60)
    assert (tmp_path / "scontrol").read_text().splitlines() == ["show hostnames node1", f"requeue {job}"]
    assert json.loads((tmp_path / "run" / "stopped.json").read_text())["reason"] == "SIGUSR1"
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["hardware"]["ranks"] == 2


def test_srun_without_master_address_is_refused():
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    command = [sys.executable, "launch/pretrain.py", "--preset", "demo"]
    process = subprocess.run(
        command, env=os.environ | slurm, cwd=ranks.ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 2
    assert "ddae: srun started 2 ranks without MASTER_ADDR and MASTER_PORT" in process.stderr


def test_slurm_script_needs_a_run_dir():
    process = subprocess.run([ranks.ROOT / "launch" / "slurm_pretrain.sh"], capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr.startswith("slurm_pretrain.sh: --run_dir is missing. Pass --run_dir FOLDER")
    assert process.stderr.count("\n") == 1


def wait_for_rows(run_dir, process, rows=1, seconds=180):
    """Wait until a run has logged this many rows."""
    deadline = time.monotonic() + seconds
    while not (run_dir / "metrics.jsonl").exists() or len(read_metrics(run_dir / "metrics.jsonl")) < rows:
        assert process.poll() is None, "the process has exited"
        assert time.monotonic() < deadline
        time.sleep(0.1)


def free_job_id():
    """Return a Slurm job id whose port, 20000 + id % 10000, is free."""
    while True:
        number = random.randrange(10000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", 20000 + number))
            return number
