"""Scan a data set (archives, folders or shards) into one index of its images, in a reproducible order.

    a tar of class tars (ILSVRC2012_img_train.tar), or a folder of class tars
    a tar or zip of class folders, or of images without classes (ILSVRC2012_img_val.tar), labelled by the devkit
    a folder of class folders, or of images without classes
    webdataset shards (timm's, Hugging Face's, img2dataset's, ours): KEY.jpg with KEY.cls or KEY.json

Classes are numbered in the order of their names, which for ImageNet is the usual order of its synsets. classes.py has
the rule for folders, grouping.py that for label files.
"""

import glob
import json
import os
import re
import stat
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from braceexpand import braceexpand

from ddae.data.shards import MANIFEST
from ddae.errors import UserError
from ddae.sharding.accounting import Tally
from ddae.sharding.archives import ARCHIVE_ENDINGS, Member, members
from ddae.sharding.classes import SYNSET, Rule, classes_of_folders, is_hidden
from ddae.sharding.grouping import LABEL_ENDINGS, File, Label, key_of, parse_label, resolve_group
from ddae.sharding.imagenet_devkit import Devkit
from ddae.sharding.index import UNLABELLED, Index, Strings, base_key, hash64, is_repeated, number_duplicates
from ddae.sharding.inspection import IMAGE_ENDINGS, UNSUPPORTED_ENDINGS

SPLIT_IN_NAME = re.compile(r"(?<![A-Za-z])(train|val|test)")
FROM_PARQUET = (  # converts Hugging Face's files of images; {} is the folder
    "python -c \"import glob, io, json, tarfile, pyarrow.parquet as pq; t = tarfile.open({!r}, 'w'); "
    "add = lambda n, b: t.addfile((i := tarfile.TarInfo(n), setattr(i, 'size', len(b)))[0], io.BytesIO(b)); "
    "[(add(f'{{k}}-{{n}}.jpg', r['image']['bytes']), add(f'{{k}}-{{n}}.cls', str(r['label']).encode())) "
    "for k, p in enumerate(sorted(glob.glob({!r}))) "
    'for n, r in enumerate(r for b in pq.ParquetFile(p).iter_batches() for r in b.to_pylist())]; t.close()"'
)


@dataclass(frozen=True)
class LabelRule:
    """Where the classes come from."""

    classes: Rule = "auto"
    labels: Literal["auto", "none"] = "auto"  # none: ignore all labels and classes


def build_index(
    split: str,
    location: str,
    classes: list[str] | None = None,
    devkit: Devkit | None = None,
    rule: LabelRule = LabelRule(),
) -> Index:
    """Find all images of a split. Raise UserError if there are none, or if their classes are unknown or inconsistent.

    classes: those of a labelled training split, in which case others are rejected; []: training has class numbers only.
    """
    source = f"--{split} {location}"
    files = _find_files(split, location)
    scan = _Scan(files, _manifest_classes(files[0].parent) if files[0].is_file() else None, rule)
    if files[0].is_dir():
        scan.add_folder(files[0])
    else:
        for number, path in enumerate(files):
            scan.add_archive(number, path)
    if not len(scan.images.base):
        raise UserError(f"{source} contains no image{_what_instead(scan, location)}")
    return _Finish(scan, split, location, source).index(classes, devkit)


def describe(index: Index, max_rows: int = 20) -> str:
    """Return the classes of a split with their counts and an example of each, as text; max_rows: of classes."""
    if (index.label == UNLABELLED).all():
        return f"{index.split}: {len(index):,} images without classes, such as {index.source(0)}"
    labels, first, counts = np.unique(index.label, return_index=True, return_counts=True)
    lines = [f"{index.split}: {len(index):,} images of {len(labels):,} classes"]
    rows = [
        (f"{count:9,}", index.classes[label] if index.classes else f"class {label}", index.source(int(example)))
        for label, count, example in zip(labels.tolist(), counts.tolist(), first.tolist(), strict=True)
    ]
    width = min(40, max(len(name) for _, name, _ in rows))
    lines += [f"{count}  {name:{width}}  {example}" for count, name, example in rows[:max_rows]]
    if len(rows) > max_rows:
        lines.append(f"{'':9}  and {len(rows) - max_rows:,} more classes (--dry_run lists all)")
    return "\n".join(lines)


def _find_files(split: str, location: str) -> list[Path]:
    """Return the archives that the location names, or the one folder of images. A path is taken literally if it exists.

    Raise UserError if there is none.
    """
    if location.startswith("pipe:"):
        raise UserError(f"--{split} {location!r} would run a command. Pass archives, shards or a folder.")
    for path in (Path(location), Path(location).expanduser()):
        if path.is_dir():
            try:
                found = sorted(each for each in path.iterdir() if _is_archive(each.name) and each.is_file())
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error.strerror}). Change its permissions.") from None
            archives = _of_split(found, split)
            if archives and (beside := _first_image(path)):
                problem = f"contains both archives ({archives[0].name}) and images ({beside})"
                raise UserError(f"--{split} {location} {problem}. Move one of them, or pass the archives as a pattern.")
            return archives or [path]
        if path.is_file() and path.suffix != ".parquet":
            return [path]
    try:
        patterns = [os.path.expanduser(each) for each in braceexpand(location)]
    except ValueError:
        raise UserError(f"--{split} {location}: a brace is not closed. Write {{0000..0099}}, in quotes.") from None
    found = [Path(name) for each in patterns for name in (sorted(glob.glob(each)) or [each])]
    missing = [each for each in found if not each.is_file()]
    if missing:
        kind = "is a folder; a pattern names archives" if missing[0].is_dir() else "does not exist"
        raise UserError(f"--{split} {location}: {missing[0]} {kind}. Check the path.")
    if found[0].suffix == ".parquet":
        raise UserError(f"--{split} {location} names Parquet files. {_how_to_convert_parquet(location)}")
    return found


def _is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVE_ENDINGS) and not is_hidden(name)


def _first_image(folder: Path) -> str:
    """Return the path of an image in a folder that also holds archives; an empty string without one."""
    for name, _ in _walk(folder):
        if name.lower().endswith(IMAGE_ENDINGS) and not is_hidden(name):
            return name
    return ""


def _of_split(archives: list[Path], split: str) -> list[Path]:
    """Return the archives of a folder with the split in their name; all of them unless every name has a split."""
    splits = [match and match[1] for match in (SPLIT_IN_NAME.search(path.name) for path in archives)]
    if not archives or not all(splits):
        return archives
    of_split = [path for path, name in zip(archives, splits, strict=True) if name == split]
    if not of_split:
        raise UserError(f"{archives[0].parent} contains tars, but none with {split!r} in its name. Pass a pattern.")
    return of_split


def _manifest_classes(folder: Path) -> list[str] | None:
    """Return the class names in the manifest of a folder of our shards; None if there are none."""
    try:
        return json.loads((folder / MANIFEST).read_text())["classes"] or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _what_instead(scan: "_Scan", location: str) -> str:
    """Return what a source without images contains, as the end of an error message."""
    other = scan.tally.left_out + scan.tally.other_files
    if any(name.endswith(".parquet") for names in other.names.values() for name in names):
        return f" but Parquet files. {_how_to_convert_parquet(location.rstrip('/') + '/*.parquet')}"
    found = f" that can be read ({other})" if other.counts else ""
    return f"{found}. Pass files ending in {', '.join(IMAGE_ENDINGS)}."


def _how_to_convert_parquet(pattern: str) -> str:
    return f"Convert them: {FROM_PARQUET.format('images.tar', pattern)}"


class _Folder(NamedTuple):
    """A folder that holds files: in an archive of a source, or below a folder."""

    file_number: int
    path: str


class _Columns:
    """Files of one kind, in compact columns: there may be millions."""

    def __init__(self) -> None:
        self.folder_number, self.base = array("i"), Strings()
        self.offset, self.length, self.stored = array("q"), array("q"), array("q")

    def add(self, folder_number: int, base: str, member: Member) -> None:
        self.folder_number.append(folder_number)
        self.base.append(os.fsencode(base))
        self.offset.append(member.offset)
        self.length.append(member.length)
        self.stored.append(member.stored)


class _Scan:
    """Images, labels and other files found in a source."""

    def __init__(self, files: list[Path], manifest_classes: list[str] | None, rule: LabelRule):
        self.files, self.manifest_classes, self.rule = files, manifest_classes, rule
        self.images, self.tally = _Columns(), Tally()
        self.folders: list[_Folder] = []
        self._folder_numbers: dict[_Folder, int] = {}
        self.labels: dict[Label, int] = {None: 0}  # label -> its number in label_number
        self.label_number = array("i")  # of each image
        self.example: dict[int, str] = {}  # label number -> an image with it
        self.removed: set[int] = set()  # rows that are not images of their own

    def add_folder(self, root: Path) -> None:
        """Add the images below a folder."""
        for name, status in _walk(root):
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
        folder = _Folder(file_number, path)
        number = self._folder_numbers.setdefault(folder, len(self.folders))
        if number == len(self.folders):
            self.folders.append(folder)
        return number


def _walk(root: Path) -> Iterator[tuple[str, os.stat_result | None]]:
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


class _Finish:
    """Classes, labels and keys of what was scanned."""

    def __init__(self, scan: _Scan, split: str, location: str, source: str):
        self.scan, self.split, self.location, self.source = scan, split, location, source
        self.folders = scan.folders
        self.folder_number = np.array(scan.images.folder_number, np.int32)

    def index(self, classes: list[str] | None, devkit: Devkit | None) -> Index:
        """Return the index; see build_index()."""
        scan, images = self.scan, self.scan.images
        has_labels = len(scan.labels) > 1
        by_folder = self._folder_classes(classes or [], has_labels)
        kept = np.ones(len(images.base), bool)
        kept[list(scan.removed)] = False
        of_split = np.array(by_folder.of_split)[self.folder_number]
        scan.tally.left_out.add("images of another split", count=int((kept & ~of_split).sum()))
        rows = np.flatnonzero(kept & of_split)
        label, names = self._labels(rows, by_folder.classes, classes, devkit, has_labels)
        folder_number = self.folder_number[rows]
        chosen = rows if len(rows) < len(images.base) else slice(None)  # a view, if all are chosen
        columns = {n: np.frombuffer(getattr(images, n), np.int64)[chosen] for n in ("offset", "length", "stored")}
        file_number = np.array([folder.file_number for folder in self.folders], np.int32)[folder_number]
        index = Index(
            self.split,
            self.location,
            scan.files,
            file_number,
            **columns,
            label=label,
            folders=[folder.path for folder in self.folders],
            folder_number=folder_number,
            base=images.base if len(rows) == len(images.base) else images.base.take(rows.tolist()),
            suffix={},
            duplicate_key=np.zeros(len(rows), bool),
            classes=names,
            class_names=by_folder.classes,
            key_has_class=scan.files[0].is_dir(),
            tally=scan.tally,
        )
        _number_keys(index)
        return index

    def _folder_classes(self, known: list[str], has_labels: bool):
        """Return the classes of the folders; none if the images have labels."""
        scan, several = self.scan, len(self.scan.files) > 1
        archives, paths = set(), []
        for folder in self.folders:
            parts = [] if not several else [_archive_stem(scan.files[folder.file_number].name)]
            archives |= set(parts)
            for part in filter(None, folder.path.split("/")):
                is_tar = part.lower().endswith(".tar") and not scan.files[0].is_dir()
                parts.append(part[:-4] if is_tar else part)
                archives |= {parts[-1]} if is_tar else set()
            paths.append(tuple(part for part in parts if part != "."))
        rule = "label" if has_labels or scan.rule.labels == "none" else scan.rule.classes
        if rule == "label":  # folders do not matter, but for those of splits
            return classes_of_folders(self.source, paths, (), "label", self.split, ())
        return classes_of_folders(self.source, paths, archives, rule, self.split, known)

    def _labels(
        self,
        rows: np.ndarray,
        folder_classes: list[str | None],
        classes: list[str] | None,
        devkit: Devkit | None,
        has_labels: bool,
    ) -> tuple[np.ndarray, list[str]]:
        """Return the label of each image of these rows, int32, and the names of all classes."""
        scan, rule = self.scan, self.scan.rule
        if rule.labels == "none":
            return np.full(len(rows), UNLABELLED, np.int32), []
        if has_labels:
            values = list(scan.labels)
            return self._number(np.array(scan.label_number, np.int32)[rows], values, classes, devkit)
        if rule.classes == "label":
            raise UserError(f"{self.source} has no labels. Leave out --classes label.")
        if rule.classes == "synset":
            return self._number(*self._per_image(rows, self._synset), classes, devkit)
        if any(folder_classes):
            values = [None, *dict.fromkeys(name for name in folder_classes if name is not None)]
            number = {name: i for i, name in enumerate(values)}
            of_folder = np.array([number[name] for name in folder_classes], np.int32)
            return self._number(of_folder[self.folder_number[rows]], values, classes, devkit)
        if devkit is not None:
            names = [self._name(row) for row in rows.tolist()]
            synsets = devkit.synsets_of(names, self.source)
            values = list(dict.fromkeys(synsets))
            number = {name: i for i, name in enumerate(values)}
            numbers = np.array([number[synset] for synset in synsets], np.int32)
            return self._number(numbers, values, classes or devkit.synsets, devkit)
        if classes is not None:
            raise UserError(f"{self.source} has no classes, but training has. Pass --devkit.")
        return np.full(len(rows), UNLABELLED, np.int32), []

    def _per_image(self, rows: np.ndarray, find) -> tuple[np.ndarray, list[Label]]:
        """Return for each image the number of find(name), and what the numbers stand for."""
        numbers: dict[Label, int] = {}
        found = array("i", (numbers.setdefault(find(self._name(row)), len(numbers)) for row in rows.tolist()))
        return np.array(found, np.int32), list(numbers)

    def _name(self, row: int) -> str:
        folder = self.folders[self.folder_number[row]].path
        base = self.scan.images.base[row].decode(errors="replace")
        return f"{folder}/{base}" if folder else base

    def _synset(self, name: str) -> str:
        found = SYNSET.findall(name.rpartition("/")[2])
        if not found:
            raise UserError(f"{self.source}: {name} contains no WordNet id. Leave out --classes synset.")
        return found[-1]

    def _number(
        self, numbers: np.ndarray, values: list[Label], classes: list[str] | None, devkit: Devkit | None
    ) -> tuple[np.ndarray, list[str]]:
        """Return labels and class names. numbers: of each image's value in `values`, which may be names or numbers."""
        scan = self.scan
        used = Counter(numbers.tolist())
        if None in values and used[values.index(None)]:
            first = self._name(int(np.flatnonzero(numbers == values.index(None))[0]))
            raise UserError(f"{self.source}: {first} has no label, but other images have. Add its label, or remove it.")
        found = [values[number] for number in used]
        ints, names = [v for v in found if isinstance(v, int)], [v for v in found if isinstance(v, str)]
        if ints and names:
            problem = f"has class numbers ({ints[0]}) and class names ({names[0]!r})"
            raise UserError(f"{self.source} {problem}. Use one of them, or pass --labels none.")
        if ints:
            expected = classes or scan.manifest_classes or []
            if scan.manifest_classes and expected != scan.manifest_classes:
                raise UserError(f"{self.source} has other classes than training. Shard it with a separate command.")
            limit = len(expected) or 1 << 31
            extreme = min(ints) if min(ints) < 0 else max(ints)
            if not 0 <= extreme < limit:
                where = scan.example.get(values.index(extreme), self.source)
                raise UserError(f"{where} has label {extreme}; expected 0 to {limit - 1}. Fix its .cls or .json.")
            label_of = np.array([value if isinstance(value, int) else -1 for value in values], np.int64)
            return label_of.clip(-1, limit)[numbers].astype(np.int32), expected
        if classes == []:
            problem = "has class names, but training has class numbers only"
            raise UserError(f"{self.source} {problem}. Shard it with a separate command.")
        is_label_file = len(scan.labels) > 1
        known = classes or scan.manifest_classes or (devkit.synsets if devkit is not None else None)
        if is_label_file and not known and scan.rule.classes != "label":
            where = scan.example[values.index(names[0])]
            fix = "Pass --classes label if its labels are names of classes, or --labels none."
            raise UserError(f"{where} has the label {names[0]!r}; expected a class number. {fix}")
        expected = classes or (known if is_label_file and known else sorted(names))
        position = {name: i for i, name in enumerate(expected)}
        unknown = sorted(set(names) - position.keys())
        if unknown:
            where = scan.example.get(values.index(unknown[0]), self.source) if is_label_file else self.source
            problem = f"has class {unknown[0]!r}, which is not among the {len(expected)} classes of training"
            raise UserError(f"{where} {problem}. Pass a split of the same data set.")
        label_of = np.array([position.get(value, -1) if isinstance(value, str) else -1 for value in values], np.int32)
        return label_of[numbers], list(expected)


def _number_keys(index: Index) -> None:
    """Fill in the suffixes of keys that are not unique, and the images whose name is not unique."""
    class_names = {name for name in index.class_names if name}

    def key_of(i: int) -> str:
        return base_key(index.stem(i), index.class_names[index.folder_number[i]], index.key_has_class)

    def name_of(i: int) -> tuple[str | None, str]:
        stem, class_ = index.stem(i), index.class_names[index.folder_number[i]]
        head, underscore, _ = stem.partition("_")
        # A name that starts with a class, as ImageNet's do, must be unique in the split, any other in its class.
        starts_with_class = bool(underscore) and head in class_names and not index.key_has_class
        return None if starts_with_class else class_, stem

    suffix, duplicates = number_duplicates(len(index), key_of, name_of)
    index.suffix.update(suffix)
    index.duplicate_key[duplicates] = True


def _archive_stem(name: str) -> str:
    """Return an archive's name without its ending."""
    ending = next(each for each in sorted(ARCHIVE_ENDINGS, key=len, reverse=True) if name.lower().endswith(each))
    return name[: -len(ending)]
