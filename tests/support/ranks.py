"""Starting ranks from tests: one set of processes serves many runs, on a port of its own, and leaves nothing behind.

As a program it is one rank: it reads lists of words from its standard input, one a line, and pretrains with each.
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
NANO = (  # a model that takes milliseconds a step
    "--preset demo --model.width 32 --model.depth 2 --model.heads 2 --model.image_size 32 --model.patch_size 8 "
    "--pixel.taps 1 2 --pixel.tap_weights 0.75 1 --pixel.decoder_width 16 --pixel.decoder_heads 2 "
    "--feature.taps 1 2 --feature.tap_weights 0.75 1 --feature.decoder_width 16 --feature.decoder_heads 2 "
    "--data.batch_size 16 --data.workers 0 --data.backend pillow --tracker.kind jsonl --train.no_report "
    "--train.log_every 1 --train.save_every 12 --optim.warmup_epochs 1 --engine.precision bf16"
).split()


def words(shards, run_dir, stage: int, *more: str) -> list[str]:
    """The command line of a nano run."""
    stage_file = ROOT / "ds_configs" / f"zero{stage}.json"
    return [*NANO, "--data.train", str(shards), "--run_dir", str(run_dir), "--ds_config", str(stage_file), *more]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(count: int, command: list[str]) -> list[subprocess.Popen]:
    """Start `count` ranks of a command, as a launcher would; rank 0 in the first place."""
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2") if count == 1 else "1",
    }
    ranks = []
    for rank in range(count):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        ranks.append(subprocess.Popen([sys.executable, *command], env=own, cwd=ROOT, text=True, **pipes))
        ranks[-1].port = environment["MASTER_PORT"]
    return ranks


def run_all(count: int, runs: list[list[str]], timeout: int = 900) -> str:
    """Pretrain with each of the word lists on `count` ranks, in one set of processes; what rank 0 said."""
    return run_program(count, [__file__], runs, timeout)


def run_program(count: int, command: list[str], runs: list[list[str]], timeout: int = 900) -> str:
    """Run a program that reads lists of words from its standard input on `count` ranks; what rank 0 said."""
    server = forks()
    (server.folder / "runs.jsonl").write_text("\n".join(json.dumps(run) for run in runs))
    started = server.start(command, count, stdin="runs.jsonl")
    codes = server.wait_all(started, timeout)
    assert codes == [0] * count, "\n".join(["exit codes", str(codes), *(server.log(i)[-3000:] for i in range(count))])
    return server.log()


def run_command(*command: str, timeout: int = 900) -> tuple[int, str]:
    """A command, such as launch/pretrain.py and its words, without a launcher: its exit code and what it said."""
    server = forks()
    return server.wait(server.start_one(list(command)), timeout), server.log()


@functools.cache
def forks() -> "Forks":
    """The one that all tests of this process share; conftest.py closes it."""
    return Forks(Path(tempfile.mkdtemp(prefix="forks_")))


class Forks:
    """Ranks that start at once, forked from a process that has imported everything (forks.py)."""

    def __init__(self, folder: Path):
        self.folder, self.ports = folder, []
        self._running: set[int] = set()
        own = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": os.environ.get("DDAE_TEST_THREADS", "1")}
        own["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # looking for a GPU must not start CUDA before a fork
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        command = [sys.executable, str(ROOT / "tests" / "support" / "forks.py")]
        self._server = subprocess.Popen(command, env=os.environ | own, cwd=ROOT, text=True, **pipes)
        assert any(line == "ready\n" for line in self._server.stdout)

    def close(self) -> None:
        self._end_all()
        self._server.stdin.close()
        self._server.wait()
        shutil.rmtree(self.folder)
        for port in self.ports:
            clean(port)  # of ranks that were killed

    def start(self, command: list[str], count: int = 1, kill_at: int = 0, stdin: str = os.devnull) -> list[int]:
        """Process ids of so many ranks of one run, rank 0's first; each writes into a log of its own (log())."""
        self.ports.append(str(free_port()))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.ports[-1], "WORLD_SIZE": str(count)}
        return [
            self.start_one(command, rank, meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, kill_at, stdin)
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
        """Process id of one that no launcher has started, or of a rank."""
        if rank == 0:
            self._end_all()  # of a test that has failed
        log = self.folder / f"rank_{rank}.log"
        log.unlink(missing_ok=True)
        files = {"log": str(log), "stdin": str(self.folder / stdin)}
        process = self._ask({"command": command, "env": env or {}, "kill_at": kill_at} | files)
        self._running.add(process)
        return process

    def wait(self, process: int, timeout: float = 900) -> int:
        """Its exit code, when it has ended; after `timeout` seconds it is killed."""
        deadline = time.monotonic() + timeout
        while (code := self._ask({"ended": process})) is None:
            if time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
            time.sleep(0.02)
        self._running.discard(process)
        return code

    def _end_all(self) -> None:
        for process in list(self._running):
            os.kill(process, signal.SIGKILL)
            self.wait(process)

    def wait_all(self, started: list[int], timeout: float = 900) -> list[int]:
        """Exit codes of the ranks of a run, which leaves nothing behind."""
        codes = [self.wait(process, timeout) for process in started]
        clean(self.ports[-1])
        return codes

    def log(self, rank: int = 0) -> str:
        """What the rank that was started last has said so far."""
        return (self.folder / f"rank_{rank}.log").read_text()

    def _ask(self, task: dict) -> int | None:
        self._server.stdin.write(json.dumps(task) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def below(process: int) -> list[psutil.Process]:
    """The ranks of a launcher, or the process itself; rank 0 first, without their data workers, which have their
    words."""
    launchers = {"deepspeed", "torchrun", "deepspeed.launcher.launch"}

    def is_rank(words: list[str]) -> bool:
        if words[:1] == ["ip"] or not launchers.isdisjoint(Path(word).name for word in words[:4]):
            return False
        return "launch/pretrain.py" in words

    root = psutil.Process(process)
    named = [each for each in (root, *root.children(recursive=True)) if is_rank(each.cmdline())]
    numbers = {each.pid for each in named}
    tops = [each for each in named if each.ppid() not in numbers]
    return sorted(tops, key=lambda each: int(each.environ().get("RANK", "0")))


def clean(port: str) -> None:
    """DeepSpeed's shared-memory buffers outlive a process that is killed; remove those of this port."""
    for buffer in glob.glob(f"/dev/shm/deepspeed_allreduce_buffer*_{port}_*"):
        os.unlink(buffer)


def metrics(run_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def column(run_dir, name: str = "loss/total") -> list[float]:
    return [row[name] for row in metrics(run_dir)]


if __name__ == "__main__":
    from ddae_kernels import operators

    from ddae.config.cli import parse
    from ddae.distributed.comm import configure_logging
    from ddae.distributed.engine import stop_process_group
    from ddae.train import pretrain

    scale, upstream_gradients = operators._scale_gradients, set()

    def watched(grad, beta_grad, upstream, unit):
        upstream_gradients.add(float(upstream))
        scale(grad, beta_grad, upstream, unit)

    operators._scale_gradients = watched
    configure_logging()
    for line in sys.stdin:
        pretrain(parse(json.loads(line)))
    print("upstream gradients of Triton's losses:", sorted(upstream_gradients))
    stop_process_group()
