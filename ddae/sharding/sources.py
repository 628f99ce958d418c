"""Find the files of a data set (archives, folders or shards) and make one index of its images, in a reproducible order.

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
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from ddae.data.manifest import MANIFEST
from ddae.errors import UserError
from ddae.sharding.archives import ARCHIVE_ENDINGS
from ddae.sharding.classes import is_hidden
from ddae.sharding.imagenet_devkit import Devkit
from ddae.sharding.index import UNLABELLED, Index
from ddae.sharding.inspection import IMAGE_ENDINGS
from ddae.sharding.labelling import Labelling
from ddae.sharding.scan import AUTO, LabelRule, Scan, walk

SPLIT_IN_NAME = re.compile(r"(?<![A-Za-z])(train|val|test)")
FROM_PARQUET = (  # converts Hugging Face's files of images; {} is the folder
    "python -c \"import glob, io, json, tarfile, pyarrow.parquet as pq; t = tarfile.open({!r}, 'w'); "
    "add = lambda n, b: t.addfile((i := tarfile.TarInfo(n), setattr(i, 'size', len(b)))[0], io.BytesIO(b)); "
    "[(add(f'{{k}}-{{n}}.jpg', r['image']['bytes']), add(f'{{k}}-{{n}}.cls', str(r['label']).encode())) "
    "for k, p in enumerate(sorted(glob.glob({!r}))) "
    'for n, r in enumerate(r for b in pq.ParquetFile(p).iter_batches() for r in b.to_pylist())]; t.close()"'
)


def build_index(
    split: str,
    location: str,
    classes: list[str] | None = None,
    devkit: Devkit | None = None,
    rule: LabelRule = AUTO,
) -> Index:
    """Find all images of a split. Raise UserError if there are none, or if their classes are unknown or inconsistent.

    classes: those of a labelled training split, in which case others are rejected; []: training has class numbers only.
    """
    source = f"--{split} {location}"
    files = _find_files(split, location)
    scan = Scan(files, _manifest_classes(files[0].parent) if files[0].is_file() else None, rule)
    if files[0].is_dir():
        scan.add_folder(files[0])
    else:
        for number, path in enumerate(files):
            scan.add_archive(number, path)
    if not len(scan.images.base):
        raise UserError(f"{source} contains no image{_what_instead(scan, location)}")
    return Labelling(scan, split, location, source).index(classes, devkit)


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
    for name, _ in walk(folder):
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


def _what_instead(scan: Scan, location: str) -> str:
    """Return what a source without images contains, as the end of an error message."""
    other = scan.tally.left_out + scan.tally.other_files
    if any(name.endswith(".parquet") for names in other.names.values() for name in names):
        return f" but Parquet files. {_how_to_convert_parquet(location.rstrip('/') + '/*.parquet')}"
    found = f" that can be read ({other})" if other.counts else ""
    return f"{found}. Pass files ending in {', '.join(IMAGE_ENDINGS)}."


def _how_to_convert_parquet(pattern: str) -> str:
    return f"Convert them: {FROM_PARQUET.format('images.tar', pattern)}"
