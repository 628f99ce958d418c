"""The class of an image by the folders and archives it lies in: one rule for folders, tars and zips.

Each path is a sequence of folders below the source. A tar in a tar or in a folder counts as a folder of its name. The
rule, in this order:

    1. folders that enclose all images are dropped (data/train/cat/1.jpg -> cat/1.jpg)
    2. of folders named after splits (train, val, ...) those of the requested split are kept
    3. numbered archives that hold class folders (part_0.tar, part_1.tar) are parts of one data set
    4. no folders: no classes
    5. one level of folders: their names; a second level must be the same everywhere (cat/images/1.jpg)

Anything else is ambiguous, and an error that names the --classes option which decides.
"""

import re
import unicodedata
from collections.abc import Collection
from typing import Literal, NamedTuple

from ddae.errors import UserError

Rule = Literal["auto", "folder", "path", "archive", "synset", "label"]
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SYNSET = re.compile(r"(?<![0-9A-Za-z])n\d{8}(?![0-9])")  # a WordNet id
SYSTEM_NAMES = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
SYSTEM_NAMES |= {"thumbs.db", "desktop.ini", "ehthumbs.db"}
Path = tuple[str, ...]


class FolderClasses(NamedTuple):
    """The outcome for the folders of a source, by position."""

    classes: list[str | None]  # class of the images in a folder; None: no class
    of_split: list[bool]  # whether the folder belongs to the requested split


def is_hidden(path: str) -> bool:
    """Return whether a file or one of its folders is hidden, or belongs to an operating system or a NAS."""
    return any(part.startswith(".") or part.lower() in SYSTEM_NAMES for part in path.split("/"))


def class_name(name: str) -> str:
    """Return the name in Unicode's composed form: file systems differ in it."""
    return unicodedata.normalize("NFC", name)


def classes_of_folders(
    source: str, folders: list[Path], archives: Collection[str], rule: Rule, split: str, known: Collection[str]
) -> FolderClasses:
    """Return the class of each folder that holds images.

    source: option and path, for messages. archives: those of the paths' names that are archives. known: classes of
    training; a folder that all images are in is a class only if it is one of these. Raise UserError if the rule does
    not decide.
    """
    paths = _without_common(folders, folders, known, rule)
    paths, of_split = _select_split(source, paths, split)
    paths = _without_common(paths, [p for p, belongs in zip(paths, of_split, strict=True) if belongs], known, rule)
    chosen = {path for path, belongs in zip(paths, of_split, strict=True) if belongs}
    classes = _classes(source, chosen, archives, rule)
    return FolderClasses([classes.get(path) for path in paths], of_split)


def _without_common(paths: list[Path], of: list[Path], known: Collection[str], rule: Rule) -> list[Path]:
    """Drop the leading folders that all of `of` share and that are not classes."""
    count, shortest = 0, min(map(len, of), default=0)
    while count < shortest and len({path[count] for path in of}) == 1 and class_name(of[0][count]) not in known:
        count += 1
    if rule in ("folder", "path", "archive") and count == shortest and len(set(of)) == 1:
        count = max(0, count - 1)  # the user says that the only folder is a class
    return [path[count:] for path in paths]


def _select_split(source: str, paths: list[Path], split: str) -> tuple[list[Path], list[bool]]:
    """Drop folders named after splits. Return the paths, and which belong to the requested split."""
    first = {path[0] if path else "" for path in paths}
    splits = {name: SPLITS.get(name.lower()) for name in first}
    if len({each for each in splits.values() if each}) < 2:
        return paths, [True] * len(paths)
    others = sorted(name for name, each in splits.items() if each is None)
    if others:
        found = ", ".join(sorted(first - set(others)))
        problem = f"contains folders of splits ({found}) beside {others[0] or 'images'}"
        raise UserError(f"{source} {problem}. Pass each split's folder with --train or --val.")
    if split not in splits.values():
        raise UserError(f"{source} has folders for {', '.join(sorted(first))}, none for {split}. Pass its folder.")
    return [path[1:] for path in paths], [splits[path[0]] == split for path in paths]


def _classes(source: str, paths: set[Path], archives: Collection[str], rule: Rule) -> dict[Path, str | None]:
    """Return the class of each path."""
    none: dict[Path, str | None] = dict.fromkeys(paths)
    if rule in ("synset", "label") or all(not path for path in paths):
        return none
    if () in paths:
        beside = "/".join(min(path for path in paths if path))
        fix = "Move the images into folders, or pass --labels none."
        raise UserError(f"{source} contains both images and folders of images ({beside}). Expected only one. {fix}")
    first = {path[0] for path in paths}
    if rule != "archive" and first <= set(archives) and (parts := _numbered(first)):
        if all(len(path) > 1 for path in paths):
            inner = _classes(source, {path[1:] for path in paths}, archives, rule)
            return {path: inner[path[1:]] for path in paths}
        if rule == "path" or parts == "parts":
            return none
        example = f"{min(first)}.tar"
        options = "--classes archive if each is a class, --classes synset if the file names hold WordNet ids"
        problem = f"consists of numbered archives of images ({example}); their classes are not clear"
        raise UserError(f"{source} {problem}. Pass {options}, or --labels none.")
    if rule in ("folder", "archive"):
        return {path: class_name(path[0]) for path in paths}
    if rule == "path":
        return {path: class_name("/".join(path)) for path in paths}
    rest = {path[1:] for path in paths}
    if len(rest) == 1 or all(path[1:] in ((), (path[0],)) for path in paths):
        return {path: class_name(path[0]) for path in paths}
    example = min((path for path in paths if len(path) > 1), key=lambda path: (len(path), path))
    options = f"--classes folder for the class {example[0]!r}, --classes path for {'/'.join(example)!r}"
    raise UserError(f"{source} has folders in folders ({'/'.join(example)}). Pass {options}, or --labels none.")


def _numbered(names: set[str]) -> Literal["", "parts", "unclear"]:
    """Return whether the names of archives are numbers of one data set's parts.

    parts: as train-000007 is; unclear: consecutive numbers, which may be classes; empty: they are names.
    """
    matches = [re.fullmatch(r"(.*?)(\d+)", name) for name in names]
    found = [match for match in matches if match]
    if len(names) < 2 or len(found) < len(matches) or len({match[1] for match in found}) > 1:
        return ""
    if all(SYNSET.fullmatch(name) for name in names):
        return ""
    numbers = {int(match[2]) for match in found}
    separated = not found[0][1] or found[0][1][-1] in "-_. "
    if separated and all(len(match[2]) >= 3 for match in found):
        return "parts"
    is_consecutive = max(numbers) - min(numbers) + 1 == len(numbers) == len(names)
    return "unclear" if is_consecutive or (separated and found[0][1]) else ""
