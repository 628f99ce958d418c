"""Writing shards in the format that shards.py reads, with webdataset's writer. Equal samples give equal bytes."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tarfile import USTAR_FORMAT, TarFile
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from ddae import atomic
from ddae.data.cache import Cache
from ddae.data.file_io import read_range
from ddae.data.manifest import FORMAT, INDEX_VERSION, MANIFEST, read_index, read_shard_table
from ddae.data.sample_index import COLUMNS, UNLABELLED, SampleIndex, ShardEntry, write_sample_index
from ddae.errors import UserError

BLOCK = 512  # bytes of a tar header; files are padded to multiples of it
NO_CACHE = Cache(Path(), 0)  # for local files
KEY_LENGTH = 90  # characters; a longer name would need a second tar header


class Sample(NamedTuple):
    """One sample of a shard."""

    key: str  # unique within a split: at most KEY_LENGTH of A-Z, a-z, 0-9, _ and -
    jpeg: bytes
    label: int | None  # class number, if any
    width: int  # pixels
    height: int  # pixels
    mask: bytes | None = None  # for segmentation: PNG with the class of each pixel


def import_webdataset() -> None:
    """Import webdataset, and with it torch, before worker processes are forked, so that they share it."""
    import webdataset.writer  # noqa: F401


def write_shard(path: Path, samples: Iterable[Sample]) -> dict[str, Any]:
    """Write a shard and its index atomically. Return the shard's manifest entry."""
    try:
        entry = write_partial_shard(path, samples)
        commit_shard(path)
    finally:
        for partial in _partial_paths(path):
            partial.unlink(missing_ok=True)
    return entry


def write_partial_shard(path: Path, samples: Iterable[Sample]) -> dict[str, Any]:
    """Write a shard and its index under temporary names, for commit_shard(). Return the shard's manifest entry.

    Here and in commit_shard() the caller removes the temporary files after an error.
    """
    tar, idx = _partial_paths(path)
    sizes, labels, index = [], [], []
    with open(tar, "wb", buffering=1 << 20) as file:
        hashing = _HashingFile(file)
        from webdataset.writer import TarWriter  # imports torch: after the arguments are checked

        with TarWriter(cast(BinaryIO, hashing), encoder=False, mtime=0, user="", group="") as writer:
            # Same bytes in half the time: the stream that TarWriter opens copies each image ten times.
            writer.tarstream = TarFile(None, "w", cast(BinaryIO, hashing), USTAR_FORMAT, copybufsize=1 << 24)
            for sample in samples:
                labels.append(UNLABELLED if sample.label is None else sample.label)
                files = _files(sample)
                index.append(_index_line(sample.key, files, writer.tarstream.offset))
                writer.write({"__key__": sample.key, **files})
                sizes.append([sample.width, sample.height])
    idx.write_text("\n".join([f"{INDEX_VERSION} {len(index)}", *index]) + "\n")
    entry = {"samples": len(sizes), "bytes": hashing.size, "sha256": hashing.sha256.hexdigest(), "sizes": sizes}
    return entry | {"labels": labels}


def commit_shard(path: Path) -> None:
    """Flush a shard of write_partial_shard() to the disk, then rename first its index and then the shard itself."""
    tar, idx = _partial_paths(path)
    atomic.fsync(tar, idx)
    os.replace(idx, path.with_suffix(".idx"))
    os.replace(tar, path)


def write_manifest(folder: Path, shards: Mapping[str, dict[str, Any]], **metadata: Any) -> None:
    """Write the folder's sample indexes and its manifest, one line per shard.

    Write it last: it marks the shards as complete. shards: entries of write_shard() or of another manifest, by name;
    one at a time is held in memory.
    """
    with atomic.durable_file(folder / MANIFEST) as partial:
        with open(partial, "w") as file:
            file.writelines(_manifest_text(shards, metadata))
        for split in sorted({name.rpartition("-")[0] for name in shards}):
            index = sample_index(folder, split, shards, tuple(metadata.get("classes") or ()))
            write_sample_index(folder, split, index, partial.stat().st_size)


def _manifest_text(shards: Mapping[str, dict[str, Any]], metadata: dict[str, Any]) -> Iterator[str]:
    """Yield the manifest in pieces. Labels are not part of it."""
    yield f'{{"format": "{FORMAT}",\n "shards": {{\n'
    separator = "  "
    for name, entry in shards.items():
        listed = {key: value for key, value in entry.items() if key != "labels"}
        yield f"{separator}{json.dumps(name)}: {json.dumps(listed, separators=(',', ':'))}"
        separator = ",\n  "
    yield "\n }"
    yield from (f',\n "{key}": {json.dumps(value)}' for key, value in metadata.items())
    yield "\n}\n"


def sample_index(
    folder: Path, split: str, shards: Mapping[str, dict[str, Any]], classes: tuple[str, ...]
) -> SampleIndex:
    """Return the sample index of a split. Labels that the shards' entries lack are read from their samples."""
    names = sorted(name for name in shards if name.rpartition("-")[0] == split)
    num_listed = sum(shards[name]["samples"] for name in names)  # some may be bad, and are left out
    columns = {column: np.empty(num_listed, dtype) for column, dtype in COLUMNS.items()}
    entries: list[ShardEntry] = []
    end = 0
    for name in names:
        path, listed = folder / name, shards[name]
        entry, table = read_shard_table(str(path), listed, NO_CACHE)
        known = "labels" in listed and not entry.num_bad
        labels = np.array(listed["labels"]) if known else _read_labels(path, table[:, 0])
        start, end = end, end + entry.samples
        for column, values in zip(columns.values(), (*table.T, labels), strict=True):
            column[start:end] = values
        entries.append(entry)
    columns = {name: column[:end] for name, column in columns.items()}
    return SampleIndex(entries, columns, classes, sum(entry.num_bad for entry in entries))


def _read_labels(shard: Path, offsets: np.ndarray) -> np.ndarray:
    """Return the labels of the samples whose images are at these offsets, int32; -1 without a class number."""
    idx = shard.with_suffix(".idx")
    try:
        places = dict(zip(read_index(idx)[1][:, 0].tolist(), read_index(idx, "cls")[1].tolist(), strict=True))
    except UserError:  # the shard has no labels
        return np.full(len(offsets), UNLABELLED, np.int32)
    texts = [read_range(shard, *places[offset]) for offset in offsets.tolist()]
    return np.array([int(text) if text.strip().isdigit() else UNLABELLED for text in texts], np.int32)


def _partial_paths(path: Path) -> tuple[Path, Path]:
    return path.with_suffix(".tar.part"), path.with_suffix(".idx.part")


class _HashingFile:
    """Counts and hashes the bytes written to a file, which then need not be read back."""

    def __init__(self, file: BinaryIO):
        self.file, self.size, self.sha256 = file, 0, hashlib.sha256()

    def tell(self) -> int:
        return self.size

    def write(self, data: bytes) -> None:
        self.sha256.update(data)
        self.size += len(data)
        self.file.write(data)


def _files(sample: Sample) -> dict[str, bytes]:
    """Return a sample's files by extension, in the order in which webdataset writes them."""
    label = None if sample.label is None else str(sample.label).encode()
    files = {"cls": label, "jpg": sample.jpeg, "png": sample.mask}
    return {extension: content for extension, content in files.items() if content is not None}


def _index_line(key: str, files: dict[str, bytes], offset: int) -> str:
    """Return a line of DALI's index: extension, offset, size and name of each file of the sample at `offset`."""
    parts = []
    for extension, content in files.items():
        parts.append(f"{extension} {offset + BLOCK} {len(content)} {key}.{extension}")
        offset += BLOCK + -(-len(content) // BLOCK) * BLOCK
    return " ".join(parts)
