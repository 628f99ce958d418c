"""SIGTERM and SIGUSR1 to each process of each launcher: a checkpoint, stopped.json, exit code 75."""

import contextlib
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

from ddae.training.tracker import read_metrics

LAUNCHERS = {
    "deepspeed": lambda port: ["deepspeed", "--num_gpus", "2", "--master_port", port],
    "torchrun": lambda port: ["torchrun", "--nproc_per_node", "2", "--master_port", port],
    "none": lambda port: [sys.executable],
}


class Job:
    """A run under a launcher: the launcher's process and the processes of its ranks."""

    def __init__(self, launcher: str, args: list[str], log: Path, new_session: bool = False):
        self.port = str(ranks.free_port())
        env = os.environ | {"PYTHONPATH": f"{ranks.ROOT}:{ranks.ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
        command = [*LAUNCHERS[launcher](self.port), "launch/pretrain.py", *args]
        self.log = log
        with open(log, "w") as out:
            options = {"stdout": out, "stderr": out, "start_new_session": new_session}
            self.process = subprocess.Popen(command, env=env, cwd=ranks.ROOT, **options)

    def ranks(self) -> list[psutil.Process]:
        """Return the processes of the ranks, rank 0 first."""
        return ranks.rank_processes(self.process.pid)

    def node_launcher(self) -> psutil.Process:
        """Return the process of DeepSpeed's launch.py, the child of `deepspeed` and parent of the ranks."""
        return psutil.Process(self.ranks()[0].ppid())

    def wait_until(self, condition, seconds: float = 240) -> None:
        """Wait until condition() is true. Fail if the launcher exits, or after this many seconds."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                pytest.fail(self.log.read_text()[-3000:])
            time.sleep(0.05)

    def wait_for_exit(self, seconds: float = 60) -> None:
        """Wait until the ranks of watch() and the launcher have exited. Fail if a rank needs more than `seconds`."""
        _, alive = psutil.wait_procs(self._watched, timeout=seconds)
        for process in alive:
            process.kill()
        assert alive == [], self.log.read_text()[-3000:]
        self.process.wait(timeout=60)
        assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{self.port}_*"))

    def watch(self) -> None:
        """Remember the ranks, which have no parent any more once the launcher is gone."""
        self._watched = self.ranks()

    def kill(self) -> None:
        """Kill the launcher and all its descendants."""
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                process.kill()
        self.process.kill()


CASES = [
    ("deepspeed", signal.SIGTERM, "launcher"),
    ("deepspeed", signal.SIGUSR1, "launcher"),
    ("deepspeed", signal.SIGTERM, "launch.py"),
    ("deepspeed", signal.SIGUSR1, "one"),
    ("deepspeed", signal.SIGTERM, "all"),
    ("torchrun", signal.SIGTERM, "launcher"),
    ("torchrun", signal.SIGUSR1, "all"),
    ("torchrun", signal.SIGTERM, "one"),
    ("deepspeed", signal.SIGHUP, "one"),
    ("torchrun", signal.SIGINT, "all"),
]


@pytest.mark.faults
@pytest.mark.parametrize("launcher, number, receiver", CASES, ids=lambda value: getattr(value, "name", value))
def test_a_signal_stops_the_run(launcher, number, receiver, shards, tmp_path, record_result):
    """A signal to a launcher or rank, two ranks with one data worker each."""
    options = ("--engine.precision", "fp32", "--train.steps", "100000", "--train.save_every", "100000")
    args = ranks.arguments(shards, tmp_path / "run", 2, *options, "--data.workers", "1")
    job = Job(launcher, args, tmp_path / "log")
    job.wait_until(lambda: len(read_metrics(tmp_path / "run" / "metrics.jsonl")) > 5)
    job.watch()
    receivers = {"launcher": [job.process], "one": job.ranks()[1:], "all": job.ranks()}
    for process in [job.node_launcher()] if receiver == "launch.py" else receivers[receiver]:
        process.send_signal(number)
    since = time.monotonic()
    job.wait_for_exit()
    seconds = time.monotonic() - since
    note = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert note["reason"] in (number.name, "the launcher is gone")
    assert (tmp_path / "run" / "checkpoints" / f"step_{note['step']:08d}").is_dir()
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == note["step"]
    record_result(f"checkpoint and stopped.json ({note['reason']}), all processes exited after {seconds:.1f} s")


@pytest.mark.faults
@pytest.mark.parametrize("when", ["during set-up", "during export"])
def test_a_signal_outside_the_training_loop(when, shards, tmp_path, record_result):
    """SIGTERM before the first step, or after the last."""
    options = ("--engine.precision", "fp32", "--train.steps", "20", "--train.report", "--train.save_every", "100")
    job = Job("none", ranks.arguments(shards, tmp_path / "run", 2, *options), tmp_path / "log")
    is_export = when == "during export"
    job.wait_until((tmp_path / "run" / ("checkpoints/latest" if is_export else ".lock")).exists)
    job.process.send_signal(signal.SIGTERM)
    since = time.monotonic()
    code = job.process.wait(timeout=60)
    seconds = time.monotonic() - since
    if is_export:
        assert code == 0, job.log.read_text()[-3000:]
        assert (tmp_path / "run" / "finished.json").exists()
        record_result(f"the export was completed, and the run exited with code 0 after {seconds:.1f} s")
        return
    assert code == 75, job.log.read_text()[-3000:]
    assert json.loads((tmp_path / "run" / "stopped.json").read_text()) == {"reason": "SIGTERM", "step": 0}
    assert (tmp_path / "run" / "checkpoints" / "step_00000000").is_dir()
    record_result(f"checkpoint of step 0, stopped.json, exit code 75 after {seconds:.1f} s")


SIGNAL_DURING_EVALUATION = """
import os, runpy, signal, sys, time
from ddae.eval import features

batches_of_rank = features.batches_of_rank

def interrupted(*args):
    for number, batch in enumerate(batches_of_rank(*args)):
        if number == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.6)  # the ranks agree about once a second, which may be after a faster evaluation
        yield batch

features.batches_of_rank = interrupted
sys.path.insert(0, "launch")
runpy.run_path("launch/pretrain.py", run_name="__main__")
"""


@pytest.mark.faults
def test_a_signal_during_an_evaluation(digits, tmp_path, record_result):
    """SIGTERM to one of two ranks during the k-NN evaluation of the untrained encoder; then the same command again."""
    options = ("--engine.precision", "fp32", "--train.steps", "12", "--probe_every", "0.1")
    args = ranks.arguments(digits, tmp_path / "run", 2, *options)
    for command, code in ((["-c", SIGNAL_DURING_EVALUATION], 75), (["launch/pretrain.py"], 0)):
        since = time.monotonic()
        processes = ranks.start(2, [*command, *args])
        outputs = [rank.communicate(timeout=240)[0] for rank in processes]
        ranks.remove_shared_memory(processes[0].port)
        assert [rank.returncode for rank in processes] == [code] * 2, "".join(outputs)
        rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
        evaluated = [row["step"] for row in rows if "features/effective_rank/tap_02" in row]
        if code == 75:
            assert json.loads((tmp_path / "run" / "stopped.json").read_text()) == {"reason": "SIGTERM", "step": 0}
            assert (tmp_path / "run" / "checkpoints" / "step_00000000").is_dir()
            assert evaluated == []
            seconds = time.monotonic() - since
    assert evaluated == [0, 9, 12]
    record_result(f"checkpoint, stopped.json, exit code 75 ({seconds:.0f} s with start-up); evaluation was repeated")


SMALL_SHARED_MEMORY = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$0" launch/pretrain.py "$@"'


@pytest.mark.faults
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a file system")
def test_64_mb_of_shared_memory(shards, tmp_path, record_result):
    """A real /dev/shm of 64 MB, as in Docker: refused where data workers need more; otherwise SIGTERM stops the run."""
    env = os.environ | {"PYTHONPATH": f"{ranks.ROOT}:{ranks.ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}

    def start(name, *more):
        args = ranks.arguments(shards, tmp_path / name, 2, "--engine.precision", "fp32", *more)
        command = ["unshare", "--mount", "sh", "-c", SMALL_SHARED_MEMORY, sys.executable, *args]
        return subprocess.Popen(command, env=env, cwd=ranks.ROOT, text=True, stdout=-1, stderr=subprocess.STDOUT)

    since = time.monotonic()
    refused = start("refused", "--data.workers", "16", "--data.batch_size", "1024")
    output = refused.communicate(timeout=120)[0]
    seconds = time.monotonic() - since
    assert refused.returncode == 2, output
    assert "/dev/shm needs 101 MB for what 16 workers keep ready, and has 67 MB" in output

    stopped = start("stopped", "--data.workers", "2", "--train.steps", "100000")
    deadline = time.monotonic() + 120
    while len(read_metrics(tmp_path / "stopped" / "metrics.jsonl")) < 5:
        assert stopped.poll() is None, stopped.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    stopped.send_signal(signal.SIGTERM)
    output = stopped.communicate(timeout=60)[0]
    assert stopped.returncode == 75, output
    assert json.loads((tmp_path / "stopped" / "stopped.json").read_text())["reason"] == "SIGTERM"
    record_result(
        f"refused with exit code 2 after {seconds:.0f} s; with 2 workers SIGTERM left a checkpoint, exit code 75"
    )


@pytest.mark.faults
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_dead_rank_ends_the_job(launcher, shards, tmp_path, record_result):
    """kill -9 of one of two ranks under a launcher."""
    options = ("--engine.precision", "fp32", "--train.steps", "100000", "--train.save_every", "20")
    job = Job(launcher, ranks.arguments(shards, tmp_path / "run", 2, *options), tmp_path / "log")
    job.wait_until(lambda: len(read_metrics(tmp_path / "run" / "metrics.jsonl")) > 30)
    job.watch()
    job.ranks()[1].kill()
    since = time.monotonic()
    job.wait_for_exit(seconds=90)
    assert job.process.returncode != 0
    record_result(f"the job ended with exit code {job.process.returncode} after {time.monotonic() - since:.1f} s")


@pytest.mark.faults
def test_a_closed_output_pipe_stops_the_run(shards, tmp_path, record_result):
    """The reader of a rank's output exits, as over ssh when `deepspeed --hostfile` is killed."""
    options = ("--engine.precision", "fp32", "--train.steps", "100000", "--train.save_every", "100000")
    (rank,) = ranks.start(1, ["launch/pretrain.py", *ranks.arguments(shards, tmp_path / "run", 2, *options)])
    for line in rank.stdout:
        if "step 6/" in line:
            break
    rank.stdout.close()
    since = time.monotonic()
    assert rank.wait(timeout=60) == 75
    note = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert note["reason"] == "the launcher is gone"
    assert (tmp_path / "run" / "checkpoints" / f"step_{note['step']:08d}").is_dir()
    record_result(f"checkpoint and stopped.json, exit code 75 after {time.monotonic() - since:.1f} s")
