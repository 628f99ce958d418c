"""Scan a data set (archives, folders or shards) into one index of its images, in a reproducible order.

    a tar of class tars (ILSVRC2012_img_train.tar), or a folder of class tars
    a tar of class folders, or of images without classes (ILSVRC2012_img_val.tar), labelled by the devkit
    a folder of class folders, or of images without classes
    webdataset shards (timm's, Hugging Face's, ours): KEY.jpg with KEY.cls or KEY.json

Classes are numbered in the order of their names, which for ImageNet is the usual order of its synsets.
"""

import glob
import hashlib
import itertools
import json
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
from braceexpand import braceexpand

from ddae.data.shard_writer import KEY_LENGTH
from ddae.data.shards import MANIFEST
from ddae.errors import UserError
from ddae.sharding.imagenet_devkit import Devkit
from ddae.sharding.tar import members, read_at

JPEG_ENDINGS = (".jpg", ".jpeg")
IMAGE_ENDINGS = (*JPEG_ENDINGS, ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
LABEL_ENDINGS = (".cls", ".json")
UNLABELLED = -1
SPLIT_IN_NAME = re.compile(r"(?<![A-Za-z])(train|val|test)")
SHARD_NAME = re.compile(r"[-_]\d{3,}\.tar$")  # a numbered shard, not a class tar
SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "test"}
Class = str | int | None  # of an image in a source: its name, its number, or not known


@dataclass(frozen=True)
class Index:
    """The N images of one split: names, positions of their bytes, and labels."""

    split: str
    location: str  # path or pattern that the user passed
    files: list[Path]  # archives, or the one folder
    file_number: np.ndarray  # int32 [N]: position in `files`
    offset: np.ndarray  # int64 [N]: bytes, in the archive; -1: the image is a file of its own
    length: np.ndarray  # int64 [N]: bytes
    label: np.ndarray  # int32 [N]
    name: np.ndarray  # UTF-8 bytes [N]: path in the archive or folder
    key: np.ndarray  # ASCII bytes [N]: unique
    duplicate_key: np.ndarray  # bool [N]: an earlier image has the same name, so this one's key ends in a number
    classes: list[str]
    skipped: list[str] = field(default_factory=list)  # files that are not images

    def __len__(self) -> int:
        return len(self.length)

    def source(self, i: int) -> str:
        """Return archive or folder and path of image i, for messages and reports."""
        return f"{self.files[self.file_number[i]].name}/{bytes(self.name[i]).decode(errors='replace')}"

    def key_of(self, i: int) -> str:
        """Return the key of image i in the shards."""
        return bytes(self.key[i]).decode()

    def limited(self, per_class: int, seed: int) -> "Index":
        """Return the index with at most so many images of each class, drawn by the seed; all of a smaller class.

        Raise UserError if the images have no classes.
        """
        if (self.label == UNLABELLED).any():
            raise UserError(f"--{self.split} {self.location} has images without a class. Leave out --per_class.")
        order = np.random.RandomState(seed).permutation(len(self))
        rows = np.sort(np.concatenate([order[self.label[order] == each][:per_class] for each in np.unique(self.label)]))
        by_image = ("file_number", "offset", "length", "label", "name", "key", "duplicate_key")
        return replace(self, **{name: getattr(self, name)[rows] for name in by_image})

    def read(self, i: int) -> bytes:
        """Return the bytes of image i. Raise UserError if it cannot be read."""
        path = self.files[self.file_number[i]]
        if self.offset[i] < 0:
            try:
                return (path / os.fsdecode(bytes(self.name[i]))).read_bytes()
            except OSError as error:
                raise UserError(f"{self.source(i)} cannot be read ({error.strerror}). Restore it.") from None
        return read_at(path, int(self.offset[i]), int(self.length[i]))


def build_index(split: str, location: str, classes: list[str] | None, devkit: Devkit | None) -> Index:
    """Find all images of a split. Raise UserError if there are none, or if their classes are unknown or inconsistent.

    classes: those of a labelled training split, in which case others are rejected; []: training has class numbers only.
    """
    if location.startswith("pipe:"):
        raise UserError(f"--{split} {location!r} would run a command. Pass archives, shards or a folder.")
    path = Path(location)
    if path.is_dir():
        tars = _of_split(sorted(each for each in path.glob("*.tar") if not each.name.startswith(".")), split)
    elif path.is_file():
        tars = [path]
    else:
        tars = [Path(name) for each in braceexpand(location) for name in sorted(glob.glob(each)) or [each]]
        missing = [tar for tar in tars if not tar.is_file()]
        if missing:
            raise UserError(f"--{split} {location}: {missing[0]} does not exist. Check the path.")
    scan = _scan_archives(tars) if tars else _scan_folder(path)
    if not len(scan.length):
        raise UserError(f"--{split} {location} contains no image. Pass files ending in {', '.join(IMAGE_ENDINGS)}.")
    return scan.finish(split, location, classes, devkit)


def unique_keys(names: list[str], classes: list[Class], by_folder: bool) -> tuple[list[str], np.ndarray]:
    """Return a unique key for each image, and which images have the name of an earlier one: bool [N].

    by_folder: names are unique only in their class folder, and the class is prepended to the key. Otherwise a name that
    starts with a class, as ImageNet's do, must be unique in the split, and any other name in its class. Names that
    differ but map to the same key get a numeric suffix without counting as duplicates.
    """
    class_names = {each for each in classes if isinstance(each, str)}
    keys, duplicate, names_seen, suffixes = [], [], set(), {}
    for name, class_ in zip(names, classes, strict=True):
        head, underscore, _ = name.partition("_")
        starts_with_class = bool(underscore) and head in class_names
        identity = (None if starts_with_class and not by_folder else class_, name)
        duplicate.append(identity in names_seen)
        names_seen.add(identity)
        prepend = by_folder and class_ is not None and head != class_
        key = base = _ascii_key(f"{class_}_{name}" if prepend else name)
        while key in suffixes:
            suffixes[base] += 1
            key = f"{base}--{suffixes[base]}"
        suffixes[key] = 1
        keys.append(key)
    return keys, np.array(duplicate, bool)


def _ascii_key(name: str) -> str:
    """Return the name in ASCII letters, digits, _ and -, short enough that a numeric suffix can be appended."""
    key = re.sub(r"[^0-9A-Za-z_-]", lambda char: "_" if char[0].isascii() else f"x{ord(char[0]):x}", name)
    if len(key) <= KEY_LENGTH - 10:
        return key
    return key[: KEY_LENGTH - 21] + "-" + hashlib.sha1(name.encode(errors="replace")).hexdigest()[:10]


def _manifest_classes(folder: Path) -> list[str] | None:
    """Return the class names in the manifest of a folder of our shards; None if there are none."""
    try:
        return json.loads((folder / MANIFEST).read_text())["classes"] or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _of_split(tars: list[Path], split: str) -> list[Path]:
    """Return the tars of a folder that have the split in their name; all of them unless every name has a split."""
    splits = [match and match[1] for match in (SPLIT_IN_NAME.search(tar.name) for tar in tars)]
    if not tars or not all(splits):
        return tars
    of_split = [tar for tar, name in zip(tars, splits, strict=True) if name == split]
    if not of_split:
        raise UserError(f"{tars[0].parent} contains tars, but none with {split!r} in its name. Pass a pattern.")
    return of_split


class _Scan:
    """Images found in files, in compact columns: there may be millions."""

    def __init__(self, files: list[Path], manifest_classes: list[str] | None = None):
        self.files, self.manifest_classes = files, manifest_classes
        self.file_number, self.offset, self.length = array("i"), array("q"), array("q")
        self.name: list[bytes] = []
        self.stem: list[str] = []  # from which the key is made
        self.class_: list[Class] = []
        self.skipped: list[str] = []

    def add(self, file_number: int, name: str, offset: int, length: int, stem: str, class_: Class) -> None:
        """Append an image."""
        self.file_number.append(file_number)
        self.offset.append(offset)
        self.length.append(length)
        self.name.append(name.encode(errors="surrogateescape"))
        self.stem.append(stem)
        self.class_.append(class_)

    def finish(self, split: str, location: str, classes: list[str] | None, devkit: Devkit | None) -> Index:
        """Return the index, with unique keys and labels. Raise UserError as build_index()."""
        keys, duplicate_key = unique_keys(self.stem, self.class_, by_folder=-1 in self.offset[:1])
        label, classes = self._labels(f"--{split} {location}", classes, devkit)
        file_number, offset = np.array(self.file_number, np.int32), np.array(self.offset, np.int64)
        place = (file_number, offset, np.array(self.length, np.int64))
        name, key = np.array(self.name), np.array(keys, "S")
        return Index(split, location, self.files, *place, label, name, key, duplicate_key, classes, self.skipped)

    def _labels(self, source: str, classes: list[str] | None, devkit: Devkit | None) -> tuple[np.ndarray, list[str]]:
        """Return the label of each image, int32 [N], and the names of all classes. source: for error messages."""
        if all(each is None for each in self.class_):
            if devkit is not None:
                self.class_ = devkit.synsets_of([name.decode(errors="replace") for name in self.name], source)
                classes = classes or devkit.synsets
            elif classes is not None:
                raise UserError(f"{source} has no classes, but training has. Pass --devkit.")
            else:
                return np.full(len(self.class_), UNLABELLED, np.int32), []
        if None in self.class_:
            name = self.name[self.class_.index(None)].decode(errors="replace")
            raise UserError(f"{source}: {name} has no label, but other images have. Add its label, or remove it.")
        numbers = [each for each in self.class_ if isinstance(each, int)]
        if numbers:
            expected = classes or self.manifest_classes or []
            if self.manifest_classes and expected != self.manifest_classes:
                raise UserError(f"{source} has other classes than training. Shard it with a separate command.")
            limit = len(expected) or 1 << 31
            extreme = min(numbers) if min(numbers) < 0 else max(numbers)
            if not 0 <= extreme < limit:
                raise UserError(f"{source} has label {extreme}; expected 0 to {limit - 1}. Fix its .cls or .json.")
            return np.array(numbers, np.int32), expected
        if classes == []:
            problem = "has class names, but training has class numbers only"
            raise UserError(f"{source} {problem}. Shard it with a separate command.")
        names = [str(each) for each in self.class_]
        classes = classes or sorted(set(names))
        number = {name: i for i, name in enumerate(classes)}
        unknown = sorted(set(names) - number.keys())
        if unknown:
            problem = f"has class {unknown[0]!r}, which is not among the {len(classes)} classes of training"
            raise UserError(f"{source} {problem}. Pass a split of the same data set.")
        return np.array([number[name] for name in names], np.int32), classes


def _scan_archives(tars: list[Path]) -> _Scan:
    """Scan tars: shards, class tars, or images with or without class folders."""
    first = next(iter(members(tars[0])), None)
    if first is not None and ".tar/" not in first.name and _is_shard(tars[0]):
        return _scan_shards(tars)
    scan = _Scan(tars)
    for number, tar in enumerate(tars):
        for member in members(tar):
            if _is_image(member.name, scan.skipped):
                path = PurePosixPath(member.name)
                class_ = None
                if ".tar/" in member.name:
                    class_ = member.name.partition(".tar/")[0].rpartition("/")[2]
                elif len(tars) > 1:
                    class_ = None if SHARD_NAME.search(tar.name) else tar.stem
                elif len(path.parts) > 1:
                    class_ = path.parts[-2]
                scan.add(number, member.name, member.offset, member.length, path.stem, class_)
    if len(tars) == 1 and len(set(scan.class_)) == 1 and not any(b".tar/" in name for name in scan.name[:1]):
        scan.class_ = [None] * len(scan.class_)  # a single folder around all images is not a class
    return scan


def _is_shard(tar: Path) -> bool:
    """Return whether an image among the first few files has a label or a mask of the same name."""
    endings_of: dict[str, set[str]] = {}
    for member in itertools.islice(members(tar), 22):
        folder, _, base = member.name.rpartition("/")
        endings = endings_of.setdefault(f"{folder}/{base.partition('.')[0]}", set())
        endings.add("." + base.partition(".")[2].lower())
        labels = {ending for ending in endings if ending.endswith(LABEL_ENDINGS)}
        if (labels and labels != endings) or (endings & {*JPEG_ENDINGS} and endings & {*IMAGE_ENDINGS[2:]}):
            return True
    return False


def _scan_shards(tars: list[Path]) -> _Scan:
    """Scan webdataset shards: the part of a file's name before the first dot is its sample's key."""
    scan = _Scan(tars, _manifest_classes(tars[0].parent))
    for number, tar in enumerate(tars):
        images, labels = [], {}
        for member in members(tar):
            folder, _, base = member.name.rpartition("/")
            sample = f"{folder}/{base.partition('.')[0]}"
            if member.name.endswith(LABEL_ENDINGS):
                label = _parse_label(read_at(tar, member.offset, min(member.length, 1 << 20)))
                if label is None and member.name.endswith(".cls"):
                    raise UserError(f"{tar}: the label {member.name} is not a number. Expected a class number.")
                if label is not None:
                    labels.setdefault(sample, label)
            elif _is_image(member.name, scan.skipped):
                images.append((member, sample))
        jpegs = {sample for member, sample in images if member.name.lower().endswith(JPEG_ENDINGS)}
        for member, sample in images:
            if sample in jpegs and not member.name.lower().endswith(JPEG_ENDINGS):
                scan.skipped.append(member.name)  # the mask of a JPEG
                continue
            stem = sample.rpartition("/")[2]
            scan.add(number, member.name, member.offset, member.length, stem, labels.get(sample))
    return scan


def _parse_label(content: bytes) -> int | None:
    """Return the class number in a .cls or .json file; None if there is none."""
    try:
        value = json.loads(content)
        return int(value["label"] if isinstance(value, dict) else value)
    except (ValueError, TypeError, KeyError, OverflowError):
        return None


def _scan_folder(root: Path) -> _Scan:
    """Scan a folder of class folders, or of images."""
    scan = _Scan([root])
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    files = sorted(entry.name for entry in os.scandir(root) if entry.is_file())
    images = [name for name in files if _is_image(name, scan.skipped)]
    if images and folders:
        raise UserError(f"{root} contains both images ({images[0]}) and folders ({folders[0]}). Expected only one.")
    if len({name.lower() for name in folders} & SPLIT_FOLDERS) > 1:
        raise UserError(f"{root} contains several splits ({', '.join(folders)}). Pass each with --train or --val.")
    for name in images:
        scan.add(0, name, -1, (root / name).stat().st_size, Path(name).stem, None)
    for class_ in folders:
        for name in _walk(root / class_):
            path = PurePosixPath(class_, name)
            if _is_image(str(path), scan.skipped):
                scan.add(0, str(path), -1, (root / path).stat().st_size, path.stem, class_)
    return scan


def _walk(folder: Path) -> Iterator[str]:
    """Yield the relative paths of all regular files below a folder, in order."""
    for current, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if (Path(current) / name).is_file():
                yield str((Path(current) / name).relative_to(folder))


def _is_image(name: str, skipped: list[str]) -> bool:
    """Return whether a path has the ending of an image; append it to `skipped` if not."""
    base = name.rpartition("/")[2]
    if base.lower().endswith(IMAGE_ENDINGS) and not base.startswith("."):
        return True
    skipped.append(name)
    return False
