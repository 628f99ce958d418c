"""Soak test: seeded faults hit a run on two ranks; its weights must equal those of an undisturbed run bit for bit.

PYTHONPATH=.:kernels:tests:tests/support python tests/soak.py --minutes 60 --seed 0 --out docs/results/soak.json

Every start of the run suffers faults that it must survive (a rank is stopped and continued, the disk is full, the
tracker fails) and one that ends it (a signal, a kill, a hanging rank). Between two starts the newest checkpoint is
damaged, or a shard is missing. Every end must have its documented exit code and its sentence. When the time is up, the
run is finished without faults and compared with one that had none.

The run directory lies on a file system of its own, mounted for the test, which only root may do.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import ranks
import torch
from conftest import make_shards
from safetensors.torch import load_file

from ddae import atomic
from ddae.training.run_dir import git
from ddae.training.tracker import read_metrics

DISK_MB = 24
STEPS_PER_MINUTE = 220  # more than two ranks train between the faults, so that the run does not end before the time
WATCHDOG_S = 10
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
HOUR, MIN_FAULTS = 60, 10  # a run of an hour must have so many faults of each kind
SURVIVED = ("rank stopped and continued", "full disk", "tracker fails")
ENDING = ("rank killed", "killed within a save", "rank hangs", *(number.name for number in SIGNALS))
BETWEEN = ("newest checkpoint damaged", "shard missing")
SENTENCES = {  # exit code -> texts of which one must be in the log
    0: (" steps done",),
    2: ("could not be written", "lacks train-"),
    70: ("the connection to another rank is lost", "made no progress"),
    75: ("The same command resumes the run",),
}


class Soak:
    """The run under test and the faults that it has suffered."""

    def __init__(self, folder: Path, minutes: float, seed: int):
        self.folder, self.steps, self.rng = folder, round(STEPS_PER_MINUTE * minutes), random.Random(seed)
        self.begin, self.seconds = time.monotonic(), 60 * minutes
        self.faults: Counter[str] = Counter()
        self.ends: Counter[int] = Counter()  # ranks by exit code; negative: killed by that signal
        self.starts = 0
        self.shards = make_shards(self._new("shards"))
        self.disk, self.run = folder / "disk", folder / "disk" / "run"
        self.tracker = Tracker(folder)
        os.environ["MLFLOW_TRACKING_URI"] = self.tracker.uri
        self.server = ranks.forks()

    def _new(self, name: str) -> Path:
        (self.folder / name).mkdir()
        return self.folder / name

    def start(self, run: Path, kill_at: int = 0) -> list[int]:
        """Start the run on two ranks. Return their process ids."""
        options = ("--train.steps", self.steps, "--train.save_every", 20, "--train.log_every", 10, "--train.keep", 2)
        options += ("--train.watchdog_timeout_s", WATCHDOG_S, "--engine.precision", "fp32", "--tracker.kind", "mlflow")
        args = ranks.arguments(self.shards, run, 2, *map(str, options))
        return self.server.start(["launch/pretrain.py", *args], 2, kill_at)

    def log(self) -> str:
        return self.server.log(0) + self.server.log(1)

    def wait(self, processes: list[int], allowed: set[int], seconds: float = 180) -> None:
        """Wait for the end of both ranks. Raise AssertionError for another exit code, or one without its sentence."""
        codes, log = self.server.wait_all(processes, seconds), self.log()
        self.ends.update(codes)
        assert set(codes) <= allowed, f"exit codes {codes}, expected {allowed}\n{log}"
        for code in {code for code in codes if code >= 0}:
            assert any(sentence in log for sentence in SENTENCES[code]), f"exit code {code} without a sentence\n{log}"
        assert "Traceback" not in log, log

    def passed(self) -> float:
        """Return the share of the time that has passed."""
        return (time.monotonic() - self.begin) / self.seconds

    def step(self) -> int:
        """Return the last step that the run has logged."""
        return int(max((row["step"] for row in read_metrics(self.run / "metrics.jsonl")), default=0))

    def round(self) -> None:
        """Inflict every fault once, in random order, until the time is up."""
        survived = dict(zip(self.rng.sample(ENDING, len(SURVIVED)), SURVIVED, strict=True))
        between = dict(zip(self.rng.sample(ENDING, len(BETWEEN)), BETWEEN, strict=True))
        for ending in self.rng.sample(ENDING, len(ENDING)):
            if self.passed() >= 1:
                return
            self.train_until(ending, survived.get(ending, ""))
            if ending in between:
                {BETWEEN[0]: self.damage_checkpoint, BETWEEN[1]: self.start_without_shard}[between[ending]]()

    def train_until(self, ending: str, survived: str) -> None:
        """Start the run; inflict the fault that it survives, if any, and the one that ends it."""
        self.starts += 1
        kill_at = self.rng.randrange(1, 40) if ending == "killed within a save" else 0
        processes = self.start(self.run, kill_at)
        limit_holds = ending == "rank hangs"  # the watchdog's, which is an hour longer before the first step
        is_training = self.wait_for("first step done" if limit_holds else "images from pillow", processes)
        if survived and is_training:
            ended = self.survive(survived, processes)
            if ended or not self.is_running(processes):
                self.wait(processes, {2, 70, -signal.SIGKILL})  # two saves in a row failed
                return
        end = time.monotonic() + self.rng.random() * 3
        while time.monotonic() < end and self.step() < self.steps * self.passed():  # not to finish before the time
            time.sleep(0.05)
        allowed = self.end(ending, processes)
        if survived == "full disk":  # two saves in a row may have failed
            allowed.add(2)
        self.wait(processes, allowed)
        self.faults[ending] += 1

    def wait_for(self, text: str, processes: list[int]) -> bool:
        """Wait for a text in the log. Return whether the ranks are running; they may be killed in a save before."""
        end = time.monotonic() + 900  # DeepSpeed may build an op
        while text not in self.server.log() and self.is_running(processes):
            assert time.monotonic() < end, self.log()
            time.sleep(0.05)
        return self.is_running(processes)

    def is_running(self, processes: list[int]) -> bool:
        return all(Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[0] != "Z" for each in processes)

    def survive(self, fault: str, processes: list[int]) -> bool:
        """Inflict a fault that a run survives. Return whether it ended nevertheless."""
        seconds = 1 + 3 * self.rng.random()
        if fault == "rank stopped and continued":
            rank = self.rng.choice(processes)
            os.kill(rank, signal.SIGSTOP)
            time.sleep(seconds)
            os.kill(rank, signal.SIGCONT)
        elif fault == "full disk":
            with self.full_disk():
                time.sleep(seconds)
        else:
            self.tracker.fail(self.rng)
        self.faults[fault] += 1
        time.sleep(1)
        return not self.is_running(processes)

    @contextlib.contextmanager
    def full_disk(self):
        """Context in which no byte is left on the disk of the run directory."""
        filler = self.disk / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(b"0" * 4096)
        try:
            yield
        finally:
            filler.unlink()

    def end(self, ending: str, processes: list[int]) -> set[int]:
        """Inflict the fault that ends the run. Return the exit codes that it may have."""
        rank = self.rng.choice(processes)
        if ending == "rank killed":
            os.kill(rank, signal.SIGKILL)
            return {-signal.SIGKILL, 70}
        if ending == "killed within a save":
            return {-signal.SIGKILL, 70}
        if ending == "rank hangs":
            os.kill(rank, signal.SIGSTOP)
            (other,) = set(processes) - {rank}
            end = time.monotonic() + 60
            while self.is_running([other]):
                assert time.monotonic() < end, self.log()
                time.sleep(0.1)
            os.kill(rank, signal.SIGKILL)
            return {-signal.SIGKILL, 70}
        for each in processes if self.rng.random() < 0.5 else [rank]:
            os.kill(each, signal.Signals[ending])
        return {75}

    def damage_checkpoint(self) -> None:
        """Truncate, remove or change a file of the newest checkpoint, if there is an older one."""
        checkpoints = sorted((self.run / "checkpoints").glob("step_*"))
        if len(checkpoints) < 2:
            return
        file = self.rng.choice(sorted(checkpoints[-1].iterdir()))
        kind = self.rng.choice(("truncate", "remove", "flip a bit"))
        content = bytearray(file.read_bytes())
        if kind == "truncate":
            os.truncate(file, self.rng.randrange(len(content)))
        elif kind == "remove":
            file.unlink()
        else:
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
            file.write_bytes(content)
        self.faults[BETWEEN[0]] += 1

    def start_without_shard(self) -> None:
        """Start the run while a shard is missing, which it must refuse; then put the shard back."""
        shard = self.rng.choice(sorted(self.shards.glob("*.tar")))
        shard.rename(self.folder / shard.name)
        self.starts += 1
        self.wait(self.start(self.run), {2})
        (self.folder / shard.name).rename(shard)
        self.faults[BETWEEN[1]] += 1

    def compare(self) -> int:
        """Finish the run, train one without faults, and compare them. Return the number of tensors."""
        undisturbed = self.folder / "undisturbed"
        for run in (self.run, undisturbed):
            self.wait(self.start(run), {0}, 3600)
        count = 0
        for file in sorted((undisturbed / "checkpoints" / f"step_{self.steps:08d}").glob("rank_*")):
            expected, found = load_file(file), load_file(self.run / file.relative_to(undisturbed))
            assert expected.keys() == found.keys()
            for name, tensor in expected.items():
                assert torch.equal(tensor, found[name]), name
                count += 1
        expected, found = (self._losses(run) for run in (undisturbed, self.run))
        assert expected == found, "metrics.jsonl differs"
        return count

    def _losses(self, run: Path) -> list[tuple[float, float]]:
        return [(row["step"], row["loss/total"]) for row in read_metrics(run / "metrics.jsonl")]


class Tracker:
    """An MLflow server that can be killed, or stopped for a while."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, ranks.free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._start()

    def _start(self) -> None:
        store = f"sqlite:///{self.folder}/mlflow.db"
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts"), "--port", str(self.port)]
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # eight more processes
        self.process = subprocess.Popen(command, env=env, **options)

    def fail(self, rng: random.Random) -> None:
        """Kill the server and start another one, or stop it for seconds."""
        if rng.random() < 0.5:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            time.sleep(2)
            self._start()
            return
        os.killpg(self.process.pid, signal.SIGSTOP)
        time.sleep(3)
        os.killpg(self.process.pid, signal.SIGCONT)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the faults' order, times and receivers (default: 0)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write the result to")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    (folder / "disk").mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", folder / "disk"], check=False
    ).returncode:
        print("soak: a small file system cannot be mounted. Run this as root.", file=sys.stderr)
        return 2
    soak = Soak(folder, args.minutes, args.seed)
    try:
        while soak.passed() < 1:
            soak.round()
            print(f"{soak.passed():.0%} of the time, step {soak.step()}: {dict(soak.faults)}", flush=True)
        result = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": git("rev-parse", "--short", "HEAD"),
            "seed": args.seed,
            "minutes": args.minutes,
            "steps": soak.steps,
            "starts": soak.starts,
            "tensors": soak.compare(),
            "faults": {name: soak.faults[name] for name in (*SURVIVED, *ENDING, *BETWEEN)},
            "exit_codes": {str(code): count for code, count in sorted(soak.ends.items())},
        }
    finally:
        soak.tracker.close()
        soak.server.close()
        subprocess.run(["umount", "--lazy", folder / "disk"], check=False)
        shutil.rmtree(folder, ignore_errors=True)
    atomic.write_json(args.out, result)
    print(json.dumps(result, indent=1))
    few = {name: count for name, count in result["faults"].items() if count < MIN_FAULTS}
    if few and args.minutes >= HOUR:
        print(f"soak: fewer than {MIN_FAULTS} faults of a kind: {few}. Run it for longer.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
