"""DeepSpeed's own launcher, as users call it."""

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


def launch(count, words):
    """`deepspeed --num_gpus count launch/pretrain.py words`, on a port of its own, from the project's folder."""
    port = ranks.free_port()
    command = ["deepspeed", "--num_gpus", str(count), "--master_port", str(port), "launch/pretrain.py", *words]
    done = subprocess.run(command, cwd=ranks.ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
    return done


def test_two_ranks_train_and_clean_up(shards, tmp_path):
    done = launch(2, ranks.arguments(shards, tmp_path / "run", 2, "--train.steps", "3"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "on 2 ranks" in done.stdout
    assert done.stdout.count("step 3/3") == 1
    assert len(ranks.metrics(tmp_path / "run")) == 3


def test_a_mistake_is_told_once_through_the_launcher(tmp_path):
    done = launch(2, ["--preset", "demo", "--ds_confg", "x", "--run_dir", str(tmp_path / "run")])
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("ddae: unknown flag --ds_confg; the nearest is --ds_config") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "leaves, code, requeued",
    [("stopped.json", 75, True), ("finished.json", 0, False), ("nothing", 2, False), ("nothing", 1, False)],
)
def test_slurm_queues_a_stopped_run_again(leaves, code, requeued, tmp_path):
    """With stubs of srun, which shows what it was given and leaves a file, and of scontrol."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stopped.json").touch()  # of the start before
    stubs = {
        "srun": f'echo "$MASTER_ADDR $MASTER_PORT $@" > {tmp_path}/ran; touch {tmp_path}/run/{leaves}; exit {code}',
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol; [ "$1" = show ] && printf "node1\\nnode2\\n"; exit 0',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "1234577", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "6"}
    script = ranks.ROOT / "launch" / "slurm_pretrain.sh"
    done = subprocess.run(
        [script, "--preset", "demo", "--run_dir", str(tmp_path / "run"), "--data.train", "a b"],
        env=os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        cwd=tmp_path,
        timeout=60,
        check=False,
    )
    assert ("requeue 1234577" in (tmp_path / "scontrol").read_text()) == requeued
    assert done.returncode == (0 if requeued else code)
    words = f"launch/pretrain.py --preset demo --run_dir {tmp_path}/run --data.train a b\n"
    ran = f"node1 24577 --kill-on-bad-exit=1 --cpus-per-task=6 python {words}"
    assert (tmp_path / "ran").read_text() == ran


def test_srun_alone_starts_ranks(shards, tmp_path):
    """One task a rank, told by Slurm's words: a stub of srun starts two; told to stop, they are queued again."""
    stubs = {
        "srun": f"#!{sys.executable}\n"
        "import os, subprocess, sys\n"
        "words = [{'SLURM_PROCID': n, 'SLURM_LOCALID': n, 'SLURM_STEP_NUM_TASKS': '2'} for n in '01']\n"
        "tasks = [subprocess.Popen(sys.argv[3:], env=os.environ | own) for own in words]\n"
        "sys.exit(max(task.wait() for task in tasks))\n",
        "scontrol": f'#!/bin/bash\necho "$@" >> {tmp_path}/scontrol\n[ "$1" = show ] && echo 127.0.0.1\nexit 0\n',
        "python": f'#!/bin/bash\nexec {sys.executable} "$@"\n',
    }
    (tmp_path / "bin").mkdir()
    for name, body in stubs.items():
        (tmp_path / "bin" / name).write_text(body)
        (tmp_path / "bin" / name).chmod(0o755)
    job = str(free_port_of_slurm())
    slurm = {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "node1", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    words = ranks.arguments(shards, tmp_path / "run", 2, "--train.steps", "3000", "--train.save_every", "3000")
    command = [ranks.ROOT / "launch" / "slurm_pretrain.sh", *words]
    with subprocess.Popen(command, env=os.environ | slurm, cwd=ranks.ROOT, stdout=subprocess.DEVNULL) as script:
        wait_for_rows(tmp_path / "run", script)
        for process in psutil.Process(script.pid).children(recursive=True):
            if process.cmdline()[1:2] == ["launch/pretrain.py"]:
                process.send_signal(signal.SIGUSR1)
        script.wait(timeout=60)
    assert (tmp_path / "scontrol").read_text().splitlines() == ["show hostnames node1", f"requeue {job}"]
    assert json.loads((tmp_path / "run" / "stopped.json").read_text())["reason"] == "SIGUSR1"
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["hardware"]["ranks"] == 2


def test_srun_without_a_meeting_point_is_told():
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    command = [sys.executable, "launch/pretrain.py", "--preset", "demo"]
    done = subprocess.run(command, env=os.environ | slurm, cwd=ranks.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "ddae: srun started 2 ranks without MASTER_ADDR and MASTER_PORT" in done.stderr


def test_slurms_script_wants_a_run_dir():
    done = subprocess.run([ranks.ROOT / "launch" / "slurm_pretrain.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("slurm_pretrain.sh: --run_dir is missing. Pass --run_dir FOLDER")
    assert done.stderr.count("\n") == 1


def wait_for_rows(run_dir, process, rows=1, seconds=180):
    """Until a run has logged so many rows."""
    deadline = time.monotonic() + seconds
    while not (run_dir / "metrics.jsonl").exists() or len(read_metrics(run_dir / "metrics.jsonl")) < rows:
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < deadline
        time.sleep(0.1)


def free_port_of_slurm():
    """A job's number whose port, 20000 + number % 10000, is free."""
    while True:
        number = random.randrange(10000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", 20000 + number))
            return number
