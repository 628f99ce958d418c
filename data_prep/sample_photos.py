"""Turn the photographs that scikit-image ships into a small data set of shards, for the demo and the tests.

    python data_prep/sample_photos.py --out data/demo

Each photograph is cut into a left part for training and a right part for validation, which share no pixel; random
square crops of either become JPEGs, labelled by photograph.
"""

import argparse
import io
import shutil
import sys
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

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


def encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def make_split(folder: Path, split: str, per_photo: int, per_shard: int, seed: int) -> dict:
    """Write the shards of one split, photograph after photograph in turn; returns their manifest entries."""
    source = Path(skimage.__file__).parent / "data"
    generator = np.random.default_rng([seed, split == "train"])
    by_photo = []
    for label, name in enumerate(PHOTOS):
        with Image.open(source / name) as file:
            images = crops(file.convert("RGB"), split, per_photo, generator)
            by_photo.append([(encode(image), label, image.width, image.height) for image in images])
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
    parser.add_argument("--val_per_photo", type=int, default=24, help="validation crops of each photograph")
    parser.add_argument("--per_shard", type=int, default=500, help="samples of a shard")
    parser.add_argument("--seed", type=int, default=0, help="of the crops and their order")
    arguments = parser.parse_args()
    if (arguments.out / MANIFEST).exists():
        print(f"{arguments.out} is complete; delete it to make it again")
        return
    if shutil.disk_usage(arguments.out.parent if arguments.out.parent.exists() else ".").free < 200e6:
        print(f"sample_photos: less than 200 MB free for {arguments.out}: make room", file=sys.stderr)
        sys.exit(2)
    arguments.out.mkdir(parents=True, exist_ok=True)
    entries = {}
    for split, count in (("train", arguments.train_per_photo), ("val", arguments.val_per_photo)):
        entries |= make_split(arguments.out, split, count, arguments.per_shard, arguments.seed)
    settings = {k: v for k, v in vars(arguments).items() if k != "out"}
    write_manifest(arguments.out, entries, classes=list(PHOTOS.values()), source="scikit-image", settings=settings)
    train = sum(entry["samples"] for name, entry in entries.items() if name.startswith("train"))
    print(f"{arguments.out}: {train} training and {len(PHOTOS) * arguments.val_per_photo} validation crops")


if __name__ == "__main__":
    main()
