"""Measure the speed of the training step, the image loaders, sharding, or evaluations, each relative to a baseline.

`peers` trains MAE with transformers and lightly, too, and compares speed, memory and k-NN. `saves` measures how long
training stops for a checkpoint.

python launch/benchmark.py step --preset ddae_vit_s16_100e mae_vit_s16_100e --json step.json
python launch/benchmark.py step --scale small --preset mae_vit_s16_100e --data data/photos --steps 10
python launch/benchmark.py peers --scale micro --data data/photos
python launch/benchmark.py loader --data data/imagenet
python launch/benchmark.py sharding --data ILSVRC2012_img_train.tar
python launch/benchmark.py index --rows 1000000 14000000 100000000
python launch/benchmark.py evaluation
python launch/benchmark.py saves --preset ddae_vit_s16_100e
"""

import argparse
import os

from ddae.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ("step", "peers", "saves", "loader", "sharding", "index", "evaluation")
    parser.add_argument("what", choices=choices, help="what to measure")
    parser.add_argument("--data", default="", help="a folder of shards; sharding: an image archive")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes or threads (default: all cores)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved measurements of each candidate (default: 5)")
    parser.add_argument("--seconds", type=float, default=8, help="length of a loader measurement (default: 8)")
    parser.add_argument("--simd", default="", help="folder with pillow-simd, to measure it too: make .simd")
    parser.add_argument("--out", default="", help="append the rows to OUT.csv and draw OUT.png")
    parser.add_argument("--json", default="", help="step, peers, saves: write all rows to this file")
    parser.add_argument("--scale", default="", help="peers: a small scale; step: its pretraining beside a plain loop")
    parser.add_argument("--steps", type=int, default=0, help="a variant and round (default: 1; GPU: 5); peers: in all")
    parser.add_argument("--rows", type=int, nargs="+", default=[10**6], help="index: images of simulated data sets")
    step = parser.add_argument_group("step only", "any flag of launch/pretrain.py may follow; also after peers, saves")
    step.add_argument("--preset", nargs="+", default=[], help="default: DDAE ViT-S; on a GPU also ViT-B, ViT-L and MAE")
    step.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=[],
        help="images a step and rank (default: 16; on a GPU 256; --fake_ranks: 64)",
    )
    step.add_argument("--precision", default="", help="default: fp32; on a GPU bf16")
    step.add_argument("--variants", nargs="+", default=[], help="variants to measure, by name (default: all)")
    step.add_argument("--launches", action="store_true", help="count operator launches and host time by phase instead")
    step.add_argument(
        "--before", default="", help="with --launches: an older checkout, and flags for it, to compare with"
    )
    step.add_argument("--fake_ranks", action="store_true", help="as one of 64 GPUs, of which the others do not exist")
    step.add_argument("--profile", default="", help="write a profiler trace of the last variant's step to this file")
    args, pretrain_args = parser.parse_known_args()
    if args.what not in ("step", "peers", "saves") and pretrain_args:
        raise UserError(f"{args.what} has no flag {pretrain_args[0]}. --help lists all flags.")
    if args.what in ("loader", "sharding") and not args.data:
        raise UserError(f"--data is missing; {args.what} needs images. Pass --data with shards or an archive.")
    # Imported here because they take seconds.
    if args.what == "step" and args.launches:
        from ddae.tools.bench_launches import benchmark_launches

        benchmark_launches(args, pretrain_args)
    elif args.what == "step":
        from ddae.tools.bench_step import benchmark_step

        benchmark_step(args, pretrain_args)
    elif args.what == "saves":
        from ddae.tools.bench_saves import benchmark_saves

        benchmark_saves(args, pretrain_args)
    elif args.what == "peers":
        from ddae.tools.bench_peers import benchmark_peers

        benchmark_peers(args, pretrain_args)
    elif args.what == "loader":
        from ddae.tools.bench_data import benchmark_loaders

        benchmark_loaders(args.data, args.workers, args.rounds, args.seconds, args.simd, args.out)
    elif args.what == "sharding":
        from ddae.tools.bench_data import benchmark_sharding

        benchmark_sharding(args.data, args.workers, args.rounds, args.out)
    elif args.what == "index":
        from ddae.tools.bench_index import benchmark_index

        benchmark_index(args.rows, args.out)
    else:
        from ddae.tools.bench_eval import benchmark_evaluation

        benchmark_evaluation(args.rounds, args.out)
