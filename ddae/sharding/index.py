"""The images of one split: where their bytes are, their labels and their keys, in compact columns.

N: number of images, which may be millions.
"""

import hashlib
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddae.data.file_io import read_file
from ddae.data.shard_writer import KEY_LENGTH
from ddae.errors import UserError
from ddae.sharding.accounting import Tally
from ddae.sharding.archives import decompress, is_compressed, read_at, read_zip_member

UNLABELLED = -1
CHUNK = 1 << 18  # values that are compared at a time


class Strings:
    """N byte strings in one buffer."""

    def __init__(self, strings: Iterable[bytes] = ()):
        self._bytes, self._ends = bytearray(), array("I")  # 4 bytes each; 8 from 4 GiB on
        for each in strings:
            self.append(each)

    def append(self, string: bytes) -> None:
        self._bytes += string
        try:
            self._ends.append(len(self._bytes))
        except OverflowError:
            self._ends = array("Q", self._ends)
            self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> bytes:
        return bytes(self._bytes[self._ends[i - 1] if i else 0 : self._ends[i]])

    def __iter__(self) -> Iterator[bytes]:
        return (self[i] for i in range(len(self)))

    def take(self, rows: Iterable[int]) -> "Strings":
        """Return the strings of these rows, in their order."""
        return Strings(self[row] for row in rows)

    def update(self, digest: "hashlib._Hash") -> None:
        """Add all strings to a hash."""
        for start in range(0, len(self), CHUNK):
            digest.update(array("q", self._ends[start : start + CHUNK]))
        digest.update(self._bytes)


class Folder(NamedTuple):
    """A folder that holds images, in an archive or below a folder."""

    file_number: int  # position in the list of archives
    path: str


@dataclass(frozen=True)
class Index:
    """The N images of one split."""

    split: str
    location: str  # path or pattern that the user passed
    files: list[Path]  # archives, or the one folder
    offset: np.ndarray  # int64 [N]: bytes, in the archive; -1: the image is a file of its own
    length: np.ndarray  # int64 [N]: bytes
    stored: np.ndarray  # int64 [N]: bytes in the archive; differs from `length` in a zip
    label: np.ndarray  # int32 [N]
    folders: list[Folder]  # of the images
    folder_number: np.ndarray  # int32 [N]: position in `folders`
    base: Strings  # [N]: file names without folder
    suffix: dict[int, int]  # number at the end of the key, of images whose key an earlier one has
    duplicate_key: np.ndarray  # bool [N]: an earlier image has the same name in the same class
    classes: list[str]
    class_names: list[str | None]  # by folder, from the path; not of labels
    key_has_class: bool  # whether a class is prepended to the keys
    tally: Tally = field(default_factory=Tally)  # files that are not images of this split

    def __len__(self) -> int:
        return len(self.length)

    def name(self, i: int) -> str:
        """Return the path of image i in its archive or folder."""
        base = os.fsdecode(self.base[i])
        folder = self.folders[self.folder_number[i]].path
        return f"{folder}/{base}" if folder else base

    def file(self, i: int) -> Path:
        """Return the archive of image i, or the folder of all images."""
        return self.files[self.folders[self.folder_number[i]].file_number]

    def source(self, i: int) -> str:
        """Return archive or folder and path of image i, for messages and reports."""
        name = os.fsencode(self.name(i)).decode(errors="replace")
        return f"{self.file(i).name}/{name}"

    def key_of(self, i: int) -> str:
        """Return the key of image i in the shards: unique, ASCII."""
        base = base_key(self.stem(i), self.class_names[self.folder_number[i]], self.key_has_class)
        return f"{base}--{self.suffix[i]}" if i in self.suffix else base

    def stem(self, i: int) -> str:
        """Return the file name of image i without its ending."""
        return os.fsdecode(self.base[i]).rpartition(".")[0]

    def limited(self, per_class: int, seed: int) -> "Index":
        """Return the index with at most so many images of each class, drawn by the seed; all of a smaller class.

        Raise UserError if the images have no classes.
        """
        if (self.label == UNLABELLED).any():
            raise UserError(f"--{self.split} {self.location} has images without a class. Leave out --per_class.")
        order = np.random.RandomState(seed).permutation(len(self))
        rows = np.sort(np.concatenate([order[self.label[order] == each][:per_class] for each in np.unique(self.label)]))
        tally = Tally(self.tally)
        tally.left_out.add("more than --per_class", count=len(self) - len(rows))
        return replace(self.take(rows), tally=tally)

    def take(self, rows: np.ndarray, split: str = "") -> "Index":
        """Return the index of these images, int64 [M], ascending. split: name of another split that they become.

        Files that are no images are counted in this split alone.
        """
        columns = ("offset", "length", "stored", "label", "folder_number", "duplicate_key")
        suffix = {new: self.suffix[old] for new, old in enumerate(rows.tolist()) if old in self.suffix}
        taken = {name: getattr(self, name)[rows] for name in columns}
        other = {"split": split, "tally": Tally()} if split else {}
        return replace(self, **taken, base=self.base.take(rows.tolist()), suffix=suffix, **other)

    def decompressed(self, folder: Path) -> "Index":
        """Return the index with compressed tars replaced by copies in `folder`, which are made unless they exist."""
        files = []
        for number, path in enumerate(self.files):
            if path.is_dir() or path.suffix.lower() == ".zip" or not is_compressed(path):
                files.append(path)
                continue
            files.append(folder / f"{self.split}-{number}.source")
            if not files[-1].exists():
                partial = files[-1].with_name(f"{files[-1].name}.part")
                decompress(path, partial)
                os.replace(partial, files[-1])
        return replace(self, files=files)

    def read(self, i: int) -> bytes:
        """Return the bytes of image i. Raise UserError, or DamagedMemberError for one in a zip."""
        path, offset, length = self.file(i), int(self.offset[i]), int(self.length[i])
        if offset < 0:
            return read_file(path / self.name(i))
        if path.suffix.lower() == ".zip":
            return read_zip_member(path, offset, length, int(self.stored[i]))
        return read_at(path, offset, length)

    def fingerprint(self) -> str:
        """Return a hash of names, lengths, labels and keys."""
        digest = hashlib.sha256("\0".join(folder.path for folder in self.folders).encode(errors="surrogateescape"))
        self.base.update(digest)
        for column in (self.folder_number, self.length, self.label):
            digest.update(column.tobytes())
        digest.update(repr(self.suffix).encode())
        return digest.hexdigest()


def base_key(stem: str, class_: str | None, key_has_class: bool) -> str:
    """Return the key of an image, which is unique unless its name is that of another image.

    key_has_class: names are unique only in their class folder, and the class is prepended to the key.
    """
    prepend = key_has_class and class_ is not None and stem.partition("_")[0] != class_
    return _ascii_key(f"{class_}_{stem}" if prepend else stem)


def number_duplicates(
    count: int, key_of: Callable[[int], str], name_of: Callable[[int], tuple[str | None, str]]
) -> tuple[dict[int, int], np.ndarray]:
    """Return the suffix of each image whose key an earlier one has, and the images whose name an earlier one has.

    key_of: base_key() of an image. name_of: (class, name), with class None where a name must be unique in the whole
    split. Names that differ but map to the same key get a suffix without counting as duplicates.
    """
    hashes = np.fromiter((hash64(key_of(i)) for i in range(count)), np.int64, count)
    repeated = np.flatnonzero(is_repeated(hashes))
    suffix: dict[int, int] = {}
    if len(repeated):
        hashes.sort()
        given, next_number = set(), {}
        for i in repeated.tolist():
            key = key_of(i)
            number = next_number.get(key, 1)
            while number > 1 and _contains(hashes, given, hash64(f"{key}--{number}")):
                number += 1
            if number > 1:
                suffix[i] = number
                given.add(hash64(f"{key}--{number}"))
            next_number[key] = number + 1
    del hashes
    hashes = np.fromiter((hash64(repr(name_of(i))) for i in range(count)), np.int64, count)
    repeated = np.flatnonzero(is_repeated(hashes))
    _, first = np.unique(hashes[repeated], return_index=True)
    return suffix, np.delete(repeated, first)


def _contains(ordered: np.ndarray, more: set[int], value: int) -> bool:
    """Return whether a value is in an ascending array or in a set."""
    position = int(np.searchsorted(ordered, value))
    return value in more or (position < len(ordered) and int(ordered[position]) == value)


def is_repeated(values: np.ndarray) -> np.ndarray:
    """Return which values occur more than once: bool, as many. It needs 10 bytes of memory a value."""
    ordered = np.sort(values)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    result = np.zeros(len(values), bool)
    for start in range(0, len(values) if len(repeated) else 0, CHUNK):
        chunk = values[start : start + CHUNK]
        positions = np.searchsorted(repeated, chunk).clip(max=len(repeated) - 1)
        result[start : start + CHUNK] = repeated[positions] == chunk
    return result


def hash64(text: str) -> int:
    """Return 64 bits of a hash that is the same in every process."""
    data = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(data, "little", signed=True)


def _ascii_key(name: str) -> str:
    """Return the name in ASCII letters, digits, _ and -, short enough that a numeric suffix can be appended."""
    key = re.sub(r"[^0-9A-Za-z_-]", lambda char: "_" if char[0].isascii() else f"x{ord(char[0]):x}", name)
    if len(key) <= KEY_LENGTH - 10:
        return key
    return key[: KEY_LENGTH - 21] + "-" + hashlib.sha1(name.encode(errors="replace")).hexdigest()[:10]
