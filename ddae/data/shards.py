"""Shards on disk or at URLs: the index of a data set, and reading its samples.

A shard is a tar of samples KEY.jpg + KEY.cls. `SHARD.idx` beside it is DALI's index of it (v1.2). The folder's
`manifest.json` lists each shard's number of samples and bytes, its sha256 and the size of each image in pixels:

    {"format": "ddae-shards-1", "shards": {"train-000000.tar": {"samples": 2, "bytes": 30720, "sha256": "...",
     "sizes": [[500, 375], [640, 480]]}}, "classes": [...], "source": ..., "settings": ...}

An entry may have "bad": keys of samples that cannot be decoded, which are left out (check_shards.py --mark_bad).
"""

import glob
import hashlib
import json
import os
import shlex
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from braceexpand import braceexpand

from ddae.data.cache import Cache, is_url, url_join, url_name, url_parent
from ddae.data.file_io import retry_system_errors
from ddae.errors import UserError, redact_url

T = TypeVar("T")
FORMAT = "ddae-shards-1"
MANIFEST = "manifest.json"
INDEX_VERSION = "v1.2"
OPTIONAL_FILES = {"cls": "classes", "png": "masks"}  # files that samples need not have, by extension
MAX_OPEN_FILES = 40  # per thread: two shuffle windows of 16 shards, and some more
MAKE_SHARDS = "Make the shards again with data_prep/."


@dataclass(frozen=True)
class Shards:
    """A data set: S shards in order, and the place of each of its N images in them.

    Shard s holds samples shard_starts[s] to shard_starts[s + 1] - 1.
    """

    paths: list[str]  # local paths or URLs
    entries: list[dict[str, Any]]  # "bytes" and "sha256" of each shard, from the manifest
    cache: Cache
    shard_starts: np.ndarray  # int64 [S + 1]
    offset: np.ndarray  # int64 [N]: of the image within its shard, in bytes
    length: np.ndarray  # int64 [N]: of the image, in bytes
    width: np.ndarray  # int64 [N]: pixels
    height: np.ndarray  # int64 [N]: pixels
    fingerprint: str  # hash of the shards' hashes: equal for data sets with the same images in the same order
    num_bad: int  # samples that the manifest lists as bad; not among the N
    classes: tuple[str, ...]  # class names by number; empty if the manifest has none
    _open: threading.local = field(default_factory=threading.local, compare=False, repr=False)  # files of this thread

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    def read(self, sample: int) -> bytes:
        """Return the encoded image of a sample. Raise OSError if the shard is too short."""
        data = bytearray(int(self.length[sample]))
        self.read_into(memoryview(data), sample)
        return bytes(data)

    def read_into(self, buffer: memoryview, sample: int) -> None:
        """Read the encoded image of a sample into `buffer`. Raise OSError if the shard is too short."""
        shard, offset = self.shard_of(sample), int(self.offset[sample])
        num_read = self._retry(shard, lambda: os.preadv(self._descriptor(shard), [buffer], offset))
        if num_read < len(buffer):
            raise OSError(f"its shard is {len(buffer) - num_read} bytes too short")

    def shard_of(self, sample: int) -> int:
        """Return the index of the shard that holds a sample."""
        return int(np.searchsorted(self.shard_starts, sample, side="right")) - 1

    def sample_name(self, sample: int) -> str:
        """Return the name of a sample for messages: SHARD:KEY."""
        shard = self.shard_of(sample)
        keys, index = read_index(index_path(self.paths[shard], self.cache))
        rows = np.flatnonzero(index[:, 0] == self.offset[sample])
        return f"{self.paths[shard]}:{keys[rows[0]] if len(rows) else sample}"

    def labels(self, samples: np.ndarray | None = None) -> np.ndarray:
        """Return the class numbers of these samples (int64, ascending; default: all): int64 [N].

        Raise UserError if a sample has no class.
        """
        samples = np.arange(len(self)) if samples is None else samples
        labels = []
        for sample, location in zip(samples.tolist(), self.file_locations("cls", samples), strict=True):
            text = self.read_file(sample, location)
            if not text.strip().isdigit():
                name = self.sample_name(sample)
                raise UserError(f"{name} has the class {text[:20]!r}; expected a class number. {MAKE_SHARDS}")
            labels.append(int(text))
        return np.array(labels, np.int64)

    def file_locations(self, extension: str, samples: np.ndarray | None = None) -> np.ndarray:
        """Return offset and length, in bytes, of the file KEY.extension of each sample: int64 [N, 2].

        samples: int64, ascending; default: all. Raise UserError if the samples have no such file.
        """
        locations, samples = [], np.arange(len(self)) if samples is None else samples
        for shard in range(len(self.paths)):
            first, end = np.searchsorted(samples, self.shard_starts[shard : shard + 2])
            offsets = self.offset[samples[first:end]]
            path = index_path(self.paths[shard], self.cache)
            image_offsets, files = read_index(path)[1][:, 0], read_index(path, extension)[1]
            rows = np.minimum(np.searchsorted(image_offsets, offsets), len(image_offsets) - 1)
            if (image_offsets[rows] != offsets).any():
                raise UserError(f"{path} does not list its samples in the order of the shard. {MAKE_SHARDS}")
            locations.append(files[rows])
        return np.concatenate(locations)

    def read_file(self, sample: int, location: np.ndarray) -> bytes:
        """Return the content of a sample's file; location: a row of file_locations()."""
        shard = self.shard_of(sample)
        return self._retry(shard, lambda: os.pread(self._descriptor(shard), int(location[1]), int(location[0])))

    def fetch(self, shard: int) -> None:
        """Download a remote shard into the cache, unless it is there."""
        if is_url(self.paths[shard]):
            self.cache.fetch(self.paths[shard], self.entries[shard]["bytes"], self.entries[shard]["sha256"])

    def _retry(self, shard: int, read: Callable[[], T]) -> T:
        """Return read(); after a system error open the shard again. Raise UserError if the error persists."""
        return retry_system_errors(read, self.paths[shard], self._close_files)

    def _close_files(self) -> None:
        """Close the files of this thread."""
        self._open.__dict__.pop("files", None)

    def _descriptor(self, shard: int) -> int:
        """Return a descriptor of the open shard; close the least recently used one if there are too many."""
        files = self._open.__dict__.setdefault("files", _OpenFiles())
        if shard in files:
            files.move_to_end(shard)
            return files[shard]
        path, entry = self.paths[shard], self.entries[shard]
        remote = is_url(path)
        files[shard] = self.cache.open(path, entry["bytes"], entry["sha256"]) if remote else os.open(path, os.O_RDONLY)
        if len(files) > MAX_OPEN_FILES:
            os.close(files.popitem(last=False)[1])
        return files[shard]


class _OpenFiles(OrderedDict[int, int]):
    """Descriptors of open shards, closed when the thread that owns them ends."""

    def __del__(self):
        for descriptor in self.values():
            os.close(descriptor)


def find_shards(where: str, split: str = "train") -> list[str]:
    """Return the shards of a folder (those of `split`), a pattern or a URL pattern, in order.

    Return [] for the URL of a folder, whose shards are listed in its manifest. Raise UserError if there are none, or if
    the pattern names a missing one.
    """
    if where.startswith("pipe:"):
        raise UserError(f"data.train is {where!r}, which would run a command. Pass a folder, a pattern or a URL.")
    if is_url(where):
        return _expand(where) if where.endswith(".tar") else []
    where = local_path(where)
    if os.path.isdir(where):
        names = sorted(name for name in os.listdir(where) if name.endswith(".tar"))
        paths = [os.path.join(where, name) for name in names if name.startswith(f"{split}-")]
        if not paths and names and not os.path.exists(os.path.join(where, MANIFEST)):
            raise UserError(f"data.train is {where!r}, whose tars are not indexed. {_how_to_shard(where)}")
    elif os.path.isfile(where):
        paths = [where]
    else:
        paths = [path for each in _expand(where) for path in (sorted(glob.glob(each)) or [each])]
        missing = [path for path in paths if not os.path.exists(path)]
        if missing and len(paths) > 1:
            raise UserError(f"data.train is {where!r}, but {missing[0]} does not exist. Correct the range.")
        paths = [path for path in paths if path not in missing]
    if not paths:
        fix = "Make shards with data_prep/ and pass --data.train FOLDER, or try --preset demo after `make demo`."
        if os.path.exists(where):
            fix = _how_to_shard(where)
        raise UserError(f"data.train is {where!r}, which holds no shards of split {split!r}. {fix}")
    return paths


def local_path(where: str) -> str:
    """Return the path or pattern with ~ expanded, unless a file or folder has that literal name."""
    return where if is_url(where) or os.path.exists(where) else os.path.expanduser(where)


def _how_to_shard(where: str) -> str:
    """Return the command that makes shards of images or other shards."""
    command = f"python data_prep/shard_imagenet.py --train {shlex.quote(where)} --out data/shards"
    return f"Run {command}, and pass --data.train data/shards."


def _expand(pattern: str) -> list[str]:
    """Return the names that a pattern with braces stands for. Raise UserError if a brace is not closed."""
    try:
        return list(braceexpand(pattern))
    except ValueError:  # UnbalancedBracesError
        fix = "Write a range as train-{000000..000099}.tar, in quotes."
        raise UserError(f"data.train is {pattern!r}, in which a brace is not closed. {fix}") from None


def open_shards(where: str, cache: Cache, split: str = "train") -> Shards:
    """Find shards and read their manifests and indexes. Raise UserError if one is missing or inconsistent."""
    where = local_path(where.rstrip("/") or where)  # as a shell completes the name of a folder
    paths = find_shards(where, split)
    manifests: dict[str, dict[str, Any]] = {}
    if not paths:
        manifests[where] = manifest = read_manifest(where, cache)
        paths = [url_join(where, name) for name in sorted(manifest["shards"]) if name.startswith(f"{split}-")]
        if not paths:
            raise UserError(f"data.train is {where!r}, whose {MANIFEST} lists no shards of split {split!r}.")
    entries, tables = [], []
    for path in paths:
        folder, name = (url_parent(path), url_name(path)) if is_url(path) else os.path.split(path)
        if folder not in manifests:
            manifests[folder] = read_manifest(folder, cache)
        entry = manifests[folder]["shards"].get(name)
        if entry is None:
            raise UserError(f"{path} is not in {folder}/{MANIFEST}. Make the shards again, or remove the file.")
        if not is_url(path) and (size := os.path.getsize(path)) != entry["bytes"]:
            expected = f"its manifest states {entry['bytes']}. It is truncated or was changed"
            raise UserError(f"{path} has {size} bytes; {expected}. {MAKE_SHARDS}")
        keys, index = read_index(index_path(path, cache))
        if len(keys) != entry["samples"]:
            expected = f"its manifest states {entry['samples']}"
            raise UserError(f"the index of {path} lists {len(keys)} samples; {expected}. {MAKE_SHARDS}")
        table = np.concatenate([index, np.asarray(entry["sizes"], np.int64).reshape(-1, 2)], 1)
        if entry.get("bad"):
            table = table[~np.isin(keys, entry["bad"])]
        tables.append(table)
        entries.append(entry)
    if os.path.isdir(where):
        listed = {name for name in manifests[where]["shards"] if name.startswith(f"{split}-")}
        if missing := listed - set(map(os.path.basename, paths)):
            raise UserError(f"{where} lacks {min(missing)}, which its {MANIFEST} lists. {MAKE_SHARDS}")
    samples = np.concatenate(tables)
    if not len(samples):
        raise UserError(f"{where} holds no samples. {MAKE_SHARDS}")
    shard_starts = np.cumsum([0, *map(len, tables)])
    offset, length, width, height = np.ascontiguousarray(samples.T)
    num_bad = sum(entry["samples"] for entry in entries) - len(samples)
    hashes = [entry["sha256"] + "".join(sorted(entry.get("bad", ()))) for entry in entries]
    fingerprint = hashlib.sha256("".join(hashes).encode()).hexdigest()
    classes = tuple(next(iter(manifests.values())).get("classes") or ())
    entries = [{key: entry[key] for key in ("bytes", "sha256")} for entry in entries]
    return Shards(paths, entries, cache, shard_starts, offset, length, width, height, fingerprint, num_bad, classes)


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
        fix = _how_to_shard(str(folder)) if any(Path(folder).glob("*.tar")) else MAKE_SHARDS
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
