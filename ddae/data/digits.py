"""The handwritten digits of scikit-learn as shards: a small labelled data set for tests and the demo."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddae.data.decode import encode_image
from ddae.data.shard_writer import Sample, write_manifest, write_shard

SIDE = 40  # pixels
SHARDS = {"train-000000.tar": (0, 700), "train-000001.tar": (700, 1400), "val-000000.tar": (1400, 1797)}  # digits


def write_digits(folder: Path) -> Path:
    """Write 1,797 digits with classes: 1,400 for training in two shards, 397 for validation. Return the folder."""
    from sklearn.datasets import load_digits

    folder.mkdir(parents=True, exist_ok=True)
    data: Any = load_digits()
    entries = {}
    for name, (first, end) in SHARDS.items():
        samples = []
        for number in range(first, end):
            image = Image.fromarray((data.images[number] * 15.9).astype(np.uint8)).convert("RGB")
            jpeg = encode_image(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
            samples.append(Sample(f"{number:05d}", jpeg, int(data.target[number]), SIDE, SIDE))
        entries[name] = write_shard(folder / name, samples)
    write_manifest(folder, entries, classes=[str(number) for number in range(10)])
    return folder
