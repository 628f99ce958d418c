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
from ddae.sharding.accounting import Tally
from ddae.sharding.archives import Member, members
from ddae.sharding.classes import Rule, is_hidden
from ddae.sharding.grouping import LABEL_ENDINGS, File, Label, key_of, parse_label, resolve_group
from ddae.sharding.index import Folder, Strings, hash64, is_repeated
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
        self.example: dict[int, str] = {}  # label number -> an image with it
        self.removed: set[int] = set()  # rows that are not images of their own

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
        label_names, labels = Strings(), array("i")
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
                label_names.append(os.fsencode(base))
                labels.append(self.labels.setdefault(label, len(self.labels)))
            elif kind == "label":
                self.tally.other_files.add("label files (--labels none)", member.name)
        for rows, label_rows in _groups(np.frombuffer(image_keys, np.int64), np.frombuffer(label_keys, np.int64)):
            label_files = [File(i, os.fsdecode(label_names[i])) for i in label_rows]
            if not rows:
                self.tally.other_files.add("label files without an image", label_files[0].name, len(label_files))
                continue
            images = [File(first + i, os.fsdecode(self.images.base[first + i])) for i in rows]
            folder = self.folders[self.images.folder_number[first + rows[0]]].path
            where = f"{path}: {folder}{'/' if folder else ''}{key_of(images[0].name)}"
            group = resolve_group(images, label_files, where)
            for each in group.fields:
                self.tally.other_files.add("masks or other fields of samples", f"{path.name}/{each.name}")
            for each in group.replaced:
                self.tally.left_out.add("replaced by a later file of the same name", f"{path.name}/{each.name}")
            self.removed.update(each.number for each in (*group.fields, *group.replaced))
            for image, of_image in group.samples:
                self.label_number[image.number] = self._label(of_image, labels, invalid, where)
                self.tally.other_files.add("label files", count=len(of_image))

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
        number = next(iter(found), 0)
        self.example.setdefault(number, where)
        return number

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


def _groups(image_keys: np.ndarray, label_keys: np.ndarray) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the positions of images and label files that share a key, but for images alone with theirs."""
    num_images = len(image_keys)
    keys = np.concatenate([image_keys, label_keys]) if len(label_keys) else image_keys
    chosen = is_repeated(keys)
    chosen[num_images:] = True
    positions = np.flatnonzero(chosen)
    order = positions[np.argsort(keys[positions], kind="stable")]
    starts = np.flatnonzero(np.diff(keys[order], prepend=keys[order][:1] - 1))
    ends = np.append(starts[1:], len(order))
    by_position = np.argsort(order[starts])  # in the order of the archive
    for start, end in zip(starts[by_position].tolist(), ends[by_position].tolist(), strict=True):
        of_key = order[start:end].tolist()
        images = [i for i in of_key if i < num_images]
        yield images, [i - num_images for i in of_key if i >= num_images]
