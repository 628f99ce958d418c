"""Writing shards in the form that shards.py reads, through webdataset's own writer. Equal samples give equal bytes."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from tarfile import USTAR_FORMAT, TarFile
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
    entry = write_unfinished(path, samples)
    put_in_place(path)
    return entry


def write_unfinished(path: Path, samples: Iterable[Sample]) -> dict[str, Any]:
    """Write a shard and its index beside their places, for put_in_place; returns the shard's manifest entry."""
    tar, idx = _unfinished(path)
    sizes, index = [], []
    try:
        with open(tar, "wb", buffering=1 << 20) as file:
            hashed = _HashedFile(file)
            with TarWriter(cast(BinaryIO, hashed), encoder=False, mtime=0, user="", group="") as writer:
                # The same bytes in half the time: the stream that TarWriter opens copies each image ten times.
                writer.tarstream = TarFile(None, "w", cast(BinaryIO, hashed), USTAR_FORMAT, copybufsize=1 << 24)
                for sample in samples:
                    files = _files(sample)
                    index.append(_index_line(sample.key, files, writer.tarstream.offset))
                    writer.write({"__key__": sample.key, **files})
                    sizes.append([sample.width, sample.height])
        idx.write_text("\n".join([f"{INDEX_VERSION} {len(index)}", *index]) + "\n")
    except BaseException:
        _remove(tar, idx)
        raise
    return {"samples": len(sizes), "bytes": hashed.size, "sha256": hashed.sha256.hexdigest(), "sizes": sizes}


def put_in_place(path: Path) -> None:
    """Bring a shard that write_unfinished wrote to the disk, then its index and itself to their places."""
    tar, idx = _unfinished(path)
    try:
        for file in (tar, idx):
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        os.replace(idx, path.with_suffix(".idx"))
        os.replace(tar, path)
    except BaseException:
        _remove(tar, idx)
        raise


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


def _unfinished(path: Path) -> tuple[Path, Path]:
    return path.with_suffix(".tar.part"), path.with_suffix(".idx.part")


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


class _HashedFile:
    """Counts and hashes what is written to a file, so that nothing is read back."""

    def __init__(self, file):
        self.file, self.size, self.sha256 = file, 0, hashlib.sha256()

    def tell(self) -> int:
        return self.size

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
