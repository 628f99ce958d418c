"""Shards on disk or at URLs: the index of a data set, and reading its samples.

A shard is a tar of samples KEY.jpg + KEY.cls. manifest.py describes the files beside it. sample_index.py has the index
by which large data sets are opened; shards of version 0.1 have none.
"""

import glob
import hashlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from braceexpand import braceexpand

from ddae.data.cache import Cache, is_url, url_join
from ddae.data.file_io import retry_system_errors
from ddae.data.manifest import (
    MAKE_SHARDS,
    MANIFEST,
    TABLE_COLUMNS,
    folder_and_name,
    how_to_shard,
    index_path,
    read_index,
    read_manifest,
    read_shard_table,
)
from ddae.data.sample_index import (
    BYTES_PER_SAMPLE,
    COLUMNS,
    MAKE_INDEX,
    SampleIndex,
    ShardEntry,
    index_names,
    map_columns,
    read_header,
)
from ddae.errors import UserError

T = TypeVar("T")
logger = logging.getLogger(__name__)
MAX_OPEN_FILES = 40  # per thread: two shuffle windows of 16 shards, and some more
_NOT_LISTED = "Make the shards again, or remove the file."


@dataclass(frozen=True)
class Shards:
    """A data set: S shards in order, and the place of each of its N images in them.

    Shard s holds samples shard_starts[s] to shard_starts[s + 1] - 1.
    """

    paths: list[str]  # local paths or URLs
    entries: list[ShardEntry]
    cache: Cache
    shard_starts: np.ndarray  # int64 [S + 1]
    offset: np.ndarray  # int64 [N]: of the image within its shard, in bytes
    length: np.ndarray  # uint32 [N]: of the image, in bytes
    width: np.ndarray  # uint16 [N]: pixels
    height: np.ndarray  # uint16 [N]: pixels
    label: np.ndarray | None  # int32 [N]: class, -1 without one; None if there is no sample index
    fingerprint: str  # hash of the shards' hashes: equal for data sets with the same images in the same order
    num_bad: int  # samples that the manifest lists as bad; not among the N
    classes: tuple[str, ...]  # class names by number; empty if the manifest has none
    source_shards: tuple[int, ...]  # number of shards of each source
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
        if self.label is not None:
            found = self.label[samples].astype(np.int64)
            if (found < 0).any():
                first = int(samples[int(np.argmax(found < 0))])
                name = "these shards have no classes" if (found < 0).all() else "it has no class"
                raise UserError(f"{self.sample_name(first)}: {name}. Pass shards that have them.")
            return found
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
            self.cache.fetch(self.paths[shard], self.entries[shard].bytes, self.entries[shard].sha256)

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
        files[shard] = self.cache.open(path, entry.bytes, entry.sha256) if remote else os.open(path, os.O_RDONLY)
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
            raise UserError(f"data.train is {where!r}, whose tars are not indexed. {how_to_shard(where)}")
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
            fix = how_to_shard(where)
        is_missing = not os.path.exists(where) and not glob.has_magic(where)
        problem = "does not exist" if is_missing else f"holds no shards of split {split!r}"
        raise UserError(f"data.train is {where!r}, which {problem}. {fix}")
    return paths


def local_path(where: str) -> str:
    """Return the path or pattern with ~ expanded, unless a file or folder has that literal name."""
    return where if is_url(where) or os.path.exists(where) else os.path.expanduser(where)


def _expand(pattern: str) -> list[str]:
    """Return the names that a pattern with braces stands for. Raise UserError if a brace is not closed."""
    try:
        return list(braceexpand(pattern))
    except ValueError:  # UnbalancedBracesError
        fix = "Write a range as train-{000000..000099}.tar, in quotes."
        raise UserError(f"data.train is {pattern!r}, in which a brace is not closed. {fix}") from None


def open_shards(where: str | tuple[str, ...], cache: Cache, split: str = "train") -> Shards:
    """Find shards and open the sample index of their split, or read their manifests and DALI indexes without one.

    where: one source, or several, whose shards follow each other. Raise UserError if a shard is missing or
    inconsistent, or if the classes of several sources differ.
    """
    if isinstance(where, str):
        return _open_source(where, cache, split)
    opened = [_open_source(each, cache, split) for each in where]
    return opened[0] if len(opened) == 1 else _join(where, opened)


def _join(where: tuple[str, ...], opened: list[Shards]) -> Shards:
    """Return the shards of several sources as one data set."""
    first = opened[0]
    for source, other in zip(where, opened, strict=True):
        if other.classes != first.classes:
            problem = f"data.train names {where[0]} and {source}, whose classes differ"
            raise UserError(f"{problem}. Pass sources with the same classes, or without classes.")
    labelled = all(each.label is not None for each in opened)
    columns: dict[str, Any] = {name: np.concatenate([getattr(each, name) for each in opened]) for name in TABLE_COLUMNS}
    columns["label"] = np.concatenate([each.label for each in opened]) if labelled else None  # type: ignore[misc]
    sizes = np.concatenate([np.diff(each.shard_starts) for each in opened])
    entries = [entry for each in opened for entry in each.entries]
    return Shards(
        [path for each in opened for path in each.paths],
        entries,
        first.cache,
        np.cumsum([0, *sizes]),
        **columns,
        fingerprint=_fingerprint(entries),
        num_bad=sum(each.num_bad for each in opened),
        classes=first.classes,
        source_shards=tuple(len(each.paths) for each in opened),
    )


def _fingerprint(entries: list[ShardEntry]) -> str:
    return hashlib.sha256("".join(entry.sha256 + entry.bad for entry in entries).encode()).hexdigest()


def _open_source(where: str, cache: Cache, split: str) -> Shards:
    """Open the shards of one source; see open_shards()."""
    where = local_path(where.rstrip("/") or where)  # as a shell completes the name of a folder
    paths = find_shards(where, split)
    folders = {folder_and_name(path)[0] for path in paths} or {where}
    index = _open_index(folders.pop(), cache, split) if len(folders) == 1 else None
    if index is None:
        paths, index = _read_manifests(where, paths, cache, split)
    elif not paths:
        paths = [url_join(where, entry.name) for entry in index.shards]
    else:
        if os.path.isdir(where):
            _check_complete(where, paths, [entry.name for entry in index.shards])
        index = _of_paths(index, paths)
    for path, entry in zip(paths, index.shards, strict=True):
        if not is_url(path) and (size := os.path.getsize(path)) != entry.bytes:
            expected = f"its manifest states {entry.bytes}. It is truncated or was changed"
            raise UserError(f"{path} has {size} bytes; {expected}. {MAKE_SHARDS}")
    shard_starts = np.cumsum([0, *(entry.samples for entry in index.shards)])
    if not shard_starts[-1]:
        raise UserError(f"{where} holds no samples. {MAKE_SHARDS}")
    columns: dict[str, Any] = index.columns
    facts: dict[str, Any] = {"num_bad": index.num_bad, "classes": index.classes, "source_shards": (len(paths),)}
    return Shards(paths, index.shards, cache, shard_starts, **columns, **facts, fingerprint=_fingerprint(index.shards))


def _open_index(folder: str, cache: Cache, split: str) -> SampleIndex | None:
    """Return the sample index of a split in a folder or at its URL; None if there is none, or an outdated one."""
    names = index_names(split)
    if is_url(folder):
        try:
            path = cache.fetch_fresh(url_join(folder, names[0]))
        except UserError as error:  # shards of version 0.1; reading their manifest reports any other problem
            logger.info("the manifest is read, because there is no sample index: %s", error)
            return None
        header = read_header(path)
        columns = cache.fetch(url_join(folder, names[1]), header["samples"] * BYTES_PER_SAMPLE, header["sha256"])
        return map_columns(columns, header)
    manifest, path = Path(folder, MANIFEST), Path(folder, names[0])
    if not manifest.exists() or not path.exists():
        return None
    header = read_header(path)
    if header["manifest_bytes"] != manifest.stat().st_size:
        logger.warning("%s is older than %s. %s", path, MANIFEST, MAKE_INDEX.format(folder))
        return None
    return map_columns(path.with_name(names[1]), header)


def _of_paths(index: SampleIndex, paths: list[str]) -> SampleIndex:
    """Return the index of these shards. Raise UserError if it lacks one."""
    position = {entry.name: i for i, entry in enumerate(index.shards)}
    names = [folder_and_name(path)[1] for path in paths]
    if names == list(position):
        return index
    for path, name in zip(paths, names, strict=True):
        if name not in position:
            raise UserError(f"{path} is not in {folder_and_name(path)[0]}/{MANIFEST}. {_NOT_LISTED}")
    starts = np.cumsum([0, *(entry.samples for entry in index.shards)])
    chosen = [position[name] for name in names]
    slices = [slice(int(starts[i]), int(starts[i + 1])) for i in chosen]
    columns = {name: np.concatenate([values[each] for each in slices]) for name, values in index.columns.items()}
    shards = [index.shards[i] for i in chosen]
    return SampleIndex(shards, columns, index.classes, sum(entry.num_bad for entry in shards))


def _read_manifests(where: str, paths: list[str], cache: Cache, split: str) -> tuple[list[str], SampleIndex]:
    """Return shards and their index from manifests and DALI indexes; labels are not read."""
    manifests: dict[str, dict[str, Any]] = {}
    if not paths:
        manifests[where] = manifest = read_manifest(where, cache)
        paths = [url_join(where, name) for name in sorted(manifest["shards"]) if name.startswith(f"{split}-")]
        if not paths:
            raise UserError(f"data.train is {where!r}, whose {MANIFEST} lists no shards of split {split!r}.")
    entries, tables = [], []
    for path in paths:
        folder, name = folder_and_name(path)
        if folder not in manifests:
            manifests[folder] = read_manifest(folder, cache)
        entry = manifests[folder]["shards"].get(name)
        if entry is None:
            raise UserError(f"{path} is not in {folder}/{MANIFEST}. {_NOT_LISTED}")
        entry, table = read_shard_table(path, entry, cache)
        entries.append(entry)
        tables.append(table)
    if os.path.isdir(where):
        listed = [name for name in manifests[where]["shards"] if name.startswith(f"{split}-")]
        _check_complete(where, paths, listed)
    table = np.concatenate(tables)
    columns: dict[str, Any] = {name: table[:, i].astype(COLUMNS[name]) for i, name in enumerate(TABLE_COLUMNS)}
    columns["label"] = None
    classes = tuple(next(iter(manifests.values())).get("classes") or ())
    return paths, SampleIndex(entries, columns, classes, sum(entry.num_bad for entry in entries))


def _check_complete(where: str, paths: list[str], listed: list[str]) -> None:
    """Raise UserError if a folder lacks a shard that its manifest lists."""
    if missing := set(listed) - set(map(os.path.basename, paths)):
        raise UserError(f"{where} lacks {min(missing)}, which its {MANIFEST} lists. {MAKE_SHARDS}")
