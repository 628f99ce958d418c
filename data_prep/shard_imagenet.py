"""Turn ImageNet's archives, or any folder, archive or shards of images, into verified, shuffled shards.

    python data_prep/shard_imagenet.py --train ILSVRC2012_img_train.tar \\
        --val ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.tar.gz --out data/imagenet

Nothing is unpacked; every image is decoded; the same command goes on where a killed one was. report.txt in the
folder names every image that was not a plain RGB JPEG.
"""

import argparse
import os
import re
from pathlib import Path

from ddae.errors import UserError, run_command
from ddae.sharding.imagenet_devkit import read_devkit
from ddae.sharding.sharder import Settings, shard
from ddae.sharding.sources import UNLABELLED, index


def size(text: str) -> int:
    """'500M' or '1G' -> bytes."""
    parts = re.fullmatch(r"(\d+)([KMG]?)B?", text.upper())
    if parts is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write 500M or 1G")
    return int(parts[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[parts[2]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = "a tar of class tars, a flat tar, a folder of class folders or of images, or shards (pattern or folder)"
    parser.add_argument("--train", help=f"training images: {sources}")
    parser.add_argument("--val", help="validation images, likewise; a flat tar or folder needs --devkit")
    parser.add_argument("--devkit", type=Path, help="ILSVRC2012_devkit_t12.tar.gz, or its folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; all cores by default")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="of the order of the images")
    parser.add_argument("--max_count", type=int, default=Settings.max_count, help="largest number of images a shard")
    parser.add_argument("--max_size", type=size, default=Settings.max_size, help="largest size of a shard, as 500M")
    parser.add_argument("--resize_shorter", type=int, default=0, help="make larger images' shorter side so many pixels")
    parser.add_argument("--quality", type=int, default=Settings.quality, help="of JPEGs that are written anew")
    parser.add_argument(
        "--on_bad",
        choices=("keep", "stop", "drop_all"),
        default=Settings.on_bad,
        help="images that are no plain RGB JPEG: convert what is usable, stop at the first, or leave all out",
    )
    args = parser.parse_args()
    for name, low, high in (
        ("workers", 1, 1024),
        ("seed", 0, 2**32 - 1),
        ("max_count", 1, 10**6),
        ("max_size", 1 << 10, 1 << 40),
        ("resize_shorter", 0, 1 << 14),
        ("quality", 1, 100),
    ):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} is {getattr(args, name)}: choose a number from {low} to {high}")
    if not (args.train or args.val):
        raise UserError("neither --train nor --val is given: name what shall be sharded")
    devkit = None if args.devkit is None else read_devkit(args.devkit)
    indexes, classes = [], None
    for split in ("train", "val"):
        if getattr(args, split):
            if args.out.resolve().is_relative_to(Path(getattr(args, split)).resolve()):
                raise UserError(f"--out {args.out} is --{split} itself or within it: name another folder")
            print(f"reading where the images of --{split} lie", flush=True)
            indexes.append(index(split, getattr(args, split), classes, devkit if split == "val" else None))
            classes = indexes[0].classes if (indexes[0].label != UNLABELLED).all() else None
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    about = {} if devkit is None else {"class_words": dict(zip(devkit.synsets, devkit.words, strict=True))}
    print(shard(indexes, args.out, settings, args.workers, **about))


if __name__ == "__main__":
    run_command("shard_imagenet", main)
