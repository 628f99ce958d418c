"""Start ranks from tests: one set of processes serves many runs, uses its own port, and leaves no files behind.

As a program this module is one rank. It reads command-line arguments from standard input, one JSON list a line, and
pretrains with each list.
"""

import functools
import glob
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
NANO = (  # a model whose step takes milliseconds
    "--preset demo --model.width 32 --model.depth 2 --model.heads 2 --model.image_size 32 --model.patch_size 8 "
    "--pixel.taps 1 2 --pixel.tap_weights 0.75 1 --pixel.decoder_width 16 --pixel.decoder_heads 2 "
    "--feature.taps 1 2 --feature.tap_weights 0.75 1 --feature.decoder_width 16 --feature.decoder_heads 2 "
    "--data.batch_size 16 --data.workers 0 --data.backend pillow --tracker.kind jsonl --train.no_report "
    "--train.log_every 1 --train.save_every 12 --optim.warmup_epochs 1 --engine.precision bf16"
).split()


def arguments(shards, run_dir, stage: int, *more: str) -> list[str]:
    """Return the command-line arguments of a nano run at a ZeRO stage."""
    ds_json = ROOT / "ds_configs" / f"zero{stage}.json"
    return [*NANO, "--data.train", str(shards), "--run_dir", str(run_dir), "--ds_config", str(ds_json), *more]


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(count: int, command: list[str]) -> list[subprocess.Popen]:
    """Start `count` ranks of a Python command, as a launcher would. Return their processes, rank 0 first."""
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2") if count == 1 else "1",
    }
    ranks = []
    for rank in range(count):
        rank_env = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        ranks.append(subprocess.Popen([sys.executable, *command], env=rank_env, cwd=ROOT, text=True, **pipes))
        ranks[-1].port = env["MASTER_PORT"]
    return ranks


def run_all(count: int, runs: list[list[str]], timeout: int = 900) -> str:
    """Pretrain with each list of arguments on `count` ranks, in one set of processes. Return rank 0's output."""
    return run_program(count, [__file__], runs, timeout)


def run_program(count: int, command: list[str], runs: list[list[str]], timeout: int = 900) -> str:
    """Run a program that reads lists of arguments from standard input on `count` ranks. Return rank 0's output.

    Fail if a rank's exit code is not 0.
    """
    server = forks()
    (server.folder / "runs.jsonl").write_text("\n".join(json.dumps(run) for run in runs))
    codes = server.wait_all(server.start(command, count, stdin="runs.jsonl"), timeout)
    assert codes == [0] * count, "\n".join(["exit codes", str(codes), *(server.log(i)[-3000:] for i in range(count))])
    return server.log()


def run_command(*command: str, timeout: int = 900) -> tuple[int, str]:
    """Run a Python command, such as launch/pretrain.py, without a launcher. Return its exit code and its output."""
    server = forks()
    return server.wait(server.start_one(list(command)), timeout), server.log()


@functools.cache
def forks() -> "Forks":
    """Return the server that all tests of this process share; conftest.py closes it."""
    return Forks(Path(tempfile.mkdtemp(prefix="forks_")))


class Forks:
    """Ranks that start without import time: forks of a process that has imported everything (forks.py)."""

    def __init__(self, folder: Path):
        self.folder, self.ports = folder, []
        self._running: set[int] = set()
        env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": os.environ.get("DDAE_TEST_THREADS", "1")}
        env["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # otherwise is_available() initialises CUDA before the fork
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        command = [sys.executable, str(ROOT / "tests" / "support" / "forks.py")]
        self._server = subprocess.Popen(command, env=os.environ | env, cwd=ROOT, text=True, **pipes)
        assert any(line == "ready\n" for line in self._server.stdout)

    def close(self) -> None:
        """End all ranks and the server, and remove their files."""
        self._kill_all()
        self._server.stdin.close()
        self._server.wait()
        shutil.rmtree(self.folder)
        for port in self.ports:
            remove_shared_memory(port)  # of ranks that were killed

    def start(self, command: list[str], count: int = 1, kill_at: int = 0, stdin: str = os.devnull) -> list[int]:
        """Start `count` ranks of one run. Return their process ids, rank 0's first.

        log() has each rank's output. kill_at: see forks.py. stdin: a file in this server's folder.
        """
        self.ports.append(str(free_port()))
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.ports[-1], "WORLD_SIZE": str(count)}
        return [
            self.start_one(command, rank, rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, kill_at, stdin)
            for rank in range(count)
        ]

    def start_one(
        self,
        command: list[str],
        rank: int = 0,
        env: dict[str, str] | None = None,
        kill_at: int = 0,
        stdin: str = os.devnull,
    ) -> int:
        """Start a process without a launcher, or one rank if `env` has the launcher's variables. Return its id."""
        if rank == 0:
            self._kill_all()  # processes of a test that failed
        log = self.folder / f"rank_{rank}.log"
        log.unlink(missing_ok=True)
        files = {"log": str(log), "stdin": str(self.folder / stdin)}
        process = self._request({"command": command, "env": env or {}, "kill_at": kill_at} | files)
        self._running.add(process)
        return process

    def wait(self, process: int, timeout: float = 900) -> int:
        """Wait for a process and return its exit code. Kill it after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (code := self._request({"wait_for": process})) is None:
            if time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
            time.sleep(0.02)
        self._running.discard(process)
        return code

    def _kill_all(self) -> None:
        for process in list(self._running):
            os.kill(process, signal.SIGKILL)
            self.wait(process)

    def wait_all(self, processes: list[int], timeout: float = 900) -> list[int]:
        """Wait for the ranks of a run, remove their shared memory, and return their exit codes."""
        codes = [self.wait(process, timeout) for process in processes]
        remove_shared_memory(self.ports[-1])
        return codes

    def log(self, rank: int = 0) -> str:
        """Return what the process of this rank that was started last has printed so far."""
        file = self.folder / f"rank_{rank}.log"
        return file.read_text() if file.exists() else ""  # the process may not have opened it yet

    def _request(self, task: dict) -> int | None:
        self._server.stdin.write(json.dumps(task) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def rank_processes(launcher: int) -> list[psutil.Process]:
    """Return the ranks that the process `launcher` started, or that process itself if it is a rank; rank 0 first.

    Data workers are left out: they are forks of a rank and have its command line.
    """
    launchers = {"deepspeed", "torchrun", "deepspeed.launcher.launch"}

    def is_rank(args: list[str]) -> bool:
        if args[:1] == ["ip"] or not launchers.isdisjoint(Path(arg).name for arg in args[:4]):
            return False
        return "launch/pretrain.py" in args

    root = psutil.Process(launcher)
    candidates = [each for each in (root, *root.children(recursive=True)) if is_rank(each.cmdline())]
    ids = {each.pid for each in candidates}
    ranks = [each for each in candidates if each.ppid() not in ids]
    return sorted(ranks, key=lambda each: int(each.environ().get("RANK", "0")))


def remove_shared_memory(port: str) -> None:
    """Remove DeepSpeed's shared-memory buffers of this port, which outlive a rank that is killed."""
    for buffer in glob.glob(f"/dev/shm/deepspeed_allreduce_buffer*_{port}_*"):
        os.unlink(buffer)


def metrics(run_dir) -> list[dict]:
    """Return the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def column(run_dir, name: str = "loss/total") -> list[float]:
    """Return one metric of all rows."""
    return [row[name] for row in metrics(run_dir)]


if __name__ == "__main__":
    from ddae_kernels import operators

    from ddae.config.cli import parse
    from ddae.distributed.engine import stop_process_group
    from ddae.distributed.logs import configure_logging
    from ddae.train import pretrain

    scale_gradients, upstream_gradients = operators._scale_gradients, set()

    def recording(grad, beta_grad, upstream, unit):
        upstream_gradients.add(float(upstream))
        scale_gradients(grad, beta_grad, upstream, unit)

    operators._scale_gradients = recording
    configure_logging()
    for line in sys.stdin:
        pretrain(parse(json.loads(line)))
    print("upstream gradients of Triton's losses:", sorted(upstream_gradients))
    stop_process_group()
