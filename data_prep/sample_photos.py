"""Convert the photographs that scikit-image ships to a small data set of shards, for the demo and the tests.

    python data_prep/sample_photos.py --out data/demo
    python data_prep/sample_photos.py --masks --out data/scenes

Each photograph is divided into a left part for training and a right part for validation, which share no pixel. Random
square crops of a part become JPEGs, labelled by photograph. With --masks, pieces of other photographs are pasted on
each crop, and a mask labels each pixel by its photograph: a small data set for semantic segmentation.
"""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import require_packages  # noqa: F401

import numpy as np
import skimage
from PIL import Image, ImageDraw

from ddae.data.decode import encode_image
from ddae.data.manifest import MANIFEST
from ddae.data.shard_writer import Sample, write_manifest, write_shard
from ddae.errors import UserError, run_command

PHOTOS = {  # file: class; classes are numbered in this order
    "astronaut.png": "astronaut",
    "chelsea.png": "cat",
    "coffee.png": "coffee",
    "motorcycle_left.png": "motorcycle",
    "rocket.jpg": "rocket",
    "ihc.png": "tissue",
    "retina.jpg": "retina",
    "hubble_deep_field.jpg": "galaxies",
    "camera.png": "cameraman",
    "coins.png": "coins",
    "brick.png": "brick",
}
TRAIN_FRACTION = 0.75  # of a photograph's width
CROP_SIDES = (64, 160)  # smallest and largest crop, pixels
NUM_PIECES = (1, 3)  # fewest and most pieces pasted on a crop
PIECE_SCALE = (0.3, 0.7)  # smallest and largest side of a piece, as a fraction of the crop's side
JPEG_QUALITY = 92
MIN_FREE_BYTES = 200_000_000


def random_crops(photo: Image.Image, split: str, count: int, generator: np.random.Generator) -> Iterator[Image.Image]:
    """Yield `count` random square crops of one split's part of the photograph."""
    border = round(photo.width * TRAIN_FRACTION)
    left, right = (0, border) if split == "train" else (border, photo.width)
    for _ in range(count):
        largest = min(CROP_SIDES[1], right - left, photo.height)
        side = int(generator.integers(min(CROP_SIDES[0], largest), largest + 1))
        x = int(generator.integers(left, right - side + 1))
        y = int(generator.integers(0, photo.height - side + 1))
        yield photo.crop((x, y, x + side, y + side))


def paste_pieces(
    image: Image.Image, label: int, photos: list[Image.Image], split: str, generator: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """Paste rectangles and ellipses of other photographs on a crop of photograph `label`. Return image and mask."""
    image, mask = image.copy(), Image.new("L", image.size, label)
    for _ in range(int(generator.integers(NUM_PIECES[0], NUM_PIECES[1] + 1))):
        other = (label + int(generator.integers(1, len(photos)))) % len(photos)
        (piece,) = random_crops(photos[other], split, 1, generator)
        width, height = (round(side * generator.uniform(*PIECE_SCALE)) for side in image.size)
        left = int(generator.integers(image.width - width + 1))
        top = int(generator.integers(image.height - height + 1))
        shape = Image.new("L", (width, height), 0)
        draw = ImageDraw.Draw(shape)
        (draw.ellipse if generator.random() < 0.5 else draw.rectangle)((0, 0, width - 1, height - 1), 255)
        image.paste(piece.resize((width, height)), (left, top), shape)
        mask.paste(other, (left, top, left + width, top + height), shape)
    return image, mask


def write_split(folder: Path, split: str, per_photo: int, per_shard: int, seed: int, masks: bool) -> dict[str, Any]:
    """Write the shards of one split, with the photographs interleaved. Return the shards' manifest entries."""
    source = Path(skimage.__file__).parent / "data"
    generator = np.random.default_rng([seed, split == "train"])
    photos = [Image.open(source / name).convert("RGB") for name in PHOTOS]
    samples = []
    for label, photo in enumerate(photos):
        for image in random_crops(photo, split, per_photo, generator):
            mask = None
            if masks:
                image, mask_image = paste_pieces(image, label, photos, split, generator)
                mask = encode_image(mask_image, file_format="PNG")
            samples.append((encode_image(image, JPEG_QUALITY), None if masks else label, *image.size, mask))
    interleaved = [sample for first in range(per_photo) for sample in samples[first::per_photo]]
    entries = {}
    for number, start in enumerate(range(0, len(interleaved), per_shard)):
        chunk = enumerate(interleaved[start : start + per_shard], start)
        path = folder / f"{split}-{number:06d}.tar"
        entries[path.name] = write_shard(path, (Sample(f"{split}{i:08d}", *sample) for i, sample in chunk))
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="output folder (%(default)s)")
    parser.add_argument("--train_per_photo", type=int, default=230, help="training crops per photograph (%(default)s)")
    parser.add_argument("--val_per_photo", type=int, help="validation crops per photograph (200; 24 with --masks)")
    parser.add_argument("--per_shard", type=int, default=500, help="samples per shard (%(default)s)")
    parser.add_argument("--masks", action="store_true", help="label each pixel instead of each image")
    parser.add_argument("--seed", type=int, default=0, help="of the random crops (%(default)s)")
    args = parser.parse_args()
    if args.val_per_photo is None:
        args.val_per_photo = 24 if args.masks else 200
    if (args.out / MANIFEST).exists():
        print(f"{args.out} is complete. Delete it to write it again.")
        return
    if shutil.disk_usage(args.out.parent if args.out.parent.exists() else ".").free < MIN_FREE_BYTES:
        raise UserError(f"--out {args.out}: less than {MIN_FREE_BYTES // 10**6} MB free. Free space there.")
    args.out.mkdir(parents=True, exist_ok=True)
    entries = {}
    for split, count in (("train", args.train_per_photo), ("val", args.val_per_photo)):
        entries |= write_split(args.out, split, count, args.per_shard, args.seed, args.masks)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    write_manifest(args.out, entries, classes=list(PHOTOS.values()), source="scikit-image", settings=settings)
    num_train = sum(entry["samples"] for name, entry in entries.items() if name.startswith("train"))
    print(f"{args.out}: {num_train} training and {len(PHOTOS) * args.val_per_photo} validation crops")


if __name__ == "__main__":
    run_command("sample_photos", main)
