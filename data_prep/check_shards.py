"""Verify shards against their manifest: exit code 0 where all is well, 1 with a list of what is not.

python data_prep/check_shards.py data/imagenet           # sizes and indexes: seconds
python data_prep/check_shards.py data/imagenet --full    # and every hash, every image decoded
"""

import argparse
import os
from pathlib import Path

from ddae.errors import run_command
from ddae.sharding.check import check, mark_bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of shards with its manifest.json")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--fast", action="store_true", help="sizes and indexes alone, the default")
    depth.add_argument("--full", action="store_true", help="hashes too, and decode every image")
    parser.add_argument("--mark_bad", action="store_true", help="--full, and list what does not decode in the manifest")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; all cores by default")
    args = parser.parse_args()
    args.full = args.full or args.mark_bad
    problems, images = check(args.folder, args.full, max(1, args.workers))
    for problem in problems:
        print(problem)
    if args.mark_bad:
        print(f"{mark_bad(args.folder, problems)} images are listed as bad: training leaves them out")
    how = "hashes and images" if args.full else "sizes and indexes"
    print(f"{args.folder}: {images} images, {how} checked: {len(problems) or 'no'} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    run_command("check_shards", main)
