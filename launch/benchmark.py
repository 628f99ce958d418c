"""Measure how fast images are loaded, or shards are made, against what else does it; or what evaluations cost.

python launch/benchmark.py loader --data data/imagenet
python launch/benchmark.py sharding --data ILSVRC2012_img_train.tar
python launch/benchmark.py evaluation
"""

import argparse
import os
import platform

from ddae.benchmark import loader_rates, pixel_differences, sharding_rates, show
from ddae.errors import UserError, command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("loader", "sharding", "evaluation"))
    parser.add_argument("--data", default="", help="shards for loader, images as for shard_imagenet.py for sharding")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes or threads")
    parser.add_argument("--rounds", type=int, default=5, help="times that each way is measured, in turn")
    parser.add_argument("--seconds", type=float, default=8, help="of one measurement")
    parser.add_argument("--simd", default="", help="folder that pillow-simd is installed into: make .simd")
    parser.add_argument("--out", default="", help="append rows to OUT.csv and draw OUT.png")
    words = parser.parse_args()
    about = f"{words.workers} workers, {os.cpu_count()} cores, {platform.machine()}"
    if words.what == "evaluation":
        from ddae.eval.benchmark import neighbour_seconds, probe_rates  # seconds to import

        show(probe_rates(words.rounds), "one head", f"a linear probe's step, {os.cpu_count()} cores", words.out)
        print(f"5,000 images find their 20 nearest of 50,000 (width 384) in {neighbour_seconds():.1f} s")
        return
    if not words.data:
        raise UserError(f"{words.what} wants --data")
    if words.what == "sharding":
        show(sharding_rates(words.data, words.workers, words.rounds), "decoding alone", about, words.out)
        return
    rates = loader_rates(words.data, words.workers, words.rounds, words.seconds, words.simd)
    show(rates, "torchvision", about, words.out)
    mean, largest = pixel_differences(words.data)
    print(f"Pillow's and DALI's crops differ by {mean:.2f} of 255 on average, by {largest:.2f} in the worst image")


if __name__ == "__main__":
    command("benchmark", main)
