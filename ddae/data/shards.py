"""Shards on disk or at URLs: what a set of them holds, where each image lies, and what a reader needs to know of it.

A shard is a tar of samples KEY.jpg + KEY.cls, `SHARD.idx` beside it is DALI's index of it (v1.2), and the folder's
`manifest.json` says how many samples and bytes each shard has, its sha256 and the size of each image:

    {"format": "ddae-shards-1", "shards": {"train-000000.tar": {"samples": 2, "bytes": 30720, "sha256": "...",
     "sizes": [[500, 375], [640, 480]]}}, "classes": [...], "source": ..., "settings": ...}

An entry may have "bad": keys of samples that cannot be decoded (check_shards.py lists them), which are left out.
"""

import glob
import hashlib
import json
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from ddae.data.cache import Cache, is_url, join, name, parent
from ddae.errors import UserError

FORMAT = "ddae-shards-1"
MANIFEST = "manifest.json"
INDEX_VERSION = "v1.2"
LACKS = {"cls": "classes", "png": "masks"}  # what a sample may be without
OPEN_FILES = 40  # that a thread keeps open: two windows of shards and some to spare


@dataclass(frozen=True)
class Shards:
    """A data set: its shards in order, and for each of its N samples where the image's bytes lie.

    `first` has one entry more than there are shards: shard s holds samples first[s] to first[s + 1] - 1.
    """

    places: list[str]  # paths or URLs
    entries: list[dict[str, Any]]  # of the manifest
    cache: Cache
    first: np.ndarray  # int64 [S + 1]
    offset: np.ndarray  # int64 [N]: of the image within its shard, in bytes
    length: np.ndarray  # int64 [N]: of the image, in bytes
    width: np.ndarray  # int64 [N]: pixels
    height: np.ndarray  # int64 [N]: pixels
    fingerprint: str  # of the shards' hashes: two data sets with the same images in the same order share it
    num_bad: int  # samples that the manifest lists as bad, which are not among the N
    classes: tuple[str, ...]  # their names by number; empty where the manifest has none
    _open: threading.local = field(default_factory=threading.local, compare=False, repr=False)  # files of this thread

    def __len__(self) -> int:
        return int(self.first[-1])

    def read(self, sample: int) -> bytes:
        """The image file of one sample; OSError where its shard ends before."""
        data = bytearray(int(self.length[sample]))
        self.read_into(memoryview(data), sample)
        return bytes(data)

    def read_into(self, place: memoryview, sample: int) -> None:
        """The image file of one sample, to where it is wanted; OSError where its shard ends before."""
        got = os.preadv(self._descriptor(self.shard_of(sample)), [place], int(self.offset[sample]))
        if got < len(place):
            raise OSError(f"its shard ends {len(place) - got} bytes before it does")

    def shard_of(self, sample: int) -> int:
        return int(np.searchsorted(self.first, sample, side="right")) - 1

    def sample_name(self, sample: int) -> str:
        """A sample as a person may look it up: SHARD:KEY."""
        shard = self.shard_of(sample)
        keys, index = read_index(local(self.places[shard].removesuffix(".tar") + ".idx", self.cache))
        here = np.flatnonzero(index[:, 0] == self.offset[sample])
        return f"{self.places[shard]}:{keys[here[0]] if len(here) else sample}"

    def labels(self, samples: np.ndarray | None = None) -> np.ndarray:
        """The class of every sample, or of these (int64, ascending): int64 [N]; UserError where they have none."""
        samples = np.arange(len(self)) if samples is None else samples
        found = []
        for sample, place in zip(samples.tolist(), self.others("cls", samples), strict=True):
            word = self.read_other(sample, place)
            if not word.strip().isdigit():
                raise UserError(f"{self.sample_name(sample)} has the class {word[:20]!r}: expected a number")
            found.append(int(word))
        return np.array(found, np.int64)

    def others(self, ending: str, samples: np.ndarray | None = None) -> np.ndarray:
        """Offset and length of the file with this ending beside the image of every sample, or of these (int64,
        ascending): int64 [N, 2]; UserError where they have none."""
        found, wanted = [], np.arange(len(self)) if samples is None else samples
        for shard, place in enumerate(self.places):
            here = wanted[np.searchsorted(wanted, self.first[shard]) : np.searchsorted(wanted, self.first[shard + 1])]
            path = local(place.removesuffix(".tar") + ".idx", self.cache)
            images, files = read_index(path)[1][:, 0], read_index(path, ending)[1]
            rows = np.minimum(np.searchsorted(images, self.offset[here]), len(images) - 1)
            if (images[rows] != self.offset[here]).any():
                raise UserError(f"{path} lists its samples in another order than they lie in: make it again")
            found.append(files[rows])
        return np.concatenate(found)

    def read_other(self, sample: int, place: np.ndarray) -> bytes:
        """The file of a sample that lies there, which is a row of others()."""
        return os.pread(self._descriptor(self.shard_of(sample)), int(place[1]), int(place[0]))

    def fetch(self, shard: int) -> None:
        """See to it that a remote shard is in the cache."""
        if is_url(self.places[shard]):
            self.cache.fetch(self.places[shard], self.entries[shard]["bytes"], self.entries[shard]["sha256"])

    def _descriptor(self, shard: int) -> int:
        """An open descriptor of the shard; the least recently used of many is closed."""
        files = self._open.__dict__.setdefault("files", _Files())
        if shard in files:
            files.move_to_end(shard)
            return files[shard]
        place, entry = self.places[shard], self.entries[shard]
        remote = is_url(place)
        opened = self.cache.open(place, entry["bytes"], entry["sha256"]) if remote else os.open(place, os.O_RDONLY)
        files[shard] = opened
        if len(files) > OPEN_FILES:
            os.close(files.popitem(last=False)[1])
        return opened


class _Files(OrderedDict[int, int]):
    """Open descriptors by shard, closed with the thread that they belong to."""

    def __del__(self):
        for descriptor in self.values():
            os.close(descriptor)


def find_shards(where: str, split: str = "train") -> list[str]:
    """The shards that a folder (those of `split`), a pattern or a URL of either names, in order.

    UserError where there are none, or one that the pattern names is missing.
    """
    if not where:
        raise UserError(
            "data.train is empty: make shards with data_prep/ and name them with --data.train FOLDER, "
            "or try --preset demo after `make demo`"
        )
    if where.startswith("pipe:"):
        raise UserError(f"data.train {where!r} would run a command: name a folder, a pattern or a URL of shards")
    if is_url(where):
        return list(braceexpand(where)) if where.endswith(".tar") else []  # a folder's are in its manifest
    if os.path.isdir(where):
        paths = sorted(glob.glob(os.path.join(where, f"{split}-*.tar")))
    else:
        paths = [path for each in braceexpand(where) for path in (sorted(glob.glob(each)) or [each])]
        missing = [path for path in paths if not os.path.exists(path)]
        if missing and len(paths) > 1:
            raise UserError(f"data.train {where!r} names {missing[0]}, which does not exist: check the range")
        paths = [path for path in paths if path not in missing]
    if not paths:
        raise UserError(f"data.train {where!r} holds no shards of {split!r}: make them with data_prep/")
    return paths


def open_shards(where: str, cache: Cache, split: str = "train") -> Shards:
    """Find shards and read their manifests and indexes; UserError names the first that is missing or does not fit."""
    places = find_shards(where, split)
    manifests: dict[str, dict[str, Any]] = {}
    if not places:
        manifests[where.rstrip("/")] = manifest = read_manifest(where, cache)
        places = [join(where, each) for each in sorted(manifest["shards"]) if each.startswith(f"{split}-")]
        if not places:
            raise UserError(f"data.train {where!r} holds no shards of {split!r}: see its {MANIFEST}")
    entries, columns, counts, num_bad = [], [], [], 0
    for place in places:
        folder, base = (parent(place), name(place)) if is_url(place) else os.path.split(place)
        if folder not in manifests:
            manifests[folder] = read_manifest(folder, cache)
        entry = manifests[folder]["shards"].get(base)
        if entry is None:
            raise UserError(f"{place} is not in {folder}/{MANIFEST}: shard the data again, or leave it out")
        if not is_url(place) and os.path.getsize(place) != entry["bytes"]:
            raise UserError(
                f"{place} has {os.path.getsize(place)} bytes where its manifest says {entry['bytes']}: "
                "it is cut or changed, shard the data again"
            )
        keys, index = read_index(local(place.removesuffix(".tar") + ".idx", cache))
        if len(keys) != entry["samples"]:
            raise UserError(f"the index of {place} lists {len(keys)} samples of {entry['samples']}: make it again")
        rows = np.concatenate([index, np.asarray(entry["sizes"], np.int64).reshape(-1, 2)], 1)
        if entry.get("bad"):
            rows = rows[~np.isin(keys, entry["bad"])]
        columns.append(rows)
        num_bad += len(keys) - len(rows)
        counts.append(len(rows))
        entries.append(entry)
    if os.path.isdir(where):
        lost = {each for each in manifests[where]["shards"] if each.startswith(f"{split}-")} - set(
            map(os.path.basename, places)
        )
        if lost:
            raise UserError(
                f"{where} lacks {min(lost)}, which its {MANIFEST} lists: put it back or shard the data again"
            )
    table = np.concatenate(columns)
    if not len(table):
        raise UserError(f"{where} holds shards without a single sample: run data_prep/ again")
    known = [entry["sha256"] + "".join(sorted(entry.get("bad", ()))) for entry in entries]
    return Shards(
        places=places,
        entries=[{key: entry[key] for key in ("bytes", "sha256")} for entry in entries],
        cache=cache,
        first=np.concatenate([[0], np.cumsum(counts)]),
        offset=table[:, 0].copy(),
        length=table[:, 1].copy(),
        width=table[:, 2].copy(),
        height=table[:, 3].copy(),
        fingerprint=hashlib.sha256("".join(known).encode()).hexdigest(),
        num_bad=num_bad,
        classes=tuple(next(iter(manifests.values())).get("classes") or ()),
    )


def local(place: str, cache: Cache) -> Path:
    """A small file's local path: its own, or that of a fresh copy."""
    return cache.fetch_fresh(place) if is_url(place) else Path(place)


def read_manifest(folder: str | Path, cache: Cache | None = None) -> dict[str, Any]:
    """The manifest of a folder, or of a folder's URL; UserError where it is missing or is none."""
    if isinstance(folder, str) and is_url(folder):
        assert cache is not None
        path = cache.fetch_fresh(join(folder, MANIFEST))
    else:
        path = Path(folder) / MANIFEST
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
    for shard, entry in manifest["shards"].items():
        whole = isinstance(entry, dict) and entry.keys() >= {"samples", "bytes", "sha256", "sizes"}
        if not whole or len(entry["sizes"]) != entry["samples"]:
            raise UserError(f"{path} does not say all of {shard}: shard the data again")
    return manifest


def read_index(path: Path, ending: str = "jpg") -> tuple[list[str], np.ndarray]:
    """Keys of a shard's samples, and offset and length of their files of this ending int64 [N, 2], from DALI's index
    of it."""
    if not path.exists():
        shard = path.with_suffix(".tar")
        raise UserError(f"{shard} has no index {path.name} beside it: run data_prep/ again, or DALI's wds2idx")
    try:
        header, _, body = path.read_text().partition("\n")
        if not header.startswith(INDEX_VERSION):
            raise UserError(f"{path} is not an index of version {INDEX_VERSION}: make it again")
        width = len(body.partition("\n")[0].split())  # of a line: four words a file, the same files in every sample
        words = body.split()
        if not words:
            return [], np.zeros((0, 2), np.int64)
        image = words.index(ending, 0, width)
        names = words[image + 3 :: width]
        if len(names) * width != len(words) or words[image::width].count(ending) != len(names):
            raise ValueError("lines differ")
        numbers = [np.array(words[image + column :: width], "S").astype(np.int64) for column in (1, 2)]
    except UserError:
        raise
    except ValueError:  # of words that are no numbers, or no text
        lack = f"these shards have no {LACKS[ending]}, name some that have" if ending in LACKS else "make it again"
        raise UserError(f"{path} has a line without a {ending}'s offset and size: {lack}") from None
    return [name.removesuffix(f".{ending}") for name in names], np.stack(numbers, 1)
