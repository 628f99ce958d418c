"""How fast a step is, variant by variant: from naive.py to what pretraining runs. Each variant is a process of its own
(variant.py); they take turns, round by round, so that what disturbs the machine disturbs them all. What counts is the
ratio to the first variant of the same round.
"""

import contextlib
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

from ddae.errors import UserError
from ddae.training.run_dir import git


class Variant(NamedTuple):
    """A way to compute a step."""

    name: str
    kind: str  # naive; engine: naive.py under the own engine; own
    words: tuple[str, ...]  # of pretraining's command line
    pages: bool = False  # huge pages for large tensors of the CPU


PLAIN = ("--engine.loss_backend", "reference", "--engine.tap_execution", "batched")


def variants(gpu: bool) -> list[Variant]:
    """Each but the first adds one thing to the one before."""
    found = [
        Variant("naive", "naive", PLAIN),
        Variant("engine", "engine", PLAIN),
        Variant("one batch", "own", (*PLAIN, "--engine.no_skip_unused_tokens")),
        Variant("shortcuts", "own", PLAIN),
    ]
    if gpu:
        found.append(Variant("triton", "own", ("--engine.tap_execution", "batched")))
        found.append(Variant("compiled", "own", ("--engine.tap_execution", "batched", "--engine.compile")))
        return [*found, Variant("two streams", "own", (*found[-1].words, "--engine.teacher_stream"))]
    return [
        *found,
        Variant("huge pages", "own", PLAIN, True),
        Variant("tap by tap", "own", ("--engine.tap_execution", "sequential"), True),
    ]


class Worker:
    """A variant's process."""

    def __init__(self, variant: Variant, words: Sequence[str]):
        self.variant = variant
        asked = json.dumps({"kind": variant.kind, "words": [*words, *variant.words]})
        environment = os.environ | {"THP_MEM_ALLOC_ENABLE": str(int(variant.pages)), "DDAE_CHECK": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ddae.tools.bench_worker", asked],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._said: list[str] = []

    def ask(self, request: str) -> Any:
        """Its answer; UserError where it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
            self._said.append(line)
        raise UserError(f"the variant {self.variant.name!r} has ended: {''.join(self._said[-8:])}")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def run_variants(
    preset: str,
    batch: int,
    precision: str,
    words: Sequence[str],
    chosen: Sequence[Variant],
    rounds: int,
    steps: int,
    trace: str,
) -> list[dict[str, Any]]:
    """Rows of the variants of one preset; with `trace`, a trace of the last one's step goes into that file."""
    words = ["--preset", preset, "--data.batch_size", str(batch), "--engine.precision", precision, *words]
    workers: list[Worker] = []
    try:
        workers += [Worker(variant, words) for variant in chosen]
        for worker in workers:  # one after the other: each needs a whole step's memory, or all processors
            worker.ask("build")
        seconds: dict[str, list[float]] = {variant.name: [] for variant in chosen}
        for _ in range(rounds):
            for worker in workers:
                seconds[worker.variant.name].append(statistics.median(worker.ask(f"time {steps}")))
        rows = []
        for worker in workers:
            own, first = seconds[worker.variant.name], seconds[chosen[0].name]
            peak, counted = worker.ask("peak"), worker.ask("count")  # in this order: the count itself takes memory
            rows.append(
                {
                    "variant": worker.variant.name,
                    "preset": preset,
                    "batch": batch,
                    "images_per_s": round(batch / statistics.median(own), 3),
                    "ratio": round(statistics.median(a / b for a, b in zip(first, own, strict=True)), 3),
                    "ratio_low": round(min(a / b for a, b in zip(first, own, strict=True)), 3),
                    "ratio_high": round(max(a / b for a, b in zip(first, own, strict=True)), 3),
                    "flops_per_image": round(counted["flops"]),
                    "peak_bytes": peak,
                    "host_syncs": counted["waits"],
                }
            )
        if trace:
            file = Path(trace).with_stem(f"{Path(trace).stem}_{preset}")
            print(workers[-1].ask(f"profile {file}"))
            print(f"trace of {chosen[-1].name}: {file}")
    finally:
        for worker in workers:
            worker.end()
    here = environment(precision)
    return [here | row for row in rows]


def environment(precision: str) -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} CPU cores",
        "torch": torch.__version__,
        "deepspeed": metadata.version("deepspeed"),
        "commit": os.environ.get("DDAE_COMMIT") or git("rev-parse", "--short", "HEAD"),
        "precision": precision,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """A table in the terminal."""
    print(f"\n{rows[0]['preset']}, batch {rows[0]['batch']}, {rows[0]['precision']}, {rows[0]['hardware']}")
    over = f"x {rows[0]['variant']} (lowest to highest)"
    print(f"variant          images/s   {over:27}   GFLOP/image   peak GiB   waits")
    for row in rows:
        spread = f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
        print(
            f"{row['variant']:12} {row['images_per_s']:9.2f}   {row['ratio']:7.2f} {spread:19}   "
            f"{row['flops_per_image'] / 1e9:11.1f}   {row['peak_bytes'] / 2**30:8.2f}   {row['host_syncs']:5}"
        )


def keep(rows: list[dict[str, Any]], path: Path) -> None:
    """Add rows to a CSV file, with its header where it is new."""
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of images/s over the first variant's, a group a preset."""
    presets = list(dict.fromkeys((row["preset"], row["batch"]) for row in rows))
    figure, axes = plt.subplots(1, len(presets), figsize=(1 + 3.6 * len(presets), 2.9), squeeze=False, sharey=True)
    for axis, (preset, batch) in zip(axes[0], presets, strict=True):
        own = [row for row in rows if (row["preset"], row["batch"]) == (preset, batch)][::-1]
        bars = axis.barh([row["variant"] for row in own], [row["ratio"] for row in own], color="#0b6e99", height=0.62)
        axis.bar_label(bars, [f" {row['ratio']:.2f} x" for row in own], fontsize=8)
        axis.axvline(1, color="#444444", linewidth=0.8)
        axis.set_title(f"{preset}, batch {batch}", fontsize=9)
        axis.set_xlabel("images/s over the naive step's", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.2)
    figure.suptitle(f"{rows[0]['hardware']}, {rows[0]['precision']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
