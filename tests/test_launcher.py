"""DeepSpeed's own launcher, as users call it."""

import os
import subprocess
import sys
from pathlib import Path

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
