"""Convert the zip of ADE20K to shards of images and masks for segmentation. The zip is not unpacked to disk.

    python data_prep/prepare_ade20k.py ADEChallengeData2016.zip --out data/ade20k

The zip is SceneParse150's (150 classes, 8-bit masks) or that of the full ADE20K of 2016 or 2021 (16-bit masks).
report.json in the output folder lists every image that was converted or left out.
"""

import argparse
from pathlib import Path

from ddae.sharding.ade20k import prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zip", type=Path, help="ADEChallengeData2016.zip, ADE20K_2016_07_26.zip, ...")
    parser.add_argument("--out", type=Path, default=Path("data/ade20k"), help="output folder (%(default)s)")
    parser.add_argument("--per_shard", type=int, default=500, help="samples per shard (%(default)s)")
    args = parser.parse_args()
    print(prepare(args.zip, args.out, args.per_shard))
