"""Where a data set comes from: archives, folders or shards, as one index of its images in one order.

    a tar of one tar a class (ILSVRC2012_img_train.tar), or a folder of such class tars
    a tar of images without classes (ILSVRC2012_img_val.tar), labelled by the devkit; or of class folders
    a folder of class folders, or of images without classes
    shards in webdataset's form (timm's, Hugging Face's, ours): KEY.jpg with KEY.cls or KEY.json

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
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from braceexpand import braceexpand

from ddae.data.shard_writer import KEY_LENGTH
from ddae.data.shards import MANIFEST
from ddae.errors import UserError
from ddae.sharding.imagenet_devkit import Devkit
from ddae.sharding.tar import members, read_at


def unique_keys(names: list[str], groups: list[str | int | None], by_folder: bool) -> tuple[list[str], np.ndarray]:
    """Names and classes of images -> a key for each, and which of them repeat an earlier name: bool [N].

    by_folder: a name stands for an image of its class's folder alone, and the key has the class before it. Else a name
    that begins with a class, as ImageNet's do, repeats any like it, and another one those of its class. Names that only
    look alike once they are written as keys get a number too, but are no repetition.
    """
    classes = {group for group in groups if isinstance(group, str)}
    keys, repeated, seen, used = [], [], set(), {}
    for name, group in zip(names, groups, strict=True):
        head, underscore, _ = name.partition("_")
        begins_with_class = bool(underscore) and head in classes
        identity = (None if begins_with_class and not by_folder else group, name)
        repeated.append(identity in seen)
        seen.add(identity)
        key = plain = _plain(f"{group}_{name}" if by_folder and group is not None and head != group else name)
        while key in used:
            used[plain] += 1
            key = f"{plain}--{used[plain]}"
        used[key] = 1
        keys.append(key)
    return keys, np.array(repeated, bool)


def _plain(name: str) -> str:
    """The name in ASCII letters, digits, _ and -, with room left for a number."""
    plain = re.sub(r"[^0-9A-Za-z_-]", lambda found: "_" if found[0].isascii() else f"x{ord(found[0]):x}", name)
    if len(plain) <= KEY_LENGTH - 10:
        return plain
    return plain[: KEY_LENGTH - 21] + "-" + hashlib.sha1(name.encode(errors="replace")).hexdigest()[:10]


JPEG_ENDINGS = (".jpg", ".jpeg")
IMAGE_ENDINGS = (*JPEG_ENDINGS, ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
LABEL_ENDINGS = (".cls", ".json")
UNLABELLED = -1
SPLIT_WORD = re.compile(r"(?<![A-Za-z])(train|val|test)")
SHARD_NAME = re.compile(r"[-_]\d{3,}\.tar$")  # of one among many, not a class
SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "test"}


@dataclass(frozen=True)
class Index:
    """The N images of one split: what they are called, where their bytes lie, what class they are of."""

    split: str
    where: str  # as the user named it
    files: list[Path]  # archives, or the one folder
    file: np.ndarray  # int32 [N]: which of `files`
    offset: np.ndarray  # int64 [N]: within the archive; -1 where the image is a file of its own
    length: np.ndarray  # int64 [N]: bytes
    label: np.ndarray  # int32 [N]
    name: np.ndarray  # UTF-8 bytes [N]: path within the archive or folder
    key: np.ndarray  # ASCII bytes [N]: unique
    repeated: np.ndarray  # bool [N]: an earlier image has the same key, so this one's ends in a number
    classes: list[str]
    passed_over: list[str] = field(default_factory=list)  # files that are no images

    def __len__(self) -> int:
        return len(self.length)

    def source(self, i: int) -> str:
        """Image i by a name that its owner knows."""
        return f"{self.files[self.file[i]].name}/{bytes(self.name[i]).decode(errors='replace')}"

    def key_of(self, i: int) -> str:
        return bytes(self.key[i]).decode()

    def read(self, i: int) -> bytes:
        """The file of image i."""
        path = self.files[self.file[i]]
        if self.offset[i] < 0:
            try:
                return (path / os.fsdecode(bytes(self.name[i]))).read_bytes()
            except OSError as error:
                raise UserError(f"{self.source(i)} cannot be read ({error.strerror}): put it back") from None
        return read_at(path, int(self.offset[i]), int(self.length[i]))


def index(split: str, where: str, classes: list[str] | None, devkit: Devkit | None) -> Index:
    """Find all images of a split; UserError where there are none, or their classes cannot be known.

    classes: those of the training split, where that is labelled (none of them: by numbers alone); others are refused.
    """
    if where.startswith("pipe:"):
        raise UserError(f"--{split} {where!r} would run a command: name archives, shards or a folder")
    path = Path(where)
    if path.is_dir():
        tars = sorted(each for each in path.glob("*.tar") if not each.name.startswith("."))
        found = _folder(path) if not tars else _archives(_of_split(tars, split), known_classes(path))
    elif path.is_file():
        found = _archives([path], known_classes(path.parent))
    else:
        tars = [Path(name) for each in braceexpand(where) for name in sorted(glob.glob(each)) or [each]]
        missing = [tar for tar in tars if not tar.is_file()]
        if missing:
            raise UserError(f"--{split} {where}: {missing[0]} does not exist: check the name")
        found = _archives(tars, known_classes(tars[0].parent))
    if not len(found.length):
        raise UserError(f"--{split} {where} holds no image ({', '.join(IMAGE_ENDINGS)}): name the archive or folder")
    return found.finish(split, where, classes, devkit)


def known_classes(folder: Path) -> list[str] | None:
    """The class names that a manifest of ours in this folder gives; None where there is none."""
    try:
        return json.loads((folder / MANIFEST).read_text())["classes"] or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _of_split(tars: list[Path], split: str) -> list[Path]:
    """Of a folder's tars those that are named after the split; all, where not all are named after one."""
    found = [SPLIT_WORD.search(tar.name) for tar in tars]
    if not all(found):
        return tars
    named = [tar for tar, word in zip(tars, found, strict=True) if word is not None and word[1] == split]
    if not named:
        raise UserError(f"{tars[0].parent} holds tars, but none with {split!r} in its name: name a pattern")
    return named


class _Found:
    """What a scan has found so far, in compact columns: there may be millions of images."""

    def __init__(self, files: list[Path], classes: list[str] | None = None):
        self.files, self.classes = files, classes
        self.file, self.offset, self.length = array("i"), array("q"), array("q")
        self.name: list[bytes] = []
        self.stem: list[str] = []
        self.group: list[str | int | None] = []  # class name, or number, or neither
        self.passed_over: list[str] = []

    def add(self, file: int, name: str, offset: int, length: int, stem: str, group: str | int | None) -> None:
        self.file.append(file)
        self.offset.append(offset)
        self.length.append(length)
        self.name.append(name.encode(errors="surrogateescape"))
        self.stem.append(stem)
        self.group.append(group)

    def finish(self, split: str, where: str, classes: list[str] | None, devkit: Devkit | None) -> Index:
        keys, repeated = unique_keys(self.stem, self.group, by_folder=-1 in self.offset[:1])
        label, own = self._labels(split, where, classes, devkit)
        return Index(
            split=split,
            where=where,
            files=self.files,
            file=np.array(self.file, np.int32),
            offset=np.array(self.offset, np.int64),
            length=np.array(self.length, np.int64),
            label=label,
            name=np.array(self.name),
            key=np.array(keys, "S"),
            repeated=repeated,
            classes=own,
            passed_over=self.passed_over,
        )

    def _labels(
        self, split: str, where: str, classes: list[str] | None, devkit: Devkit | None
    ) -> tuple[np.ndarray, list[str]]:
        """The class number of each image, and the names of all classes."""
        if all(group is None for group in self.group):
            if devkit is not None:
                self.group = devkit.synsets_of([name.decode(errors="replace") for name in self.name], where)
                classes = classes or devkit.synsets
            elif classes is not None:
                raise UserError(f"--{split} {where} has no classes of its own: give its labels with --devkit")
            else:
                return np.full(len(self.group), UNLABELLED, np.int32), []
        if any(group is None for group in self.group):
            lost = self.name[self.group.index(None)].decode(errors="replace")
            raise UserError(f"--{split} {where}: {lost} has no label, though others have: complete it or take it out")
        numbered = [group for group in self.group if isinstance(group, int)]
        if numbered:
            known = classes or self.classes or []
            if self.classes and known != self.classes:
                raise UserError(f"--{split} {where} numbers other classes than training does: shard each by itself")
            limit = len(known) or 1 << 31
            if min(numbered) < 0 or max(numbered) >= limit:
                wrong = min(numbered) if min(numbered) < 0 else max(numbered)
                raise UserError(f"--{split} {where} has label {wrong}, outside its {limit} classes: mend its .cls")
            return np.array(numbered, np.int32), known
        if classes == []:
            raise UserError(f"--{split} {where} names its classes, training only numbers them: shard each by itself")
        own = classes or sorted({str(group) for group in self.group})
        number = {name: i for i, name in enumerate(own)}
        strange = sorted({str(group) for group in self.group} - number.keys())
        if strange:
            raise UserError(
                f"--{split} {where} has class {strange[0]!r}, which is not among the {len(own)} of training: "
                "is it another data set's?"
            )
        return np.array([number[str(group)] for group in self.group], np.int32), own


def _archives(tars: list[Path], classes: list[str] | None) -> _Found:
    """Scan tars: shards, class tars, or images with or without class folders."""
    first = next(iter(members(tars[0])), None)
    if first is not None and ".tar/" not in first.name and _holds_shards(tars[0]):
        return _shards(tars, classes)
    found = _Found(tars)
    for number, tar in enumerate(tars):
        for member in members(tar):
            if _is_image(member.name, found.passed_over):
                path = PurePosixPath(member.name)
                group = None
                if ".tar/" in member.name:
                    group = member.name.partition(".tar/")[0].rpartition("/")[2]
                elif len(tars) > 1:
                    group = None if SHARD_NAME.search(tar.name) else tar.stem
                elif len(path.parts) > 1:
                    group = path.parts[-2]
                found.add(number, member.name, member.offset, member.length, path.stem, group)
    if len(tars) == 1 and len(set(found.group)) == 1 and not any(b".tar/" in name for name in found.name[:1]):
        found.group = [None] * len(found.group)  # one folder around all images is not a class
    return found


def _holds_shards(tar: Path) -> bool:
    """Whether images have labels or masks beside them, under the same name; seen in the first few files."""
    found: dict[str, set[str]] = {}
    for member in itertools.islice(members(tar), 22):
        folder, _, base = member.name.rpartition("/")
        endings = found.setdefault(f"{folder}/{base.partition('.')[0]}", set())
        endings.add("." + base.partition(".")[2].lower())
        labels = {ending for ending in endings if ending.endswith(LABEL_ENDINGS)}
        if (labels and labels != endings) or (endings & {*JPEG_ENDINGS} and endings & {*IMAGE_ENDINGS[2:]}):
            return True
    return False


def _shards(tars: list[Path], classes: list[str] | None) -> _Found:
    """Scan shards in webdataset's form: what is before the first dot of a file's name is its sample's key."""
    found = _Found(tars, classes)
    for number, tar in enumerate(tars):
        places, labels = [], {}
        for member in members(tar):
            folder, _, base = member.name.rpartition("/")
            sample = f"{folder}/{base.partition('.')[0]}"
            if member.name.endswith(LABEL_ENDINGS):
                label = _label(read_at(tar, member.offset, min(member.length, 1 << 20)))
                if label is None and member.name.endswith(".cls"):
                    raise UserError(f"{tar} holds {member.name}, whose label is no number: class numbers are expected")
                if label is not None:
                    labels.setdefault(sample, label)
            elif _is_image(member.name, found.passed_over):
                places.append((member, sample))
        photos = {sample for member, sample in places if member.name.lower().endswith(JPEG_ENDINGS)}
        for member, sample in places:
            if sample in photos and not member.name.lower().endswith(JPEG_ENDINGS):
                found.passed_over.append(member.name)  # a photograph's mask
                continue
            found.add(number, member.name, member.offset, member.length, sample.rpartition("/")[2], labels.get(sample))
    return found


def _label(content: bytes) -> int | None:
    """The class number that a .cls or .json file holds."""
    try:
        value = json.loads(content)
        return int(value["label"] if isinstance(value, dict) else value)
    except (ValueError, TypeError, KeyError, OverflowError):
        return None


def _folder(root: Path) -> _Found:
    """Scan a folder of class folders, or of images."""
    found = _Found([root])
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    loose = sorted(entry.name for entry in os.scandir(root) if entry.is_file())
    images = [name for name in loose if _is_image(name, found.passed_over)]
    if images and folders:
        raise UserError(f"{root} holds images ({images[0]}) beside folders ({folders[0]}): name one or the other")
    if len({name.lower() for name in folders} & SPLIT_FOLDERS) > 1:
        raise UserError(f"{root} holds {' and '.join(folders)}: name each with --train and --val")
    for name in images:
        found.add(0, name, -1, (root / name).stat().st_size, Path(name).stem, None)
    for group in folders:
        for name in _walk(root / group):
            path = PurePosixPath(group, name)
            if _is_image(str(path), found.passed_over):
                found.add(0, str(path), -1, (root / path).stat().st_size, path.stem, group)
    return found


def _walk(folder: Path) -> Iterator[str]:
    """Regular files below a folder, by their paths within it, in order."""
    for current, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if (Path(current) / name).is_file():
                yield str((Path(current) / name).relative_to(folder))


def _is_image(name: str, passed_over: list[str]) -> bool:
    """Whether a file's name is an image's; if not, the name is noted."""
    base = name.rpartition("/")[2]
    if base.lower().endswith(IMAGE_ENDINGS) and not base.startswith("."):
        return True
    passed_over.append(name)
    return False
