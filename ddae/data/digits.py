"""Handwritten digits that scikit-learn ships, as shards: labelled images for machinery to be tried on."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddae.data.shard_writer import Sample, write_manifest, write_shard

SIDE = 40  # pixels
SPLITS = (("train", 0, 700), ("train", 700, 1400), ("val", 1400, 1797))


def write_digits(folder: Path) -> Path:
    """1,797 digits with their classes: 1,400 to learn from in two shards, the others to ask with."""
    from sklearn.datasets import load_digits

    folder.mkdir(parents=True, exist_ok=True)
    data: Any = load_digits()
    entries = {}
    for split, first, last in SPLITS:
        samples = []
        for number in range(first, last):
            file, pixels = io.BytesIO(), (data.images[number] * 15.9).astype(np.uint8)
            image = Image.fromarray(pixels).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            image.save(file, "JPEG", quality=95)
            samples.append(Sample(f"{number:05d}", file.getvalue(), int(data.target[number]), SIDE, SIDE))
        path = folder / f"{split}-{first // 700 if split == 'train' else 0:06d}.tar"
        entries[path.name] = write_shard(path, samples)
    write_manifest(folder, entries, classes=[str(number) for number in range(10)])
    return folder
