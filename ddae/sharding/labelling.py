"""Classes, labels and keys of what was scanned."""

from array import array
from collections import Counter

import numpy as np

from ddae.errors import UserError
from ddae.sharding.archives import ARCHIVE_ENDINGS
from ddae.sharding.classes import SYNSET, classes_of_folders
from ddae.sharding.grouping import Label
from ddae.sharding.imagenet_devkit import Devkit
from ddae.sharding.index import UNLABELLED, Index, base_key, number_duplicates
from ddae.sharding.scan import Scan


class Labelling:
    """Classes, labels and keys of what was scanned."""

    def __init__(self, scan: Scan, split: str, location: str, source: str):
        self.scan, self.split, self.location, self.source = scan, split, location, source
        self.folders = scan.folders
        self.folder_number = np.frombuffer(scan.images.folder_number, np.int32)
        self.has_labels = any(scan.label_number)  # of label files

    def index(self, classes: list[str] | None, devkit: Devkit | None) -> Index:
        """Return the index; see build_index()."""
        scan, images = self.scan, self.scan.images
        by_folder = self._folder_classes(classes or [])
        kept = np.ones(len(images.base), bool)
        kept[np.frombuffer(scan.removed, np.int64)] = False
        of_split = np.array(by_folder.of_split)[self.folder_number]
        scan.tally.left_out.add("images of another split", count=int((kept & ~of_split).sum()))
        rows = np.flatnonzero(kept & of_split)
        del kept, of_split
        label, names = self._labels(rows, by_folder.classes, classes, devkit)
        is_all = len(rows) == len(images.base)
        chosen = slice(None) if is_all else rows  # a view, if all are chosen
        base = images.base if is_all else images.base.take(rows.tolist())
        del rows
        folder_number = self.folder_number[chosen]
        columns = {n: np.frombuffer(getattr(images, n), np.int64)[chosen] for n in ("offset", "length", "stored")}
        index = Index(
            self.split,
            self.location,
            scan.files,
            **columns,
            label=label,
            folders=self.folders,
            folder_number=folder_number,
            base=base,
            suffix={},
            duplicate_key=np.zeros(len(base), bool),
            classes=names,
            class_names=by_folder.classes,
            key_has_class=scan.files[0].is_dir(),
            tally=scan.tally,
        )
        _number_keys(index)
        return index

    def _folder_classes(self, known: list[str]):
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
        rule = "label" if self.has_labels or scan.rule.labels == "none" else scan.rule.classes
        if rule == "label":  # folders do not matter, but for those of splits
            return classes_of_folders(self.source, paths, (), "label", self.split, ())
        return classes_of_folders(self.source, paths, archives, rule, self.split, known)

    def _labels(
        self,
        rows: np.ndarray,
        folder_classes: list[str | None],
        classes: list[str] | None,
        devkit: Devkit | None,
    ) -> tuple[np.ndarray, list[str]]:
        """Return the label of each image of these rows, int32, and the names of all classes."""
        scan, rule = self.scan, self.scan.rule
        if rule.labels == "none":
            return np.full(len(rows), UNLABELLED, np.int32), []
        if self.has_labels:
            values = list(scan.labels)
            return self._number(rows, np.array(scan.label_number, np.int32)[rows], values, classes, devkit)
        if rule.classes == "label":
            raise UserError(f"{self.source} has no labels. Leave out --classes label.")
        if rule.classes == "synset":
            return self._number(rows, *self._per_image(rows, self._synset), classes, devkit)
        if any(folder_classes):
            values = [None, *dict.fromkeys(name for name in folder_classes if name is not None)]
            number = {name: i for i, name in enumerate(values)}
            of_folder = np.array([number[name] for name in folder_classes], np.int32)
            return self._number(rows, of_folder[self.folder_number[rows]], values, classes, devkit)
        if devkit is not None:
            found = self._per_image(rows, lambda name: devkit.synset_of(name, self.source))
            return self._number(rows, *found, classes or devkit.synsets, devkit)
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
        self,
        rows: np.ndarray,
        numbers: np.ndarray,
        values: list[Label],
        classes: list[str] | None,
        devkit: Devkit | None,
    ) -> tuple[np.ndarray, list[str]]:
        """Return the labels of these rows, and the class names.

        numbers: of each row's value in `values`, which are class names or class numbers.
        """
        scan = self.scan

        def first_with(value: Label) -> str:
            row = int(rows[np.flatnonzero(numbers == values.index(value))[0]])
            return f"{scan.files[self.folders[self.folder_number[row]].file_number]}: {self._name(row)}"

        used = Counter(numbers.tolist())
        if None in values and used[values.index(None)]:
            raise UserError(f"{first_with(None)} has no label, but other images have. Add its label, or remove it.")
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
                problem = f"has label {extreme}; expected 0 to {limit - 1}"
                raise UserError(f"{first_with(extreme)} {problem}. Fix its .cls or .json.")
            label_of = np.array([value if isinstance(value, int) else -1 for value in values], np.int64)
            return label_of.clip(-1, limit)[numbers].astype(np.int32), expected
        if classes == []:
            problem = "has class names, but training has class numbers only"
            raise UserError(f"{self.source} {problem}. Shard it with a separate command.")
        known = classes or scan.manifest_classes or (devkit.synsets if devkit is not None else None)
        if self.has_labels and not known and scan.rule.classes != "label":
            fix = "Pass --classes label if its labels are names of classes, or --labels none."
            raise UserError(f"{first_with(names[0])} has the label {names[0]!r}; expected a class number. {fix}")
        expected = classes or (known if self.has_labels and known else sorted(names))
        position = {name: i for i, name in enumerate(expected)}
        unknown = sorted(set(names) - position.keys())
        if unknown:
            problem = f"has class {unknown[0]!r}, which is not among the {len(expected)} classes of training"
            raise UserError(f"{first_with(unknown[0])} {problem}. Pass a split of the same data set.")
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
