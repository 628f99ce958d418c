"""Convert ImageNet's archives, or any folder, archive or shards of images, to verified, shuffled shards.

    python data_prep/shard_imagenet.py --train ILSVRC2012_img_train.tar \\
        --val ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.tar.gz --out data/imagenet

Nothing is unpacked to disk, and every image is decoded. After an interruption the same command resumes. report.txt in
the output folder lists every image that was not a plain RGB JPEG.
"""

import argparse
import os
import re
from pathlib import Path

from ddae.errors import UserError
from ddae.sharding.imagenet_devkit import read_devkit
from ddae.sharding.index import UNLABELLED
from ddae.sharding.scan import LabelRule
from ddae.sharding.sharder import Settings, preview, shard
from ddae.sharding.sources import build_index, describe


def size(text: str) -> int:
    """Return the bytes of a size such as 500M or 1G."""
    parts = re.fullmatch(r"(\d+)([KMG]?)B?", text.upper())
    if parts is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size. Expected a number with K, M or G, such as 500M.")
    return int(parts[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[parts[2]]


def parse_args() -> argparse.Namespace:
    """Return the arguments. Raise UserError if one is out of range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = "a tar of class tars, a flat tar, a folder of class folders or of images, or shards (pattern or folder)"
    parser.add_argument("--train", help=f"training images: {sources}")
    parser.add_argument("--val", help="validation images: as --train; a flat tar or folder requires --devkit")
    parser.add_argument("--devkit", type=Path, help="ILSVRC2012_devkit_t12.tar.gz, or the folder unpacked from it")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    numbers = (  # name, type, default, smallest and largest value, help
        ("workers", int, os.cpu_count(), 1, 1024, "processes (all cores)"),
        ("seed", int, Settings.seed, 0, 2**32 - 1, "of the permutation (%(default)s)"),
        ("per_class", int, 0, 0, 10**9, "training images of each class, drawn by the seed (0: all)"),
        ("max_count", int, Settings.max_count, 1, 10**6, "images per shard (%(default)s)"),
        ("max_size", size, Settings.max_size, 1 << 10, 1 << 40, "bytes per shard, as 500M (1G)"),
        ("resize_shorter", int, Settings.resize_shorter, 0, 1 << 14, "largest shorter side in pixels (0: no limit)"),
        ("quality", int, Settings.quality, 1, 100, "of converted JPEGs (%(default)s)"),
    )
    for name, kind, default, _, _, text in numbers:
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    text = "not plain RGB JPEGs: convert usable ones, stop at the first, or leave out all (%(default)s)"
    parser.add_argument("--on_bad", choices=("keep", "stop", "drop_all"), default=Settings.on_bad, help=text)
    text = "the classes, where folders and archives leave them open: first folder, path of folders, archive's name, "
    text += "WordNet id in the file's name, names in label files (%(default)s)"
    choices = ("auto", "folder", "path", "archive", "synset", "label")
    parser.add_argument("--classes", choices=choices, default="auto", help=text)
    text = "none: ignore all classes and labels (%(default)s)"
    parser.add_argument("--labels", choices=("auto", "none"), default="auto", help=text)
    parser.add_argument("--dry_run", action="store_true", help="print what would be written, and write nothing")
    args = parser.parse_args()
    for name, _, _, low, high, _ in numbers:
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} is {getattr(args, name)}; expected {low} to {high}.")
    if not (args.train or args.val):
        raise UserError("neither --train nor --val is given. Pass at least one, as --train ARCHIVE.")
    for split in ("train", "val"):
        location = getattr(args, split)
        if location and args.out.resolve().is_relative_to(Path(location).resolve()):
            raise UserError(f"--out {args.out} is --{split} or a folder inside it. Pass another folder.")
    return args


def main() -> None:
    args = parse_args()
    devkit = args.devkit and read_devkit(args.devkit)
    indexes, classes = [], None
    for split in ("train", "val"):
        if location := getattr(args, split):
            print(f"scanning --{split}", flush=True)
            rule = LabelRule(args.classes, args.labels)
            index = build_index(split, location, classes, devkit if split == "val" else None, rule)
            print(describe(index, len(index) if args.dry_run else 20), flush=True)
            indexes.append(index.limited(args.per_class, args.seed) if args.per_class and split == "train" else index)
            classes = indexes[0].classes if (indexes[0].label != UNLABELLED).all() else None
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    if args.dry_run:
        print(preview(indexes, settings))
        return
    facts = {} if devkit is None else {"class_words": dict(zip(devkit.synsets, devkit.words, strict=True))}
    print(shard(indexes, args.out, settings, args.workers, **facts))
