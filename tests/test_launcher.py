"""DeepSpeed's own launcher, as users call it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ranks

DEEPSPEED = Path(sys.executable).with_name("deepspeed")


def launch(count, words):
    """`deepspeed --num_gpus count launch/pretrain.py words`, on a port of its own, from the project's folder."""
    port = ranks.free_port()
    command = [DEEPSPEED, "--num_gpus", str(count), "--master_port", str(port), "launch/pretrain.py", *words]
    path = f"{DEEPSPEED.parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    done = subprocess.run(
        command, env=environment, cwd=ranks.ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
    return done


def test_two_ranks_train_and_clean_up(shards, tmp_path):
    done = launch(2, ranks.words(shards, tmp_path / "run", 2, "--train.steps", "3"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "on 2 ranks" in done.stdout
    assert done.stdout.count("step 3/3") == 1
    assert len(ranks.metrics(tmp_path / "run")) == 3


def test_a_mistake_is_told_once_through_the_launcher(tmp_path):
    done = launch(2, ["--preset", "demo", "--ds_confg", "x", "--run_dir", str(tmp_path / "run")])
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("ddae: unknown flag --ds_confg: the nearest is --ds_config") == 1
    assert not (tmp_path / "run").exists()


def test_ranks_whose_launcher_is_gone_stop_by_themselves(shards, tmp_path):
    """`deepspeed` dies of a signal and tells nobody."""
    port = ranks.free_port()
    words = ranks.words(shards, tmp_path / "run", 2, "--train.steps", "100000", "--train.save_every", "100000")
    command = [DEEPSPEED, "--num_gpus", "2", "--master_port", str(port), "launch/pretrain.py", *words]
    environment = os.environ | {"PATH": f"{DEEPSPEED.parent}:{os.environ['PATH']}"}
    with subprocess.Popen(command, env=environment, cwd=ranks.ROOT, stdout=subprocess.DEVNULL) as launcher:
        deadline = time.monotonic() + 180
        while not (tmp_path / "run" / "metrics.jsonl").exists() or not ranks.metrics(tmp_path / "run"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        processes = psutil.Process(launcher.pid).children(recursive=True)
        launcher.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=60)
    for process in alive:
        process.kill()
    assert alive == []
    note = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert note["reason"] == "the launcher is gone"
    assert (tmp_path / "run" / "checkpoints" / f"step_{note['step']:08d}").is_dir()
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))


@pytest.mark.parametrize(
    "leaves, code, requeued", [("stopped.json", 0, True), ("finished.json", 0, False), ("nothing", 2, False)]
)
def test_slurm_queues_a_stopped_run_again(leaves, code, requeued, tmp_path):
    """With stubs of srun, which shows what it was given and leaves a file, and of scontrol."""
    (tmp_path / "run").mkdir()
    stubs = {
        "srun": f'echo "$@" > {tmp_path}/ran; cp hosts_77 {tmp_path}/hosts; touch {tmp_path}/run/{leaves}; exit {code}',
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol; [ "$1" = show ] && printf "node1\\nnode2\\n"; exit 0',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "4"}
    script = ranks.ROOT / "launch" / "slurm_pretrain.sh"
    done = subprocess.run(
        [script, "--preset", "demo", "--run_dir", str(tmp_path / "run"), "--data.train", "a b"],
        env=os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        cwd=tmp_path,
        timeout=60,
        check=False,
    )
    assert ("requeue 77" in (tmp_path / "scontrol").read_text()) == requeued
    assert done.returncode == code
    assert (tmp_path / "hosts").read_text() == "node1 slots=4\nnode2 slots=4\n"
    assert (
        (tmp_path / "ran").read_text().endswith(f"pretrain --preset demo --run_dir {tmp_path}/run --data.train a b\n")
    )
