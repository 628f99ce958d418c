"""Writing shards in the form that shards.py reads, through webdataset's own writer. Equal samples give equal bytes."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from webdataset.writer import TarWriter

from ddae.data.shards import FORMAT, INDEX_VERSION, MANIFEST

BLOCK = 512  # bytes of a tar's header, and what its files are padded to
KEY_LENGTH = 90  # characters; a longer name would want a second header


class Sample(NamedTuple):
    key: str  # unique within a split: at most KEY_LENGTH of A-Z, a-z, 0-9, _ and -
    jpeg: bytes
    label: int | None  # None: the sample has no class
    width: int
    height: int
    mask: bytes | None = None  # PNG of a class a pixel, for segmentation


def write_shard(path: Path, samples: Iterable[Sample]) -> dict[str, Any]:
    """Write one shard and its index, each complete or not at all; returns the shard's manifest entry."""
    unfinished = path.with_suffix(".tar.part")
    sizes, index = [], []
    try:
        with open(unfinished, "wb", buffering=1 << 20) as file:
            hashed = _HashedFile(file)
            with TarWriter(cast(BinaryIO, hashed), encoder=False, mtime=0, user="", group="") as writer:
                for sample in samples:
                    files = _files(sample)
                    index.append(_index_line(sample.key, files, writer.tarstream.offset))
                    writer.write({"__key__": sample.key, **files})
                    sizes.append([sample.width, sample.height])
            file.flush()
            os.fsync(file.fileno())
        replace_text(path.with_suffix(".idx"), "\n".join([f"{INDEX_VERSION} {len(index)}", *index]) + "\n")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return {"samples": len(sizes), "bytes": hashed.size, "sha256": hashed.sha256.hexdigest(), "sizes": sizes}


def write_manifest(folder: Path, shards: dict[str, Any], **about: Any) -> None:
    """Write the folder's manifest, last of all: its presence says that the shards are whole. A line a shard."""
    lines = [f"  {json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}" for name, entry in shards.items()]
    rest = "".join(f',\n "{key}": {json.dumps(value)}' for key, value in about.items())
    body = ",\n".join(lines)
    replace_text(folder / MANIFEST, f'{{"format": "{FORMAT}",\n "shards": {{\n{body}\n }}{rest}\n}}\n')


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old one or the new one, never half of either."""
    unfinished = path.with_name(path.name + ".part")
    try:
        with open(unfinished, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


class _HashedFile:
    """Counts and hashes what is written to a file, so that nothing is read back."""

    def __init__(self, file):
        self.file, self.size, self.sha256 = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.sha256.update(data)
        self.size += len(data)
        self.file.write(data)


def _files(sample: Sample) -> dict[str, bytes]:
    """A sample's files by extension, in the order in which webdataset writes them."""
    files = {"jpg": sample.jpeg}
    if sample.label is not None:
        files["cls"] = str(sample.label).encode()
    if sample.mask is not None:
        files["png"] = sample.mask
    return dict(sorted(files.items()))


def _index_line(key: str, files: dict[str, bytes], offset: int) -> str:
    """A line of DALI's index: extension, offset, size and name of each file of a sample that begins at `offset`."""
    parts = []
    for extension, content in files.items():
        parts.append(f"{extension} {offset + BLOCK} {len(content)} {key}.{extension}")
        offset += BLOCK + -(-len(content) // BLOCK) * BLOCK
    return " ".join(parts)
