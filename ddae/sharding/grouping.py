"""Group the files of webdataset archives into samples, as webdataset does: by the path up to the name's first dot.

A group with several images is several samples if each image has a label of its own stem (img.1.jpg with img.1.cls), or
if nothing distinguishes them. Otherwise one image is the sample, and the others are masks or other fields of it: a PNG
beside a JPEG of the same stem, or x.seg.png beside x.png.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

from ddae.errors import UserError
from ddae.sharding.classes import class_name

JPEG_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif")
LABEL_ENDINGS = (".cls", ".json")
Label = str | int | None  # a class's name, its number, or none


class File(NamedTuple):
    """A file of a group."""

    number: int  # among the source's images, or among its label files
    name: str  # without folder


class Group(NamedTuple):
    """What the files of one key are."""

    samples: list[tuple[File, list[File]]]  # image, its label files
    fields: list[File]  # images that are masks or other fields of a sample
    replaced: list[File]  # images of which a later one has the same name


def key_of(name: str) -> str:
    """Return webdataset's key of a file name: the part before the first dot."""
    return name.partition(".")[0]


def stem_of(name: str) -> str:
    """Return a file name without its last ending."""
    return name.rpartition(".")[0]


def resolve_group(images: Sequence[File], labels: Sequence[File], where: str) -> Group:
    """Return samples and fields among the files of one key, in their order in the archive.

    where: archive and key, for messages. Raise UserError if it is not clear which image a label belongs to.
    """
    last = {file.name: file for file in images}  # of the same name the last one counts, as in a tar
    replaced = [file for file in images if last[file.name] is not file]
    labels = list({file.name: file for file in labels}.values())
    images = sorted(last.values())
    if len(images) == 1:
        return Group([(images[0], labels)], [], replaced)
    stems: dict[str, list[File]] = {}
    for image in images:
        stems.setdefault(stem_of(image.name), []).append(image)
    samples, fields = [], []
    for of_stem in stems.values():
        photos = [image for image in of_stem if image.name.lower().endswith(JPEG_ENDINGS)] or of_stem
        if len(photos) > 1 and labels:
            names = " and ".join(image.name for image in photos[:2])
            raise UserError(f"{where} has several images of one name ({names}). Keep one of them.")
        samples += photos
        fields += [image for image in of_stem if image not in photos]
    labels_of: dict[str, list[File]] = {stem_of(image.name): [] for image in samples}
    for label in labels:
        labels_of.get(stem_of(label.name), []).append(label)
    unused = [label for label in labels if stem_of(label.name) not in labels_of]
    plain = [image for image in samples if "." not in stem_of(image.name)]
    if plain and not all(labels_of.values()):  # x.png, x.seg.png: the name's second part is a field's
        other = [image for image in samples if image not in plain and not labels_of[stem_of(image.name)]]
        named = [image for image in other if not stem_of(image.name).rpartition(".")[2].isdigit()]
        if labels or named:
            fields += other if labels else named
            samples = [image for image in samples if image not in fields]
    if unused or (labels and not all(labels_of[stem_of(image.name)] for image in samples)):
        names = ", ".join(file.name for file in [*samples[:2], *(unused or labels)[:1]])
        problem = f"{where} has {len(samples)} images, and it is not clear which has which label ({names})"
        raise UserError(f"{problem}. Name each label after its image, or pass --labels none.")
    return Group([(image, labels_of[stem_of(image.name)]) for image in samples], fields, replaced)


def parse_label(name: str, content: bytes) -> Label:
    """Return the class number or name in a label file; None in a .json file without "label".

    Raise ValueError, with the label, if it is neither.
    """
    if name.lower().endswith(".cls"):
        try:
            text = content.decode().strip()
        except UnicodeDecodeError:
            raise ValueError(repr(content[:20])) from None
        try:
            return _label(json.loads(text))
        except (json.JSONDecodeError, RecursionError):
            return _label(text)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    return _label(value.get("label") if isinstance(value, dict) else value)


def _label(value: object) -> Label:
    """Return the value as class number or name."""
    if value is None:
        return None
    if isinstance(value, str) and value.strip():
        value = value.strip()
        if value.isdecimal() and value.isascii():
            return int(value)
        return class_name(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise ValueError(json.dumps(value)[:60])
