"""Throughput of the training step, variant by variant, from naive.py to what pretraining runs.

Each variant is measured in its own process (bench_worker.py). Variants are interleaved so that machine noise cancels:
the reported ratio is the median over rounds of images/s relative to the first variant in the same round.
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

from ddae import atomic
from ddae.errors import UserError
from ddae.training.run_dir import git

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"


class Variant(NamedTuple):
    """A way to compute the training step."""

    name: str
    kind: str  # naive: naive.py with plain DeepSpeed; engine: naive.py with ddae's Engine; ddae: what pretraining runs
    args: tuple[str, ...]  # arguments of launch/pretrain.py
    huge_pages: bool = False  # back large CPU tensors with huge pages


PLAIN = ("--engine.loss_backend", "reference", "--engine.tap_execution", "batched")


def variants(gpu: bool) -> list[Variant]:
    """Return the variants for a GPU or a CPU. Each one but the first adds one optimisation to the one before it."""
    common = [
        Variant("naive", "naive", PLAIN),
        Variant("engine", "engine", PLAIN),
        Variant("one batch", "ddae", (*PLAIN, "--engine.no_skip_unused_tokens")),
        Variant("shortcuts", "ddae", PLAIN),
    ]
    if gpu:
        compiled = ("--engine.tap_execution", "batched", "--engine.compile")
        return [
            *common,
            Variant("triton", "ddae", ("--engine.tap_execution", "batched")),
            Variant("compiled", "ddae", compiled),
            Variant("two streams", "ddae", (*compiled, "--engine.teacher_stream")),
        ]
    return [
        *common,
        Variant("huge pages", "ddae", PLAIN, True),
        Variant("tap by tap", "ddae", ("--engine.tap_execution", "sequential"), True),
    ]


class Options(NamedTuple):
    """Settings of a benchmark. An empty or zero value is replaced by a default that depends on the device."""

    presets: Sequence[str]
    batch_sizes: Sequence[int]
    precision: str
    variants: Sequence[str]  # names; empty: all
    rounds: int
    steps: int  # per variant and round
    data: str  # shards; "": random images
    json: str  # file for all rows
    out: str  # stem of a CSV file and a figure
    profile: str  # file for a trace of the last variant's step


def benchmark_step(options: Options, args: Sequence[str]) -> None:
    """Measure the variants for each preset and batch size, and print, save and draw the rows.

    args: further arguments of launch/pretrain.py. Raise UserError for an unknown variant, or if a variant fails.
    """
    gpu, rows = torch.cuda.is_available(), []
    available = {variant.name: variant for variant in variants(gpu)}
    if unknown := [name for name in options.variants if name not in available]:
        raise UserError(f"unknown variant {unknown[0]!r}. Choose from {', '.join(available)}.")
    chosen = [available[name] for name in options.variants or available]
    presets = ([f"ddae_vit_{size}16_100e" for size in "sbl"] + ["mae_vit_b16_100e"])[: 4 if gpu else 1]
    data = ["--data.train", options.data] if options.data else ["--data.backend", "synthetic"]
    args = ["--ds_config", str(DS_CONFIGS / ("zero2.json" if gpu else "zero0.json")), *data, *args]
    precision, steps = options.precision or ("bf16" if gpu else "fp32"), options.steps or (5 if gpu else 1)
    for preset in options.presets or presets:
        for batch in options.batch_sizes or [256 if gpu else 16]:
            of_preset = run_variants(preset, batch, precision, args, chosen, options.rounds, steps, options.profile)
            print_table(of_preset)
            rows += of_preset
            if options.json:  # rewritten after every preset, so that an interrupted benchmark keeps its rows
                atomic.write_json(Path(options.json), rows, indent=1)
            if options.out:
                append_csv(of_preset, Path(options.out).with_suffix(".csv"))
                draw_bars(rows, Path(options.out).with_suffix(".png"))


class VariantProcess:
    """A process that runs one variant and answers requests (bench_worker.py)."""

    def __init__(self, variant: Variant, args: Sequence[str]):
        self.variant = variant
        task = json.dumps({"kind": variant.kind, "args": [*args, *variant.args]})
        environment = os.environ | {"THP_MEM_ALLOC_ENABLE": str(int(variant.huge_pages)), "DDAE_CHECK": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ddae.tools.bench_worker", task],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._output: list[str] = []

    def request(self, request: str) -> Any:
        """Send a request and return its result. Raise UserError with the last output if the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
            self._output.append(line)
        raise UserError(f"the process of variant {self.variant.name!r} has failed: {''.join(self._output[-8:])}")

    def kill(self) -> None:
        """Kill the process and wait for its end."""
        self._process.kill()
        self._process.wait()


def run_variants(
    preset: str,
    batch: int,
    precision: str,
    args: Sequence[str],
    chosen: Sequence[Variant],
    rounds: int,
    steps: int,
    trace: str,
) -> list[dict[str, Any]]:
    """Return a row of measurements for each variant.

    args: further arguments of launch/pretrain.py. trace: file for a profiler trace of the last variant's step, or "".
    """
    environment = describe_environment(precision)
    args = ["--preset", preset, "--data.batch_size", str(batch), "--engine.precision", precision, *args]
    processes: list[VariantProcess] = []
    try:
        processes += [VariantProcess(variant, args) for variant in chosen]
        for process in processes:  # one after the other: building takes the memory of a step, and all cores
            process.request("build")
        seconds: dict[str, list[float]] = {variant.name: [] for variant in chosen}
        for _ in range(rounds):
            for process in processes:
                seconds[process.variant.name].append(statistics.median(process.request(f"time {steps}")))
        rows = []
        for process in processes:
            name = process.variant.name
            ratios = [base / own for base, own in zip(seconds[chosen[0].name], seconds[name], strict=True)]
            peak, counts = process.request("peak"), process.request("count")  # in this order: counting takes memory
            rows.append(
                environment
                | {
                    "variant": name,
                    "preset": preset,
                    "batch": batch,
                    "images_per_s": round(batch / statistics.median(seconds[name]), 3),
                    "ratio": round(statistics.median(ratios), 3),
                    "ratio_low": round(min(ratios), 3),
                    "ratio_high": round(max(ratios), 3),
                    "flops_per_image": round(counts["flops"]),
                    "peak_bytes": peak,
                    "host_syncs": counts["host_syncs"],
                }
            )
        if trace:
            file = Path(trace).with_stem(f"{Path(trace).stem}_{preset}")
            print(processes[-1].request(f"profile {file}"))
            print(f"trace of {chosen[-1].name}: {file}")
    finally:
        for process in processes:
            process.kill()
    return rows


def describe_environment(precision: str) -> dict[str, Any]:
    """Return the columns that all rows share: date, hardware, versions, commit and precision."""
    gpu = torch.cuda.is_available()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} CPU cores",
        "torch": torch.__version__,
        "deepspeed": metadata.version("deepspeed"),
        "commit": os.environ.get("DDAE_COMMIT") or git("rev-parse", "--short", "HEAD"),
        "precision": precision,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows of one preset."""
    print(f"\n{rows[0]['preset']}, batch {rows[0]['batch']}, {rows[0]['precision']}, {rows[0]['hardware']}")
    ratio = f"x {rows[0]['variant']} (lowest to highest)"
    print(f"variant          images/s   {ratio:27}   GFLOP/image   peak GiB   host syncs")
    for row in rows:
        spread = f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
        print(
            f"{row['variant']:12} {row['images_per_s']:9.2f}   {row['ratio']:7.2f} {spread:19}   "
            f"{row['flops_per_image'] / 1e9:11.1f}   {row['peak_bytes'] / 2**30:8.2f}   {row['host_syncs']:10}"
        )


def append_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """Append rows to a CSV file; a new file gets a header."""
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def draw_bars(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw images/s relative to the first variant as bars, one panel for each preset and batch size."""
    panels = list(dict.fromkeys((row["preset"], row["batch"]) for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(1 + 3.6 * len(panels), 2.9), squeeze=False, sharey=True)
    for axis, (preset, batch) in zip(axes[0], panels, strict=True):
        of_panel = [row for row in rows if (row["preset"], row["batch"]) == (preset, batch)]
        names, ratios = ([row[key] for row in reversed(of_panel)] for key in ("variant", "ratio"))
        bars = axis.barh(names, ratios, color="#0b6e99", height=0.62)
        axis.bar_label(bars, [f" {ratio:.2f} x" for ratio in ratios], fontsize=8)
        axis.axvline(1, color="#444444", linewidth=0.8)
        axis.set_title(f"{preset}, batch {batch}", fontsize=9)
        axis.set_xlabel(f"images/s relative to {of_panel[0]['variant']}", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.2)
    figure.suptitle(f"{rows[0]['hardware']}, {rows[0]['precision']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
