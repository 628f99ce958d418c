"""Measure how fast a training step is, images are loaded, or shards are made, against what else does it; or what
evaluations cost.

python launch/benchmark.py step --preset ddae_vit_s16_100e mae_vit_s16_100e --json step.json
python launch/benchmark.py loader --data data/imagenet
python launch/benchmark.py sharding --data ILSVRC2012_img_train.tar
python launch/benchmark.py evaluation
"""

import argparse
import json
import os
import platform
from pathlib import Path

from ddae.errors import UserError, run_command
from ddae.tools.bench_data import loader_rates, pixel_differences, sharding_rates, show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "loader", "sharding", "evaluation"))
    parser.add_argument(
        "--data", default="", help="shards for loader and step, images as for shard_imagenet.py for sharding"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes or threads")
    parser.add_argument("--rounds", type=int, default=5, help="times that each way is measured, in turn")
    parser.add_argument("--seconds", type=float, default=8, help="of one measurement")
    parser.add_argument("--simd", default="", help="folder that pillow-simd is installed into: make .simd")
    parser.add_argument("--out", default="", help="append rows to OUT.csv and draw OUT.png")
    step = parser.add_argument_group("of step", "any flag of launch/pretrain.py may follow")
    step.add_argument("--preset", nargs="+", default=[], help="left out: DDAE of ViT-S, on a GPU of S, B, L, and MAE")
    step.add_argument("--batch", type=int, nargs="+", default=[], help="images a step; left out: 16, on a GPU 256")
    step.add_argument("--precision", default="", help="left out: fp32, on a GPU bf16")
    step.add_argument("--variants", nargs="+", default=[], help="left out: all")
    step.add_argument("--steps", type=int, default=0, help="of a turn; left out: 1, on a GPU 5")
    step.add_argument("--json", default="", help="write all rows to this file")
    step.add_argument("--profile", default="", help="write a trace of the last variant's step to this file")
    args, others = parser.parse_known_args()
    if args.what == "step":
        measure_step(args, others)
        return
    if others:
        raise UserError(f"{args.what} has no flag {others[0]}")
    about = f"{args.workers} workers, {os.cpu_count()} cores, {platform.machine()}"
    if args.what == "evaluation":
        from ddae.tools.bench_eval import neighbour_seconds, probe_rates  # seconds to import

        show(probe_rates(args.rounds), "one head", f"a linear probe's step, {os.cpu_count()} cores", args.out)
        print(f"5,000 images find their 20 nearest of 50,000 (width 384) in {neighbour_seconds():.1f} s")
        return
    if not args.data:
        raise UserError(f"{args.what} wants --data")
    if args.what == "sharding":
        show(sharding_rates(args.data, args.workers, args.rounds), "decoding alone", about, args.out)
        return
    rates = loader_rates(args.data, args.workers, args.rounds, args.seconds, args.simd)
    show(rates, "torchvision", about, args.out)
    mean, largest = pixel_differences(args.data)
    print(f"Pillow's and DALI's crops differ by {mean:.2f} of 255 on average, by {largest:.2f} in the worst image")


def measure_step(args: argparse.Namespace, others: list[str]) -> None:
    import torch  # seconds to import

    from ddae.tools.bench_step import draw, keep, run_variants, show, variants

    gpu, rows = torch.cuda.is_available(), []
    known = {variant.name: variant for variant in variants(gpu)}
    if unknown := [name for name in args.variants if name not in known]:
        raise UserError(f"unknown variant {unknown[0]!r}. Choose from {', '.join(known)}.")
    chosen = [known[name] for name in args.variants or known]
    presets = args.preset or ([f"ddae_vit_{size}16_100e" for size in "sbl"] + ["mae_vit_b16_100e"])[: 4 if gpu else 1]
    zero = "zero2" if gpu else "zero0"
    data = ["--data.train", args.data] if args.data else ["--data.backend", "synthetic"]
    more = ["--ds_config", str(Path(__file__).parent.parent / "ds_configs" / f"{zero}.json"), *data, *others]
    precision, steps = args.precision or ("bf16" if gpu else "fp32"), args.steps or (5 if gpu else 1)
    for preset in presets:
        for batch in args.batch or [256 if gpu else 16]:
            found = run_variants(preset, batch, precision, more, chosen, args.rounds, steps, args.profile)
            show(found)
            rows += found
            if args.json:  # preset by preset: what is measured is kept, whatever happens next
                Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
            if args.out:
                keep(found, Path(args.out).with_suffix(".csv"))
                draw(rows, Path(args.out).with_suffix(".png"))


if __name__ == "__main__":
    run_command("benchmark", main)
