"""What a source contains, by name alone: images, their label files, and everything else, counted by reason."""

import os
import stat
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ddae.errors import UserError
from ddae.sharding.accounting import MAX_NAMES, Tally
from ddae.sharding.archives import Member, members
from ddae.sharding.classes import Rule, is_hidden
from ddae.sharding.grouping import LABEL_ENDINGS, File, Label, key_of, parse_label, resolve_group
from ddae.sharding.index import Folder, Strings, hash64
from ddae.sharding.inspection import IMAGE_ENDINGS, UNSUPPORTED_ENDINGS


@dataclass(frozen=True)
class LabelRule:
    """Where the classes come from."""

    classes: Rule = "auto"
    labels: Literal["auto", "none"] = "auto"  # none: ignore all labels and classes


AUTO = LabelRule()


class _Columns:
    """Images, in compact columns: there may be millions."""

    def __init__(self, in_zip: bool):
        self.folder_number, self.base = array("i"), Strings()
        self.offset, self.length = array("q"), array("q")
        self.stored = array("q") if in_zip else self.length  # only files of a zip are compressed

    def add(self, folder_number: int, base: str, member: Member) -> None:
        self.folder_number.append(folder_number)
        self.base.append(os.fsencode(base))
        self.offset.append(member.offset)
        self.length.append(member.length)
        if self.stored is not self.length:
            self.stored.append(member.stored)


class Scan:
    """Images, labels and other files found in a source."""

    def __init__(self, files: list[Path], manifest_classes: list[str] | None, rule: LabelRule):
        self.files, self.manifest_classes, self.rule = files, manifest_classes, rule
        self.images = _Columns(any(path.suffix.lower() == ".zip" for path in files))
        self.tally = Tally()
        self.folders: list[Folder] = []
        self._folder_numbers: dict[Folder, int] = {}
        self.labels: dict[Label, int] = {None: 0}  # label -> its number in label_number
        self.label_number = array("i")  # of each image
        self.removed = array("q")  # rows that are not images of their own

    def add_folder(self, root: Path) -> None:
        """Add the images below a folder."""
        for name, status in walk(root):
            kind = self._kind(name, status is not None)
            if kind == "image" and status is not None:
                folder, _, base = name.rpartition("/")
                self.images.add(self._folder(0, folder), base, Member(name, -1, status.st_size, status.st_size))
                self.label_number.append(0)
            elif kind == "label":
                self.tally.other_files.add("label files, which are read in archives only", name)

    def add_archive(self, number: int, path: Path) -> None:
        """Add the images of an archive, with the labels in it."""
        first = len(self.images.base)
        image_keys, label_keys = array("q"), array("q")  # hashes of folder and key
        label_ends, labels = Strings(), array("i")  # of each label file: its name without the key, its label
        invalid: dict[int, str] = {}  # label files without a valid label
        wants_labels = self.rule.labels != "none"
        for member in members(path, LABEL_ENDINGS if wants_labels else ()):
            kind = self._kind(member.name, True)
            folder, _, base = member.name.rpartition("/")
            if kind == "image":
                image_keys.append(hash64(f"{folder}/{key_of(base)}"))
                self.images.add(self._folder(number, folder), base, member)
                self.label_number.append(0)
            elif kind == "label" and wants_labels:
                try:
                    label = parse_label(base, member.content)
                except ValueError as error:
                    invalid[len(labels)], label = str(error), None
                label_keys.append(hash64(f"{folder}/{key_of(base)}"))
                label_ends.append(os.fsencode(base.removeprefix(key_of(base))))
                labels.append(self.labels.setdefault(label, len(self.labels)))
            elif kind == "label":
                self.tally.other_files.add("label files (--labels none)", member.name)
        without_image, fields, replaced = array("q"), array("q"), array("q")
        for rows, label_rows in _groups(np.frombuffer(image_keys, np.int64), np.frombuffer(label_keys, np.int64)):
            if not rows:
                without_image.extend(label_rows)
                continue
            images = [File(first + i, self._base(first + i)) for i in rows]
            key = key_of(images[0].name)
            label_files = [File(i, key + os.fsdecode(label_ends[i])) for i in label_rows]
            folder = self.folders[self.images.folder_number[first + rows[0]]].path
            where = f"{path}: {folder}{'/' if folder else ''}{key}"
            group = resolve_group(images, label_files, where)
            fields.extend(each.number for each in group.fields)
            replaced.extend(each.number for each in group.replaced)
            for image, of_image in group.samples:
                self.label_number[image.number] = self._label(of_image, labels, invalid, where)
                self.tally.other_files.add("label files", count=len(of_image))
        for row in sorted(fields):
            name = f"{path.name}/{self._base(row)}"
            self.tally.other_files.add("masks or other fields of samples", name)
        for row in sorted(replaced):
            name = f"{path.name}/{self._base(row)}"
            self.tally.left_out.add("replaced by a later file of the same name", name)
        self.removed += fields + replaced
        if without_image:
            first_ones = set(sorted(without_image)[:MAX_NAMES])
            names = (member.name for member in members(path) if _is_label(member.name))
            for position, name in enumerate(names):  # read again, as names of label files are not kept
                if position in first_ones:
                    self.tally.other_files.add("label files without an image", name)
            count = len(without_image) - len(first_ones)
            self.tally.other_files.add("label files without an image", count=count)

    def _base(self, row: int) -> str:
        """Return an image's file name without folder."""
        return os.fsdecode(self.images.base[row])

    def _label(self, label_files: list[File], labels: array, invalid: dict[int, str], where: str) -> int:
        """Return the number of the label that the label files of one image contain."""
        for file in label_files:
            if file.number in invalid:
                problem = f"{where} has the label {invalid[file.number]} in {file.name}"
                raise UserError(f"{problem}; expected a class number or name. Fix it, or pass --labels none.")
        found = {labels[file.number]: file for file in label_files if labels[file.number]}
        if len(found) > 1:
            values = list(self.labels)
            texts = " and ".join(f"{values[number]!r} ({file.name})" for number, file in found.items())
            raise UserError(f"{where} has two labels, {texts}. Keep one of them, or pass --labels none.")
        return next(iter(found), 0)

    def _kind(self, name: str, is_file: bool) -> Literal["image", "label", ""]:
        """Return what a file is, and count it if it is neither image nor label."""
        base = name.rpartition("/")[2]
        ending = os.path.splitext(base)[1].lower()
        if is_hidden(name):
            self.tally.other_files.add("hidden or system files", name)
        elif not is_file:
            reasons = self.tally.left_out if ending in IMAGE_ENDINGS else self.tally.other_files
            reasons.add("dangling links, pipes or sockets", name)
        elif ending in IMAGE_ENDINGS:
            return "image"
        elif ending in LABEL_ENDINGS:
            return "label"
        elif ending in UNSUPPORTED_ENDINGS:
            self.tally.left_out.add(f"{ending} (convert them to PNG first)", name)
        elif not ending:
            self.tally.other_files.add("files without an ending (images need .jpg, .png, ...)", name)
        else:
            self.tally.other_files.add(f"{ending} files" if len(ending) < 12 else "other files", name)
        return ""

    def _folder(self, file_number: int, path: str) -> int:
        """Return the number of a folder."""
        folder = Folder(file_number, path)
        number = self._folder_numbers.setdefault(folder, len(self.folders))
        if number == len(self.folders):
            self.folders.append(folder)
        return number


def walk(root: Path) -> Iterator[tuple[str, os.stat_result | None]]:
    """Yield the relative paths of all files below a folder, in order, and their status; None: not a regular file.

    Links to folders are followed. Raise UserError for a folder that cannot be read, or a link to a folder around it.
    """

    def fail(error: OSError):
        raise UserError(f"{error.filename} cannot be read ({error.strerror}). Change its permissions.") from None

    above: dict[str, tuple[int, int]] = {}  # device and inode of each folder that is being walked
    for current, folders, names in os.walk(root, onerror=fail, followlinks=True):
        status = os.stat(current)
        for path in list(above):
            if not current.startswith(f"{path}{os.sep}"):
                del above[path]
        identity = (status.st_dev, status.st_ino)
        if identity in above.values():
            raise UserError(f"{current} is a link to a folder that contains it. Remove the link.")
        above[current] = identity
        folders.sort()
        for name in sorted(names):
            path = os.path.join(current, name)
            try:
                file_status = os.stat(path)
            except OSError:
                file_status = None
            is_regular = file_status is not None and stat.S_ISREG(file_status.st_mode)
            yield os.path.relpath(path, root), file_status if is_regular else None


def _is_label(name: str) -> bool:
    """Return whether a path is that of a label file."""
    return name.lower().endswith(LABEL_ENDINGS) and not is_hidden(name)


def _groups(image_keys: np.ndarray, label_keys: np.ndarray) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the positions of images and label files that share a key, except those of an image alone with its key.

    image_keys, label_keys: hashes, int64. Those of one low byte are compared at a time, which limits the memory.
    """
    low_bytes = [keys.view(np.uint8)[::8] for keys in (image_keys, label_keys)]
    for value in range(256):
        images, labels = (np.flatnonzero(each == value) for each in low_bytes)
        keys = np.concatenate([image_keys[images], label_keys[labels]])
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order], prepend=keys[order][:1] - 1))
        ends = np.append(starts, len(order))[1:]
        wanted = (ends - starts > 1) | (order[starts] >= len(images))
        for start, end in zip(starts[wanted].tolist(), ends[wanted].tolist(), strict=True):
            of_key = order[start:end]
            of_labels = of_key[of_key >= len(images)] - len(images)
            yield images[of_key[of_key < len(images)]].tolist(), labels[of_labels].tolist()
