"""Verify shards against their manifest. Exit code 0: no problems; 1: problems, which are listed.

python data_prep/check_shards.py data/imagenet           # sizes and indexes; takes seconds
python data_prep/check_shards.py data/imagenet --full    # also hash every shard and decode every image
python data_prep/check_shards.py data/old --index        # index shards of version 0.1
"""

import argparse
import os
from pathlib import Path

from ddae.sharding.check import check, make_index, mark_bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of shards with a manifest.json")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--fast", action="store_true", help="check sizes and indexes only (default)")
    depth.add_argument("--full", action="store_true", help="also hash every shard and decode every image")
    parser.add_argument("--mark_bad", action="store_true", help="--full, and let training skip undecodable images")
    parser.add_argument("--index", action="store_true", help="write the index by which large data sets are opened")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (all cores)")
    args = parser.parse_args()
    if args.index:
        print(f"{args.folder}: {make_index(args.folder)} images indexed")
    full = args.full or args.mark_bad
    problems, num_images = check(args.folder, full, max(1, args.workers))
    for problem in problems:
        print(problem)
    if args.mark_bad:
        print(f"{mark_bad(args.folder, problems)} images are marked as bad in the manifest; training skips them")
    checked = "hashes and images" if full else "sizes and indexes"
    print(f"{args.folder}: {num_images} images, {checked} checked, {len(problems) or 'no'} problems")
    return 1 if problems else 0
