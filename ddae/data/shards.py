"""Shards on disk: what a folder of them holds, where each image lies, and what a reader needs to know of it.

A shard is a tar of samples KEY.jpg + KEY.cls, `SHARD.idx` beside it is DALI's index of it (v1.2), and the folder's
`manifest.json` says how many samples and bytes each shard has, its sha256 and the size of each image:

    {"format": "ddae-shards-1", "shards": {"train-000000.tar": {"samples": 2, "bytes": 30720, "sha256": "...",
     "sizes": [[500, 375], [640, 480]]}}, "classes": [...], "source": ..., "settings": ...}
"""

import glob
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddae.errors import UserError

FORMAT = "ddae-shards-1"
MANIFEST = "manifest.json"
INDEX_VERSION = "v1.2"


@dataclass(frozen=True)
class Shards:
    """A data set: its shards in order, and for each of its N samples where the image's bytes lie.

    `first` has one entry more than there are shards: shard s holds samples first[s] to first[s + 1] - 1.
    """

    paths: list[Path]
    first: np.ndarray  # int64 [S + 1]
    offset: np.ndarray  # int64 [N]: of the image within its shard, in bytes
    length: np.ndarray  # int64 [N]: of the image, in bytes
    width: np.ndarray  # int64 [N]: pixels
    height: np.ndarray  # int64 [N]: pixels
    fingerprint: str  # of the shards' hashes: two data sets with the same images in the same order share it

    def __len__(self) -> int:
        return int(self.first[-1])

    def read(self, sample: int) -> bytes:
        """The image file of one sample."""
        shard = int(np.searchsorted(self.first, sample, side="right")) - 1
        with open(self.paths[shard], "rb") as file:
            return os.pread(file.fileno(), int(self.length[sample]), int(self.offset[sample]))


def find_shards(where: str, split: str = "train") -> list[Path]:
    """The shards that a folder (those of `split`) or a pattern names, in order; UserError where there are none."""
    if not where:
        raise UserError(
            "data.train is empty: make shards with data_prep/ and name them with --data.train FOLDER, "
            "or try --preset demo after `make demo`"
        )
    pattern = os.path.join(where, f"{split}-*.tar") if os.path.isdir(where) else where
    paths = [Path(path) for path in sorted(glob.glob(pattern))]
    if not paths:
        raise UserError(f"data.train {where!r} holds no shards ({pattern}): make them with data_prep/")
    return paths


def open_shards(paths: list[Path]) -> Shards:
    """Read the manifests and indexes of these shards; UserError names the first that is missing or does not fit."""
    manifests: dict[Path, dict] = {}
    counts, offsets, sizes, hashes = [], [], [], []
    for path in paths:
        if path.parent not in manifests:
            manifests[path.parent] = _read_manifest(path.parent)
        entry = manifests[path.parent]["shards"].get(path.name)
        if entry is None:
            raise UserError(f"{path} is not in {path.parent / MANIFEST}: shard the data again, or leave it out")
        if {"samples", "bytes", "sha256", "sizes"} - entry.keys() or len(entry["sizes"]) != entry["samples"]:
            raise UserError(f"{path.parent / MANIFEST} does not say all of {path.name}: shard the data again")
        if path.stat().st_size != entry["bytes"]:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes where its manifest says {entry['bytes']}: "
                "it is cut or changed, shard the data again"
            )
        places = _read_index(path)
        if len(places) != entry["samples"]:
            raise UserError(
                f"{path.with_suffix('.idx')} lists {len(places)} samples of {entry['samples']}: make it again"
            )
        counts.append(entry["samples"])
        offsets.append(places)
        sizes.append(np.asarray(entry["sizes"], np.int64).reshape(-1, 2))
        hashes.append(entry["sha256"])
    place, size = np.concatenate(offsets), np.concatenate(sizes)
    if not len(place):
        raise UserError(f"{paths[0].parent} holds shards without a single sample: run data_prep/ again")
    return Shards(
        paths=paths,
        first=np.concatenate([[0], np.cumsum(counts)]),
        offset=place[:, 0],
        length=place[:, 1],
        width=size[:, 0],
        height=size[:, 1],
        fingerprint=hashlib.sha256("".join(hashes).encode()).hexdigest(),
    )


def _read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"{path} is missing: the shards beside it were not finished, run data_prep/ again")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:  # of JSON, or of text
        raise UserError(f"{path} is not JSON ({error}): run data_prep/ again") from None
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or not isinstance(manifest.get("shards"), dict)
    ):
        raise UserError(f"{path} is not a manifest of the format {FORMAT}: run data_prep/ again")
    return manifest


def _read_index(shard: Path) -> np.ndarray:
    """Offset and length of each sample's image: int64 [N, 2]."""
    path = shard.with_suffix(".idx")
    if not path.exists():
        raise UserError(f"{shard} has no index {path.name} beside it: run data_prep/ again, or DALI's wds2idx")
    try:
        header, *lines = path.read_text().splitlines()
        if not header.startswith(INDEX_VERSION):
            raise UserError(f"{path} is not an index of version {INDEX_VERSION}: make it again")
        places = []
        for line in lines:
            parts = line.split(" ")
            image = next(i for i in range(0, len(parts) - 3, 4) if parts[i] == "jpg")
            places.append((int(parts[image + 1]), int(parts[image + 2])))
    except UserError:
        raise
    except (ValueError, StopIteration):
        raise UserError(f"{path} has a line without a jpg's offset and size: make it again") from None
    return np.asarray(places, np.int64).reshape(-1, 2)
