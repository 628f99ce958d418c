"""ADE20K's zip -> shards of images and masks, without unpacking it: SceneParse150, or all classes of 2016 or 2021.

Label 0 ("other", unlabelled) is ignored in training and every class counts from 0: that shift (reduce_zero_label) is
done here, once, so that a mask's labels number the manifest's `classes`. Masks lie as images are stored, whatever
their EXIF says. The folder is filled beside its place and renamed when whole: a run that was killed starts over.
"""

import io
import itertools
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from ddae.data.shard_writer import Sample, replace_text, write_manifest, write_shard
from ddae.data.shards import MANIFEST
from ddae.errors import UserError
from ddae.sharding.inspection import MAX_BYTES, Finding, inspect

SPLITS = {"training": "train", "validation": "val"}  # ADE20K's names and the shards'
KEY = r"ADE_[A-Za-z0-9_-]{1,80}"
PLACE = rf"(?:.*/)?images/(?:ADE/)?(training|validation)/((?:.+/)?{KEY})"  # groups: split, path without ending
IMAGE = re.compile(rf"{PLACE}\.jpg")


class Layout(NamedTuple):
    source: str
    mask: re.Pattern[str]  # groups as PLACE's, by which image and mask are paired
    modes: tuple[str, ...]  # Pillow's, of a mask file
    labels: type[np.uint8] | type[np.uint16]  # of a pixel of the shards; the largest value says "ignored"
    last: int  # label
    names: str  # file of the classes' names


class Pair(NamedTuple):
    split: str  # of the shards
    key: str
    path: str  # its own within a split, where another folder may hold the same key
    image: zipfile.ZipInfo | None
    mask: zipfile.ZipInfo | None


SCENE_MASK = re.compile(rf"(?:.*/)?annotations/(training|validation)/({KEY})\.png")
FULL_MASK = re.compile(rf"{PLACE}_seg\.png")
SCENE_PARSE = Layout("ADE20K SceneParse150", SCENE_MASK, ("L", "P"), np.uint8, 150, "objectInfo150.txt")
FULL = Layout("ADE20K, all classes", FULL_MASK, ("RGB",), np.uint16, 25 * 256 + 255, "index_ade20k.mat")


def prepare(path: Path, out: Path, per_shard: int) -> str:
    """Make the folder `out` of the zip `path`; returns a sentence for the user, UserError for a mistake."""
    if per_shard < 1:
        raise UserError(f"--per_shard {per_shard}: a shard needs at least one image")
    out = out.resolve()
    try:
        with zipfile.ZipFile(path) as archive:
            layout, pairs = find_pairs(archive, path)
            ignore = int(np.iinfo(layout.labels).max)
            settings = {"reduce_zero_label": True, "ignore": ignore, "per_shard": per_shard, "images": len(pairs)}
            if (out / MANIFEST).exists():
                return _complete(out, layout.source, settings)
            if os.path.lexists(out) and (not out.is_dir() or out.is_mount() or any(out.iterdir())):
                raise UserError(f"--out {out} is there and is not an empty folder: empty it, or name a new one")
            return _make(archive, out, layout, pairs, settings)
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:  # of the zip's directory
        raise UserError(f"{path} is not a whole zip ({error}): download it again") from None
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}; nothing was made") from None


def find_pairs(archive: zipfile.ZipFile, path: Path) -> tuple[Layout, list[Pair]]:
    """The zip's layout and its images and masks by split and key; UserError where it cannot be ADE20K's."""
    members = archive.infolist()
    for name in (member.filename.replace("\\", "/") for member in members):
        if name.startswith("/") or name[1:2] == ":" or ".." in name.split("/"):
            raise UserError(f"{path} holds {name!r}, which lies outside of a folder: it is not ADE20K's zip")
    images = _by_place(members, IMAGE)
    found = [(layout, masks) for layout in (SCENE_PARSE, FULL) if (masks := _by_place(members, layout.mask))]
    if not images or len(found) != 1:
        held = f"{len(images)} images/*/ADE_*.jpg and masks of {len(found)} kinds, annotations/*.png or *_seg.png"
        raise UserError(f"{path} holds {held}: name a zip of SceneParse150 or of the full ADE20K")
    layout, masks = found[0]
    for member in [*images.values(), *masks.values()]:
        if member.flag_bits & 1:
            raise UserError(f"{path} is encrypted ({member.filename}): decrypt it first")
        if member.file_size > MAX_BYTES:
            raise UserError(f"{path}: {member.filename} is larger than {MAX_BYTES >> 20} MiB: it is not ADE20K's")
    places = images.keys() | masks.keys()
    pairs = [Pair(SPLITS[s], p.split("/")[-1], p, images.get((s, p)), masks.get((s, p))) for s, p in places]
    return layout, sorted(pairs, key=lambda pair: pair[:3])


def convert(archive: zipfile.ZipFile, pair: Pair, layout: Layout) -> tuple[Sample | None, tuple[str, ...]]:
    """The pair's sample, None where it must be left out, and what is odd about it."""
    if pair.image is None or pair.mask is None:
        return None, ("no_annotation" if pair.image else "no_image",)
    data, mask = read_member(archive, pair.image), read_member(archive, pair.mask)
    if data is None or mask is None:
        return None, ("damaged_in_zip",)
    found = inspect(data)
    if found.jpeg and "exif_rotated" in found.kinds:  # as it is stored, which is how its mask lies
        image, buffer = Image.open(io.BytesIO(data)).convert("RGB"), io.BytesIO()
        image.save(buffer, "JPEG", quality=95)  # without the EXIF, lest a reader turn it
        found = Finding(found.kinds, buffer.getvalue(), image.width, image.height)
    if found.jpeg is None:
        return None, found.kinds
    mask = _reduced(mask, (found.width, found.height), layout)
    if isinstance(mask, str):
        return None, (*found.kinds, mask)
    return Sample(pair.key, found.jpeg, None, found.width, found.height, mask), found.kinds


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes | None:
    """A member's bytes; None where it is damaged, or larger than MAX_BYTES whatever it declares."""
    try:
        with archive.open(member) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError:  # of the disk
        raise
    except Exception:  # zipfile and its decoders raise whatever a damaged member leads them to
        return None
    return data if len(data) <= MAX_BYTES else None


def class_names(archive: zipfile.ZipFile, layout: Layout) -> tuple[list[str], str]:
    """Names of the classes from label 1 on, or none and why. A pickled index is never opened: it could run code."""
    member = next((m for m in archive.infolist() if m.filename.split("/")[-1] == layout.names), None)
    data = read_member(archive, member) if member and member.file_size <= MAX_BYTES else None
    if data is None:
        return [], f"{layout.names} is missing or cannot be read"
    try:
        if layout is FULL:
            from scipy.io import loadmat  # which runs no code of the file

            index = loadmat(io.BytesIO(data), variable_names=["index"], squeeze_me=True)["index"]
            return [str(name) if np.size(name) else "" for name in np.atleast_1d(index["objectnames"].item())], ""
        header, *lines = [line.split("\t") for line in data.decode().splitlines() if line.strip()]
        rows = {int(line[header.index("Idx")]): line[header.index("Name")].strip() for line in lines}
        return [rows[label] for label in range(1, layout.last + 1)], ""
    except Exception as error:  # no scipy, or whatever a broken file leads it to
        return [], f"{layout.names} cannot be read ({type(error).__name__}: {error})"


def _by_place(members: list[zipfile.ZipInfo], pattern: re.Pattern[str]) -> dict[tuple[str, str], zipfile.ZipInfo]:
    """(split, path without ending) -> member, of those whose name matches."""
    return {(match[1], match[2]): member for member in members if (match := pattern.fullmatch(member.filename))}


def _reduced(data: bytes, size: tuple[int, int], layout: Layout) -> bytes | str:
    """The mask as PNG, label 0 -> ignored and c -> c - 1; what is wrong with it where it cannot be used."""
    try:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        if image.size != size:  # before decoding, so that a mask costs no more memory than its image
            return "size_mismatch"
        if image.mode not in layout.modes or data[24:25] != b"\x08":  # bits a channel: others get rescaled
            return "mask_not_8bit"
        values = np.asarray(image).astype(layout.labels)
    except Exception:  # Pillow's decoders raise whatever a broken file leads them to
        return "mask_unreadable"
    labels = values[..., 0] // 10 * 256 + values[..., 1] if values.ndim == 3 else values
    if labels.max() > layout.last:
        return "label_out_of_range"
    buffer = io.BytesIO()
    Image.fromarray(labels - layout.labels(1)).save(buffer, "PNG")  # unsigned: 0 - 1 is the largest value, "ignored"
    return buffer.getvalue()


def _complete(out: Path, source: str, settings: dict[str, Any]) -> str:
    """Says that the folder is made already; UserError where it was made of something else or is not whole."""
    try:
        manifest = json.loads((out / MANIFEST).read_text())
        same = manifest["source"] == source and manifest["settings"] == settings
        whole = all((out / name).stat().st_size == entry["bytes"] for name, entry in manifest["shards"].items())
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError):
        same = whole = False
    if not (same and whole):
        raise UserError(f"--out {out} holds other shards, or not all of them: delete it, or name a new folder")
    return f"{out} is complete; delete it to make it again"


def _make(archive: zipfile.ZipFile, out: Path, layout: Layout, pairs: list[Pair], settings: dict[str, Any]) -> str:
    classes, why = class_names(archive, layout)
    layout = layout._replace(last=len(classes) or layout.last)
    report, entries = [], {}
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        with tqdm(pairs, unit=" images", mininterval=0.1 if sys.stderr.isatty() else 10) as bar:
            for split, of_split in itertools.groupby(bar, key=lambda pair: pair.split):
                samples = _samples(archive, of_split, layout, report)
                for number, first in enumerate(samples):  # from which each shard takes its further samples
                    path = unfinished / f"{split}-{number:06d}.tar"
                    shard = itertools.chain([first], itertools.islice(samples, settings["per_shard"] - 1))
                    entries[path.name] = write_shard(path, shard)
        if not entries:
            raise UserError(f"not one image of {len(pairs)} can be used: {report[0]['source']} {report[0]['kinds']}")
        written, left_out = sum(e["samples"] for e in entries.values()), sum(r["action"] == "left_out" for r in report)
        content = {"input": len(pairs), "written": written, "left_out": left_out, "images": report}
        replace_text(unfinished / "report.json", json.dumps(content, indent=1) + "\n")
        write_manifest(unfinished, entries, classes=classes, source=layout.source, settings=settings)
        os.rename(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    said = f"{out}: {written} images with masks, {len(report) - left_out} of them converted, {left_out} left out"
    return said + (" (report.json)" if report else "") + (f"; classes have no names: {why}" if why else "")


def _samples(archive: zipfile.ZipFile, pairs: Iterable[Pair], layout: Layout, report: list) -> Iterator[Sample]:
    """The samples of a split in order; what is odd goes to `report`."""
    seen: set[str] = set()
    for pair in pairs:
        sample, kinds = convert(archive, pair, layout)
        if pair.key in seen and sample:
            sample, kinds = None, (*kinds, "duplicate_key")
        if kinds:
            source = (pair.image or pair.mask or zipfile.ZipInfo()).filename
            action = "converted" if sample else "left_out"
            report.append({"source": source, "key": pair.key, "kinds": kinds, "action": action})
        if sample:
            seen.add(pair.key)
            yield sample
