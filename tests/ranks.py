"""Starting ranks from tests: one set of processes serves many runs, on a port of its own, and leaves nothing behind.

As a program it is one rank: it reads lists of words from its standard input, one a line, and pretrains with each.
"""

import glob
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
NANO = (  # a model that takes milliseconds a step
    "--preset demo --model.width 32 --model.depth 2 --model.heads 2 --model.image_size 32 --model.patch_size 8 "
    "--pixel.taps 1 2 --pixel.tap_weights 0.75 1 --pixel.decoder_width 16 --pixel.decoder_heads 2 "
    "--feature.taps 1 2 --feature.tap_weights 0.75 1 --feature.decoder_width 16 --feature.decoder_heads 2 "
    "--data.batch_size 16 --data.workers 0 --data.backend pillow --tracker.kind jsonl --train.no_report "
    "--train.log_every 1 --train.save_every 12 --optim.warmup_epochs 1 --engine.precision bf16"
).split()


THREADS = os.environ.get("OMP_NUM_THREADS", "2")  # of a rank that is alone


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
        "OMP_NUM_THREADS": THREADS if count == 1 else "1",
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
    ranks = start(count, command)
    try:
        for rank in ranks:
            rank.stdin.write("\n".join(json.dumps(run) for run in runs))
            rank.stdin.close()
            rank.stdin = None  # communicate() would close it again
        with ThreadPoolExecutor(count) as threads:  # all are listened to at once: a full pipe stops its rank
            said = list(threads.map(lambda rank: rank.communicate(timeout=timeout)[0], ranks))
    finally:
        for rank in ranks:
            rank.kill()
        clean(ranks[0].port)
    codes = [rank.returncode for rank in ranks]
    assert codes == [0] * count, "\n".join(["exit codes", str(codes), *(text[-3000:] for text in said)])
    return said[0]


class Forks:
    """Ranks that start at once, forked from a process that has imported everything (forks.py)."""

    def __init__(self, folder: Path):
        self.folder = folder
        paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        command = [sys.executable, str(ROOT / "tests" / "forks.py")]
        self.ports: list[str] = []
        self._server = subprocess.Popen(command, env=os.environ | paths, cwd=ROOT, text=True, **pipes)
        assert any(line == "ready\n" for line in self._server.stdout)

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *error: object) -> None:
        self._server.stdin.close()
        self._server.wait()
        for port in self.ports:
            clean(port)  # of ranks that were killed

    def start(self, words: list[str], count: int = 1, kill_at: int = 0) -> list[int]:
        """Process ids of so many ranks of one run, rank 0's first; each writes into log(its id)."""
        port = str(free_port())
        self.ports.append(port)
        started = []
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            log = self.folder / f"rank_{rank}.log"
            task = {"words": words, "env": own, "kill_at": kill_at, "log": str(log)}
            started.append(self._ask(task))
        return started

    def wait(self, process: int) -> int:
        """Its exit code, when it has ended."""
        return self._ask({"wait": process})

    def log(self, rank: int = 0) -> str:
        """What the rank that was started last has said so far."""
        return (self.folder / f"rank_{rank}.log").read_text()

    def _ask(self, task: dict) -> int:
        self._server.stdin.write(json.dumps(task) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())


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

    from ddae.cli import parse
    from ddae.engine import stop_process_group
    from ddae.train import pretrain

    scale, upstream_gradients = operators._scale_gradients, set()

    def watched(grad, beta_grad, upstream, unit):
        upstream_gradients.add(float(upstream))
        scale(grad, beta_grad, upstream, unit)

    operators._scale_gradients = watched
    for line in sys.stdin:
        pretrain(parse(json.loads(line)))
    print("upstream gradients of Triton's losses:", sorted(upstream_gradients))
    stop_process_group()
