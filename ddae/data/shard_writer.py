"""Writing shards in the form that shards.py reads, through webdataset's own writer. Equal samples give equal bytes."""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from webdataset.writer import TarWriter

from ddae.data.shards import FORMAT, INDEX_VERSION, MANIFEST


class Sample(NamedTuple):
    key: str  # unique within a split, without a dot
    jpeg: bytes
    label: int
    width: int
    height: int


def write_shard(path: Path, samples: Iterable[Sample]) -> dict[str, Any]:
    """Write one shard and its index, each complete or not at all; returns the shard's manifest entry."""
    unfinished = path.with_suffix(".tar.part")
    sizes = []
    with TarWriter(str(unfinished), encoder=False, mtime=0, user="", group="") as writer:
        for sample in samples:
            writer.write({"__key__": sample.key, "jpg": sample.jpeg, "cls": str(sample.label).encode()})
            sizes.append([sample.width, sample.height])
    data = unfinished.read_bytes()
    with open(unfinished) as file:
        os.fsync(file.fileno())
    replace_text(path.with_suffix(".idx"), _index(unfinished))
    os.replace(unfinished, path)
    return {"samples": len(sizes), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "sizes": sizes}


def write_manifest(folder: Path, shards: dict[str, Any], **about: Any) -> None:
    """Write the folder's manifest, last of all: its presence says that the shards are whole."""
    replace_text(folder / MANIFEST, json.dumps({"format": FORMAT, "shards": shards, **about}, indent=1))


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old one or the new one, never half of either."""
    unfinished = path.with_name(path.name + ".part")
    with open(unfinished, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _index(shard: Path) -> str:
    """DALI's index: a line a sample, extension offset size name of each of its files."""
    lines: dict[str, list[str]] = {}
    with tarfile.open(shard) as archive:
        for member in archive:
            key, _, extension = member.name.partition(".")
            lines.setdefault(key, []).append(f"{extension} {member.offset_data} {member.size} {member.name}")
    return "\n".join([f"{INDEX_VERSION} {len(lines)}", *(" ".join(parts) for parts in lines.values())]) + "\n"
