"""The sample index of a split: place, size and label of each image, memory-mapped by all processes of a machine.

    train.index.bin     columns of N images: offset int64, length uint32, width uint16, height uint16, label int32
    train.index.json    {"samples": N, "sha256": of the .bin, "num_bad": ..., "classes": [...], "manifest_bytes": ...,
                         "shards": [[name, samples, bytes, sha256, bad keys, their number], ...]}

It repeats what manifest and DALI indexes state, from which it can be made again, and is opened without parsing those.
Samples that the manifest lists as bad are left out.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddae import atomic
from ddae.errors import UserError

COLUMNS = {"offset": np.int64, "length": np.uint32, "width": np.uint16, "height": np.uint16, "label": np.int32}
BYTES_PER_SAMPLE = sum(np.dtype(dtype).itemsize for dtype in COLUMNS.values())
UNLABELLED = -1
CHUNK_BYTES = 1 << 24  # hashed at a time
MAKE_INDEX = "Run python data_prep/check_shards.py {} --index."


class ShardEntry(NamedTuple):
    """A shard of the index."""

    name: str
    samples: int  # without bad ones
    bytes: int
    sha256: str
    bad: str  # keys of bad samples, joined
    num_bad: int


class SampleIndex(NamedTuple):
    """The index of one split; columns have one entry per image."""

    shards: list[ShardEntry]
    columns: dict[str, np.ndarray]
    classes: tuple[str, ...]
    num_bad: int


def index_names(split: str) -> tuple[str, str]:
    """Return the file names of a split's header and columns."""
    return f"{split}.index.json", f"{split}.index.bin"


def write_sample_index(folder: Path, split: str, index: SampleIndex, manifest_bytes: int) -> None:
    """Write the index of a split. manifest_bytes: size of the manifest, by which an outdated index is noticed."""
    header, columns = (folder / name for name in index_names(split))
    digest, partial = hashlib.sha256(), columns.with_name(f"{columns.name}.part")
    with open(partial, "wb") as file:
        for name, dtype in COLUMNS.items():
            data = np.ascontiguousarray(index.columns[name], dtype).view(np.uint8).data
            digest.update(data)
            file.write(data)
    atomic.fsync(partial)
    partial.replace(columns)
    shards = ",\n  ".join(json.dumps(entry, separators=(",", ":")) for entry in index.shards)
    facts = {"samples": len(index.columns["offset"]), "sha256": digest.hexdigest(), "num_bad": index.num_bad}
    facts |= {"classes": index.classes, "manifest_bytes": manifest_bytes}
    text = json.dumps(facts)[:-1] + f',\n "shards": [\n  {shards}\n ]}}\n'
    atomic.write_text_durably(header, text)


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of an index. Raise UserError if it is damaged."""
    try:
        header = json.loads(path.read_text())
        shards = [ShardEntry(*entry) for entry in header["shards"]]
        if sum(entry.samples for entry in shards) == header["samples"]:
            return header | {"shards": shards}
    except (ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{path} is damaged. {MAKE_INDEX.format(path.parent)}")


def map_columns(path: Path, header: dict[str, Any]) -> SampleIndex:
    """Return the index with its columns memory-mapped. Raise UserError if they do not match their hash."""
    num_samples = header["samples"]
    if path.stat().st_size != num_samples * BYTES_PER_SAMPLE or _sha256(path) != header["sha256"]:
        raise UserError(f"{path} is damaged: its hash differs from its header. {MAKE_INDEX.format(path.parent)}")
    columns, start = {}, 0
    for name, dtype in COLUMNS.items():
        columns[name] = np.memmap(path, dtype, "r", start, (num_samples,)) if num_samples else np.empty(0, dtype)
        start += num_samples * np.dtype(dtype).itemsize
    return SampleIndex(header["shards"], columns, tuple(header["classes"]), header["num_bad"])


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
