"""Operator launches and host time of a training step, by phase, on any machine.

The model has the blocks, taps and branches of its preset, and so little width that the operators themselves take
no time; the other ranks are torch's fake process group. Without a GPU the Triton kernels are empty functions that count
as one launch each, so that their own launch time is missing.
"""

import math
import shlex
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ddae.config.presets import preset as load_preset
from ddae.errors import UserError
from ddae.tools.bench_step import LAUNCH_VARIANTS, Variant, VariantProcess, describe_environment, write_json
from ddae.tools.launch_count import RANKS

PATCH, GRID = 2, 2  # of the narrow model, whose widths are multiples of WIDTH
WIDTH = 4


def narrow_arguments(name: str) -> list[str]:
    """Return arguments of launch/pretrain.py that make a preset's model narrow, and its images few patches."""
    config = load_preset(name)
    arguments = ["--model.width", str(math.lcm(WIDTH, config.model.heads)), "--model.patch_size", str(PATCH)]
    arguments += ["--model.image_size", str(PATCH * GRID), "--data.batch_size", str(RANKS)]
    for branch, of in (("pixel", config.pixel), ("feature", config.feature)):
        arguments += [f"--{branch}.decoder_width", str(math.lcm(WIDTH, of.decoder_heads))]
    return arguments


def benchmark_launches(flags: Namespace, args: Sequence[str]) -> None:
    """Measure LAUNCH_VARIANTS, alternating, and print and save the rows. args: further ones of launch/pretrain.py.

    flags.before: a checkout of an earlier version, and arguments for it; it becomes the first row.
    """
    variants = LAUNCH_VARIANTS
    if flags.before:
        checkout, *earlier = shlex.split(flags.before)
        if not Path(checkout, "ddae").is_dir():
            raise UserError(f"--before names {checkout}, which is no checkout of this project.")
        variants = [Variant("before", "ddae", tuple(earlier), checkout=str(Path(checkout).resolve())), *variants]
    for name in flags.preset or ["ddae_vit_b16_100e"]:
        if name in ("demo", "own"):
            raise UserError(f"--launches cannot narrow the preset {name}. Choose one such as ddae_vit_b16_100e.")
        arguments = ["--preset", name, *narrow_arguments(name), "--data.backend", "synthetic"]
        arguments += ["--engine.loss_backend", "triton", "--ds_config", "zero2", *args]
        processes: list[VariantProcess] = []
        try:
            processes += [VariantProcess(each, "", arguments, fake_ranks=True) for each in variants]
            for process in processes:
                process.request("build 5")
            rounds = [[each.request(f"host {flags.steps or 10}") for each in processes] for _ in range(flags.rounds)]
            rows = []
            for number, process in enumerate(processes):
                counted = process.request("launches 1")
                by_phase = {p: round(median(each[number][p] for each in rounds), 2) for p in rounds[0][number]}
                ratios = [sum(each[number].values()) / sum(each[0].values()) for each in rounds]
                row = {"variant": process.variant.name, "preset": name, "launches": sum(counted.values())}
                row |= {"host_ms": round(sum(by_phase.values()), 2), "ratio": round(median(ratios), 3)}
                row |= {"launches_by_phase": counted, "host_ms_by_phase": by_phase}
                rows.append(describe_environment("bf16") | {"ranks": RANKS} | row)
        finally:
            for process in processes:
                process.kill()
        print_table(rows)
        if flags.json:
            write_json(rows, Path(flags.json))


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print launches and host time of each variant by phase."""
    phases = list(rows[0]["host_ms_by_phase"])
    print(f"\n{rows[0]['preset']}, ZeRO-2, {RANKS} ranks, bf16, narrow: launches and host ms a step")
    print("variant            launches   host ms   ratio   " + "   ".join(f"{phase:>10}" for phase in phases))
    for row in rows:
        cells = [f"{row['launches_by_phase'][p]:4} {row['host_ms_by_phase'][p]:5.1f}" for p in phases]
        total = f"{row['variant']:17} {row['launches']:9} {row['host_ms']:9.1f} {row['ratio']:7.2f}   "
        print(total + "   ".join(cells))
