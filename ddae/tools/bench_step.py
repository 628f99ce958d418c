"""Throughput of the training step, variant by variant, from naive.py to what pretraining runs.

Each variant is measured in its own process (bench_worker.py). Variants are interleaved so that machine noise cancels:
the reported ratio is the median over rounds of images/s relative to the first variant in the same round.
"""

import contextlib
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from importlib import metadata
from itertools import product
from pathlib import Path
from statistics import median
from subprocess import PIPE, STDOUT, Popen
from typing import Any, NamedTuple

import torch

from ddae.config.scales import SCALES
from ddae.errors import UserError
from ddae.tools.bench_report import append_csv, draw_bars
from ddae.tools.launch_count import RANKS
from ddae.training.run_dir import git

WARMUP_STEPS = 2  # of each process, before the measurement
DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"


class Variant(NamedTuple):
    """A way to compute the training step."""

    name: str
    # naive: naive.py with plain DeepSpeed; engine: naive.py with ddae's Engine; ddae: what pretraining runs; plain: a
    # plain loop around the same model, on images in memory
    kind: str
    args: tuple[str, ...]  # arguments of launch/pretrain.py
    huge_pages: bool = False  # back large CPU tensors with huge pages
    checkout: str = ""  # folder of another version of this project, to run that


AT_SCALE = [Variant("plain loop", "plain", ()), Variant("pretraining", "ddae", ())]  # with --scale
PLAIN = ("--engine.loss_backend", "reference", "--engine.tap_execution", "batched")
DEEPSPEED = ("--engine.gradient_reduction", "deepspeed")
LEAN = ("--engine.gradient_reduction", "lean")
GRAPHS = ("--engine.compile", "--engine.teacher_graph", "--engine.student_graphs")
LAUNCH_VARIANTS = [  # with --launches; each one but the first adds one saving of host time to the one before it
    Variant("modules", "ddae", ("--engine.no_direct_calls", *DEEPSPEED)),
    Variant("direct calls", "ddae", DEEPSPEED),
    Variant("lean reduction", "ddae", LEAN),
    Variant("graphs", "ddae", (*LEAN, *GRAPHS)),
]
OF_A_RANK = [  # with --fake_ranks: one GPU of many; each one but the first adds one setting to the first
    Variant("default", "ddae", ()),
    Variant("lean reduction", "ddae", LEAN),
    Variant("teacher stream", "ddae", ("--engine.teacher_stream",)),
    Variant("teacher graph", "ddae", ("--engine.teacher_graph",)),
    Variant("compiled", "ddae", ("--engine.compile",)),
    Variant("graphs", "ddae", GRAPHS),
]
ON_GPU_ONLY = ("teacher stream", "teacher graph", "compiled", "graphs")


def variants(gpu: bool) -> list[Variant]:
    """Return the variants for a GPU or a CPU. Each one but the first adds one optimisation to the one before it."""
    found = [
        Variant("naive", "naive", PLAIN),
        Variant("engine", "engine", PLAIN),
        Variant("one batch", "ddae", (*PLAIN, "--engine.no_skip_unused_tokens")),
        Variant("shortcuts", "ddae", PLAIN),
    ]
    if gpu:
        batched = PLAIN[2:]
        found.append(Variant("triton", "ddae", batched))
        found.append(Variant("compiled", "ddae", (*batched, "--engine.compile")))
        found.append(Variant("two streams", "ddae", (*batched, "--engine.compile", "--engine.teacher_stream")))
        found.append(Variant("teacher graph", "ddae", (*found[-1].args, "--engine.teacher_graph")))
        found.append(Variant("student graphs", "ddae", (*found[-1].args, "--engine.student_graphs")))
    else:
        found.append(Variant("huge pages", "ddae", PLAIN, huge_pages=True))
        found.append(Variant("tap by tap", "ddae", ("--engine.tap_execution", "sequential"), huge_pages=True))
    return found


def benchmark_step(flags: Namespace, args: Sequence[str]) -> None:
    """Measure the variants for each preset and batch size, and print, save and draw the rows.

    flags: those of launch/benchmark.py; an empty or zero value is replaced by a default that depends on the device.
    args: further arguments of launch/pretrain.py. Raise UserError for an unknown variant, or if a variant fails.
    """
    gpu, rows, panels = torch.cuda.is_available(), [], {}
    of_a_rank = [variant for variant in OF_A_RANK if gpu or variant.name not in ON_GPU_ONLY]
    candidates = AT_SCALE if flags.scale else of_a_rank if flags.fake_ranks else variants(gpu)
    available = {variant.name: variant for variant in candidates}
    if flags.scale and flags.fake_ranks:
        raise UserError("--scale and --fake_ranks exclude each other. Choose one.")
    if flags.scale not in ("", *SCALES):
        raise UserError(f"unknown scale {flags.scale!r}. Choose from {', '.join(SCALES)}.")
    if flags.scale and not flags.data:
        raise UserError("--data is missing; a scale needs shards.")
    if unknown := [name for name in flags.variants if name not in available]:
        raise UserError(f"unknown variant {unknown[0]!r}. Choose from {', '.join(available)}.")
    chosen = [available[name] for name in flags.variants or available]
    presets = ([f"ddae_vit_{size}16_100e" for size in "sbl"] + ["mae_vit_b16_100e"])[: 4 if gpu else 1]
    data = ["--data.train", flags.data] if flags.data else ["--data.backend", "synthetic"]
    args = ["--ds_config", str(DS_CONFIGS / ("zero2.json" if gpu else "zero0.json")), *data, *args]
    batches = flags.batch or [64 if flags.fake_ranks else 256 if gpu else 16]
    if (scale := SCALES.get(flags.scale)) is not None:
        batches = [scale.batch_size]
    for preset, batch in product(flags.preset or presets, batches):
        of_preset: list[dict[str, Any]] = []
        for of_preset in run_variants(preset, batch, chosen, flags, args):
            if flags.json:  # rewritten after every round, so that an interrupted benchmark keeps its rows
                write_json(rows + of_preset, Path(flags.json))
        print_table(of_preset)
        rows += of_preset
        panels[f"{preset}, batch {batch}"] = {row["variant"]: row["ratio"] for row in of_preset}
        if flags.out:
            append_csv(of_preset, Path(flags.out).with_suffix(".csv"))
            title = f"{rows[0]['hardware']}, {rows[0]['precision']}"
            draw_bars(panels, chosen[0].name, title, Path(flags.out).with_suffix(".png"))


def write_json(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the rows of a benchmark."""
    path.write_text(json.dumps(rows, indent=1) + "\n")


PIPES: dict[str, Any] = {"stdin": PIPE, "stdout": PIPE, "stderr": STDOUT}


class VariantProcess:
    """A process that runs one variant and answers requests (bench_worker.py)."""

    def __init__(self, variant: Variant, scale: str, args: Sequence[str], num_steps: int = 0, fake_ranks: bool = False):
        """fake_ranks: count launches as bench_launches.py does, as one of many ranks."""
        self.variant = variant
        args = [*args, *variant.args]
        task = {"kind": variant.kind, "num_steps": num_steps, "scale": scale, "args": args, "fake_ranks": fake_ranks}
        environment = os.environ | {"THP_MEM_ALLOC_ENABLE": str(int(variant.huge_pages)), "DDAE_CHECK": "0"}
        if variant.checkout:
            environment["PYTHONPATH"] = f"{variant.checkout}:{variant.checkout}/kernels"
        if fake_ranks and not torch.cuda.is_available():
            environment |= {"TRITON_INTERPRET": "1"}  # so that Triton's kernels can be imported
        command = [sys.executable, "-m", "ddae.tools.bench_worker", json.dumps(task)]
        self._process = Popen(command, env=environment, text=True, cwd=variant.checkout or None, **PIPES)
        self._output: list[str] = []

    def request(self, request: str) -> Any:
        """Send a request and return its result. Raise UserError with the last output if the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(request, file=self._process.stdin, flush=True)
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
    preset: str, batch: int, chosen: Sequence[Variant], flags: Namespace, args: Sequence[str]
) -> Iterator[list[dict[str, Any]]]:
    """Yield after each round a row for each variant, of all rounds so far. flags, args: see benchmark_step()."""
    gpu, ranks = torch.cuda.is_available(), RANKS if flags.fake_ranks else 1
    precision = flags.precision or ("bf16" if gpu else "fp32")
    steps = flags.steps or (5 if gpu else 1)
    environment = describe_environment(precision)
    args = ["--preset", preset, "--data.batch_size", str(batch * ranks), "--engine.precision", precision, *args]
    processes: list[VariantProcess] = []
    try:
        processes += [VariantProcess(variant, flags.scale, args, fake_ranks=flags.fake_ranks) for variant in chosen]
        constant = []  # what does not change from round to round
        for process in processes:  # one after the other: building takes the memory of a step, and all cores
            process.request(f"build {WARMUP_STEPS}")
            peak, counts = process.request("peak"), process.request("count")  # in this order: counting takes memory
            columns = {
                "peak_bytes": peak,
                "flops_per_image": round(counts["flops"]),
                "host_syncs": counts["host_syncs"],
            }
            constant.append(columns | {"gpu_ms": process.request("gpu")})
        by_round, host = [], []
        for _ in range(flags.rounds):
            by_round.append([median(process.request(f"time {steps}")) for process in processes])
            host.append([sum(process.request(f"host {steps}").values()) for process in processes])
            rows = []
            for number, process in enumerate(processes):
                seconds = [each[number] for each in by_round]
                ratios = [each[0] / own for each, own in zip(by_round, seconds, strict=True)]
                columns = {
                    "variant": process.variant.name,
                    "preset": preset,
                    "batch": batch,  # of a rank
                    "ranks": ranks,
                    "images_per_s": round(batch / median(seconds), 3),
                    "ratio": round(median(ratios), 3),
                    "ratio_low": round(min(ratios), 3),
                    "ratio_high": round(max(ratios), 3),
                    "step_ms": round(1000 * median(seconds), 2),
                    "host_ms": round(median(each[number] for each in host), 2),
                }
                rows.append(environment | columns | constant[number])
            yield rows
        if flags.profile:
            file = Path(flags.profile).with_stem(f"{Path(flags.profile).stem}_{preset}")
            print(processes[-1].request(f"profile {file}"))
            print(f"trace of {chosen[-1].name}: {file}")
    finally:
        for process in processes:
            process.kill()


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
    ranks = f" of a rank of {rows[0]['ranks']}" if rows[0]["ranks"] > 1 else ""
    print(f"\n{rows[0]['preset']}, batch {rows[0]['batch']}{ranks}, {rows[0]['precision']}, {rows[0]['hardware']}")
    ratio = f"x {rows[0]['variant']} (lowest to highest)"
    print(f"variant          images/s   {ratio:27}   step ms   host ms   GPU ms   GFLOP/image   peak GiB   host syncs")
    for row in rows:
        spread = f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
        gpu_ms = "" if row["gpu_ms"] is None else f"{row['gpu_ms']:.1f}"
        print(
            f"{row['variant']:14} {row['images_per_s']:10.2f}   {row['ratio']:6.2f} {spread:20}   "
            f"{row['step_ms']:7.1f}   {row['host_ms']:7.1f}   {gpu_ms:>6}   "
            f"{row['flops_per_image'] / 1e9:11.1f}   {row['peak_bytes'] / 2**30:8.2f}   {row['host_syncs']:10}"
        )
