"""MAE in other libraries beside this project's: speed, memory, and k-NN after the same number of images.

All train a model of the same shape on the same batches, each in its own process (bench_worker.py), in turns, so that
machine noise cancels. Needs the extra `peers`.
"""

import json
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from ddae.config.scales import SCALES
from ddae.errors import UserError
from ddae.tools import bench_step
from ddae.tools.bench_report import append_csv, draw_bars
from ddae.tools.peers import PEERS

PRESET = "mae_vit_s16_100e"


def benchmark_peers(flags: Namespace, args: list[str]) -> None:
    """Train MAE with each library and with this project; print, save and draw the rows.

    flags: those of launch/benchmark.py. args: further arguments of launch/pretrain.py. Raise UserError if the data or a
    library are missing.
    """
    if not flags.data:
        raise UserError("--data is missing; peers needs shards with the splits train and val and with classes.")
    if flags.scale not in (scales := [name for name, scale in SCALES.items() if scale is not None]):
        raise UserError(f"--scale is {flags.scale!r}; expected one of {', '.join(scales)}.")
    if missing := [name for name in PEERS if find_spec(name) is None]:
        raise UserError(f"{' and '.join(missing)} cannot be imported. Install them: pip install 'ddae[peers]'.")
    scale = SCALES[flags.scale]
    num_steps = flags.steps or scale.steps
    variants = [bench_step.Variant("ddae", "ddae", ()), *(bench_step.Variant(name, name, ()) for name in PEERS)]
    environment = bench_step.describe_environment("fp32")
    args = ["--preset", PRESET, "--engine.precision", "fp32", "--data.train", flags.data, *args]
    args = ["--ds_config", str(bench_step.DS_CONFIGS / "zero0.json"), *args]
    processes: list[bench_step.VariantProcess] = []
    try:
        for variant in variants:
            processes.append(bench_step.VariantProcess(variant, flags.scale, args, num_steps))
            processes[-1].request("build 0")
        untrained = [process.request("knn") for process in processes]
        chunk = max(1, num_steps // flags.rounds)
        by_round = [[median(each.request(f"time {chunk}")) for each in processes] for _ in range(flags.rounds)]
        rows = []
        for process, seconds, before in zip(processes, zip(*by_round, strict=True), untrained, strict=True):
            ratios = [own / first for (first, *_), own in zip(by_round, seconds, strict=True)]
            peak, after = process.request("peak"), process.request("knn")  # in this order: features take memory
            columns: dict[str, Any] = {"library": process.variant.name, "scale": flags.scale}
            columns |= {"images_per_s": round(scale.batch_size / median(seconds), 1)}
            columns |= {"ddae_over_it": round(median(ratios), 3), "lowest": round(min(ratios), 3)}
            columns |= {"highest": round(max(ratios), 3), "peak_bytes": peak}
            columns |= {"images": chunk * flags.rounds * scale.batch_size, "untrained": round(before["knn"], 2)}
            rows.append(environment | columns | {name: round(value, 2) for name, value in after.items()})
    finally:
        for process in processes:
            process.kill()
    _print_table(rows)
    if flags.json:
        Path(flags.json).write_text(json.dumps(rows, indent=1) + "\n")
    if flags.out:
        append_csv(rows, Path(flags.out).with_suffix(".csv"))
        bars = {row["library"]: 1 / row["ddae_over_it"] for row in rows}
        title = f"MAE at the scale {flags.scale}, {rows[0]['hardware']}"
        draw_bars({"": bars}, "ddae", title, Path(flags.out).with_suffix(".png"))


def _print_table(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    print(f"\nMAE at the scale {first['scale']}, {first['images']} images, {first['hardware']}")
    print(f"k-NN top-1 in %; raw pixels {first['raw_pixels']:.2f}, chance {first['chance']:.2f}")
    print("library        images/s   ddae / it (lowest to highest)   peak GiB   untrained    k-NN")
    for row in rows:
        spread = f"({row['lowest']:.2f} to {row['highest']:.2f})"
        print(
            f"{row['library']:12} {row['images_per_s']:10.1f}   {row['ddae_over_it']:9.2f} {spread:19} "
            f"{row['peak_bytes'] / 2**30:10.2f}   {row['untrained']:9.2f}   {row['knn']:5.2f}"
        )
