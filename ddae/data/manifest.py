"""The manifest of a folder of shards, and DALI's index of each shard.

`manifest.json` lists each shard's number of samples and bytes, its sha256 and the size of each image in pixels:

    {"format": "ddae-shards-1", "shards": {"train-000000.tar": {"samples": 2, "bytes": 30720, "sha256": "...",
     "sizes": [[500, 375], [640, 480]]}}, "classes": [...], "source": ..., "settings": ...}

An entry may have "bad": keys of samples that cannot be decoded, which are left out (check_shards.py --mark_bad).
`SHARD.idx` is DALI's index of SHARD.tar (v1.2): the place of each sample's files, as text.
"""

import json
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from ddae.data.cache import Cache, is_url, url_join, url_name, url_parent
from ddae.data.sample_index import ShardEntry
from ddae.errors import UserError, redact_url

FORMAT = "ddae-shards-1"
MANIFEST = "manifest.json"
INDEX_VERSION = "v1.2"
OPTIONAL_FILES = {"cls": "classes", "png": "masks"}  # files that samples need not have, by extension
MAKE_SHARDS = "Make the shards again with data_prep/."
TABLE_COLUMNS = ("offset", "length", "width", "height")


def how_to_shard(where: str) -> str:
    """Return the command that makes shards of images or other shards."""
    command = f"python data_prep/shard_imagenet.py --train {shlex.quote(where)} --out data/shards"
    return f"Run {command}, and pass --data.train data/shards."


def index_path(shard: str, cache: Cache) -> Path:
    """Return the local path of a shard's index: its own, or that of a fresh download."""
    path = shard.removesuffix(".tar") + ".idx"
    return cache.fetch_fresh(path) if is_url(path) else Path(path)


def read_manifest(folder: str | Path, cache: Cache | None = None) -> dict[str, Any]:
    """Return the manifest of a folder or of a folder's URL. Raise UserError if it is missing or invalid."""
    path = Path(folder, MANIFEST)
    if cache is not None and is_url(str(folder)):
        path = cache.fetch_fresh(url_join(str(folder), MANIFEST))
    if not path.exists():
        fix = how_to_shard(str(folder)) if any(Path(folder).glob("*.tar")) else MAKE_SHARDS
        raise UserError(f"{path} is missing: the shards are incomplete, or were made by another program. {fix}")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:  # JSONDecodeError or UnicodeDecodeError
        if path.read_bytes().lstrip()[:1] == b"<":
            source = redact_url(str(folder)) if is_url(str(folder)) else folder
            fix = "Open the address in a browser, and pass credentials or another address."
            raise UserError(f"{source}/{MANIFEST} is a web page, such as a login page, not a manifest. {fix}") from None
        raise UserError(f"{path} is not JSON ({error}). {MAKE_SHARDS}") from None
    shards = manifest.get("shards") if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None
    if not isinstance(shards, dict):
        raise UserError(f"{path} is not a manifest of format {FORMAT}. {MAKE_SHARDS}")
    for shard, entry in shards.items():
        complete = isinstance(entry, dict) and entry.keys() >= {"samples", "bytes", "sha256", "sizes"}
        if not complete or not isinstance(entry["sizes"], list) or len(entry["sizes"]) != entry["samples"]:
            raise UserError(f"the entry for {shard} in {path} is incomplete. {MAKE_SHARDS}")
    return manifest


def read_index(path: Path, extension: str = "jpg") -> tuple[list[str], np.ndarray]:
    """Read DALI's index of a shard. Return the keys of its samples, and offset and length of their files KEY.extension.

    Offset and length are in bytes, int64 [N, 2]. Raise UserError if the index is missing or invalid, or has no such
    files.
    """
    if not path.exists():
        fix = f"{MAKE_SHARDS} DALI's wds2idx makes it too."
        raise UserError(f"{path.with_suffix('.tar')} has no index {path.name} beside it. {fix}")
    header, _, body_bytes = path.read_bytes().partition(b"\n")
    if not header.startswith(INDEX_VERSION.encode()):
        raise UserError(f"{path} is not an index of version {INDEX_VERSION}. {MAKE_SHARDS}")
    try:
        body = body_bytes.decode()
        # Four fields a file (extension, offset, size, name), and the same files in every line.
        num_fields = len(body.partition("\n")[0].split())
        fields = body.split()
        if not fields:
            return [], np.zeros((0, 2), np.int64)
        column = fields.index(extension, 0, num_fields)
        names = fields[column + 3 :: num_fields]
        if len(names) * num_fields != len(fields) or fields[column::num_fields].count(extension) != len(names):
            raise ValueError("lines differ")
        values = [np.array(fields[column + shift :: num_fields], "S").astype(np.int64) for shift in (1, 2)]
    except ValueError:  # not text, not numbers, or another layout
        content = OPTIONAL_FILES.get(extension)
        fix = MAKE_SHARDS if content is None else f"These shards have no {content}. Pass shards that have them."
        raise UserError(f"{path} has a line without offset and size of a {extension} file. {fix}") from None
    return [name.removesuffix(f".{extension}") for name in names], np.stack(values, 1)


def read_shard_table(path: str, entry: dict[str, Any], cache: Cache) -> tuple[ShardEntry, np.ndarray]:
    """Return a shard's entry, and offset, length, width and height of its samples that are not bad: int64 [N, 4].

    entry: of the manifest. Raise UserError if it does not match the shard's DALI index.
    """
    keys, index = read_index(index_path(path, cache))
    if len(keys) != entry["samples"]:
        expected = f"its manifest states {entry['samples']}"
        raise UserError(f"the index of {path} lists {len(keys)} samples; {expected}. {MAKE_SHARDS}")
    table = np.concatenate([index, np.asarray(entry["sizes"], np.int64).reshape(-1, 2)], 1)
    bad = sorted(entry.get("bad", ()))
    if bad:
        table = table[~np.isin(keys, bad)]
    name = folder_and_name(path)[1]
    num_bad = len(keys) - len(table)
    return ShardEntry(name, len(table), entry["bytes"], entry["sha256"], "".join(bad), num_bad), table


def folder_and_name(path: str) -> tuple[str, str]:
    """Return folder and name of a path or URL."""
    return (url_parent(path), url_name(path)) if is_url(path) else os.path.split(path)  # type: ignore[return-value]
