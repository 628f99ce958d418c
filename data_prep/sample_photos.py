"""Turn the photographs that scikit-image ships into a small data set of shards, for the demo and the tests.

    python data_prep/sample_photos.py --out data/demo
    python data_prep/sample_photos.py --masks --out data/scenes

Each photograph is cut into a left part for training and a right part for validation, which share no pixel; random
square crops of either become JPEGs, labelled by photograph. With --masks pieces of other photographs are put on each
crop, and a mask says which photograph each pixel is of: segmentation in miniature.
"""

import argparse
import io
import shutil
import sys
from pathlib import Path

import numpy as np
import skimage
from PIL import Image, ImageDraw

from ddae.data.shard_writer import Sample, write_manifest, write_shard
from ddae.data.shards import MANIFEST

PHOTOS = {  # file: classes are numbered in this order
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
TRAIN_SHARE = 0.75  # of a photograph's width
SIDES = (64, 160)  # smallest and largest crop, in pixels
PIECES = (1, 3)  # fewest and most pieces that are put on a crop
PIECE = (0.3, 0.7)  # smallest and largest side of one, of the crop's


def crops(photo: Image.Image, split: str, count: int, generator: np.random.Generator):
    """`count` random square crops of one split's part of the photograph."""
    border = round(photo.width * TRAIN_SHARE)
    left, right = (0, border) if split == "train" else (border, photo.width)
    for _ in range(count):
        largest = min(SIDES[1], right - left, photo.height)
        side = int(generator.integers(min(SIDES[0], largest), largest + 1))
        x = int(generator.integers(left, right - side + 1))
        y = int(generator.integers(0, photo.height - side + 1))
        yield photo.crop((x, y, x + side, y + side))


def put_pieces(
    image: Image.Image, label: int, others: list[Image.Image], split: str, generator: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """The crop of photograph `label` with rectangles and ellipses of others on it, and the mask of both."""
    image, mask = image.copy(), Image.new("L", image.size, label)
    for _ in range(int(generator.integers(PIECES[0], PIECES[1] + 1))):
        other = (label + int(generator.integers(1, len(others)))) % len(others)
        (piece,) = crops(others[other], split, 1, generator)
        wide, tall = (round(side * generator.uniform(*PIECE)) for side in image.size)
        left, top = int(generator.integers(image.width - wide + 1)), int(generator.integers(image.height - tall + 1))
        form = Image.new("L", (wide, tall), 0)
        draw = ImageDraw.Draw(form)
        (draw.ellipse if generator.random() < 0.5 else draw.rectangle)((0, 0, wide - 1, tall - 1), 255)
        image.paste(piece.resize((wide, tall)), (left, top), form)
        mask.paste(other, (left, top, left + wide, top + tall), form)
    return image, mask


def encode(image: Image.Image, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, quality=92)
    return buffer.getvalue()


def make_split(folder: Path, split: str, per_photo: int, per_shard: int, seed: int, masks: bool) -> dict:
    """Write the shards of one split, photograph after photograph in turn; returns their manifest entries."""
    source = Path(skimage.__file__).parent / "data"
    generator = np.random.default_rng([seed, split == "train"])
    photos = [Image.open(source / name).convert("RGB") for name in PHOTOS]
    by_photo = []
    for label, photo in enumerate(photos):
        samples = []
        for image in crops(photo, split, per_photo, generator):
            if masks:
                image, mask = put_pieces(image, label, photos, split, generator)
                samples.append((encode(image), None, image.width, image.height, encode(mask, "PNG")))
            else:
                samples.append((encode(image), label, image.width, image.height))
        by_photo.append(samples)
    samples = [sample for turn in zip(*by_photo, strict=True) for sample in turn]
    entries = {}
    for number, start in enumerate(range(0, len(samples), per_shard)):
        chunk = enumerate(samples[start : start + per_shard], start)
        path = folder / f"{split}-{number:06d}.tar"
        entries[path.name] = write_shard(path, (Sample(f"{split}{i:08d}", *sample) for i, sample in chunk))
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="folder for the shards")
    parser.add_argument("--train_per_photo", type=int, default=230, help="training crops of each photograph")
    parser.add_argument("--val_per_photo", type=int, help="validation crops of each (default: 200, with --masks 24)")
    parser.add_argument("--per_shard", type=int, default=500, help="samples of a shard")
    parser.add_argument("--masks", action="store_true", help="a class a pixel instead of one an image")
    parser.add_argument("--seed", type=int, default=0, help="of the crops and their order")
    arguments = parser.parse_args()
    if arguments.val_per_photo is None:
        arguments.val_per_photo = 24 if arguments.masks else 200
    if (arguments.out / MANIFEST).exists():
        print(f"{arguments.out} is complete; delete it to make it again")
        return
    if shutil.disk_usage(arguments.out.parent if arguments.out.parent.exists() else ".").free < 200e6:
        print(f"sample_photos: less than 200 MB free for {arguments.out}: make room", file=sys.stderr)
        sys.exit(2)
    arguments.out.mkdir(parents=True, exist_ok=True)
    entries = {}
    for split, count in (("train", arguments.train_per_photo), ("val", arguments.val_per_photo)):
        entries |= make_split(arguments.out, split, count, arguments.per_shard, arguments.seed, arguments.masks)
    settings = {k: v for k, v in vars(arguments).items() if k != "out"}
    write_manifest(arguments.out, entries, classes=list(PHOTOS.values()), source="scikit-image", settings=settings)
    train = sum(entry["samples"] for name, entry in entries.items() if name.startswith("train"))
    print(f"{arguments.out}: {train} training and {len(PHOTOS) * arguments.val_per_photo} validation crops")


if __name__ == "__main__":
    main()
