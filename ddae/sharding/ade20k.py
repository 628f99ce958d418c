"""Convert the zip of ADE20K to shards of images and masks: SceneParse150, or all classes of 2016 or 2021.

The zip is not unpacked to disk. Label 0 ("other", unlabelled) is mapped to the ignore value and the other labels are
shifted down by one (reduce_zero_label), so that a mask's values number the manifest's `classes`. Masks match the stored
pixels of their image, whatever its EXIF orientation. The output folder is written beside its path and renamed when it
is complete; a run that was killed starts again from the beginning.
"""

import io
import itertools
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ddae import atomic
from ddae.data.decode import encode_image
from ddae.data.manifest import MANIFEST
from ddae.data.shard_writer import Sample, write_manifest, write_shard
from ddae.errors import UserError, one_line
from ddae.progress import ImageProgress
from ddae.sharding.archives import zip_member_path
from ddae.sharding.inspection import MAX_BYTES, Inspection, inspect

SPLITS = {"training": "train", "validation": "val"}  # ADE20K's names -> names of shards
KEY = r"ADE_[A-Za-z0-9_-]{1,80}"
PATH = rf"(?:.*/)?images/(?:ADE/)?(training|validation)/((?:.+/)?{KEY})"  # groups: split, path without ending
IMAGE = re.compile(rf"{PATH}\.jpg")


class Layout(NamedTuple):
    """A release of ADE20K."""

    name: str
    mask: re.Pattern[str]  # groups as in PATH; an image and a mask with the same groups belong together
    mask_modes: tuple[str, ...]  # Pillow's
    label_dtype: type[np.uint8] | type[np.uint16]  # of masks in the shards; the largest value means "ignored"
    max_label: int
    class_names_file: str


class Pair(NamedTuple):
    """An image and its mask in the zip; None: missing."""

    split: str  # of the shards
    key: str
    path: str  # in the split; two folders may have the same key
    image: zipfile.ZipInfo | None
    mask: zipfile.ZipInfo | None


SCENE_MASK = re.compile(rf"(?:.*/)?annotations/(training|validation)/({KEY})\.png")
FULL_MASK = re.compile(rf"{PATH}_seg\.png")
SCENE_PARSE = Layout("ADE20K SceneParse150", SCENE_MASK, ("L", "P"), np.uint8, 150, "objectInfo150.txt")
FULL = Layout("ADE20K, all classes", FULL_MASK, ("RGB",), np.uint16, 25 * 256 + 255, "index_ade20k.mat")


def prepare(path: Path, out: Path, per_shard: int) -> str:
    """Convert the zip `path` to shards in the folder `out`. Return a summary for the user.

    Raise UserError if the zip is not ADE20K's or is damaged, or if `out` has other content or cannot be written.
    """
    if per_shard < 1:
        raise UserError(f"--per_shard is {per_shard}; expected at least 1. Pass --per_shard 500.")
    out = out.resolve()
    try:
        with zipfile.ZipFile(path) as archive:
            layout, pairs = find_pairs(archive, path)
            ignore = int(np.iinfo(layout.label_dtype).max)
            settings = {"reduce_zero_label": True, "ignore": ignore, "per_shard": per_shard, "images": len(pairs)}
            if (out / MANIFEST).exists():
                _check_complete(out, layout.name, settings)
                return f"{out} is complete. Delete it to write it again."
            if os.path.lexists(out) and (not out.is_dir() or out.is_mount() or any(out.iterdir())):
                raise UserError(f"--out {out} exists and is not an empty folder. Empty it, or pass a new one.")
            return _write(archive, out, layout, pairs, settings)
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:  # from the zip's directory
        raise UserError(f"{path} is not a complete zip ({one_line(error)}). Download it again.") from None
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}. Nothing was written.") from None


def find_pairs(archive: zipfile.ZipFile, path: Path) -> tuple[Layout, list[Pair]]:
    """Return the zip's layout, and its images and masks ordered by split and key.

    Raise UserError if the zip is not ADE20K's, or is encrypted or unsafe.
    """
    members = {zip_member_path(member, path): member for member in archive.infolist()}
    images = _match_members(members, IMAGE)
    found = [(layout, masks) for layout in (SCENE_PARSE, FULL) if (masks := _match_members(members, layout.mask))]
    if not images or len(found) != 1:
        found_masks = f"masks of {len(found)} layouts (annotations/*.png, *_seg.png)"
        problem = f"{path} contains {len(images)} images (images/*/ADE_*.jpg) and {found_masks}"
        fix = "Pass a zip of SceneParse150 or of the full ADE20K."
        raise UserError(f"{problem}; expected images and one layout. {fix}")
    layout, masks = found[0]
    for member in [*images.values(), *masks.values()]:
        if member.flag_bits & 1:
            raise UserError(f"{path} is encrypted ({member.filename}). Decrypt it first.")
        if member.file_size > MAX_BYTES:
            raise UserError(f"{path}: {member.filename} is larger than {MAX_BYTES >> 20} MiB. Pass a zip of ADE20K.")
    places = images.keys() | masks.keys()
    pairs = [Pair(SPLITS[s], p.split("/")[-1], p, images.get((s, p)), masks.get((s, p))) for s, p in places]
    return layout, sorted(pairs, key=lambda pair: pair[:3])


def convert_pair(archive: zipfile.ZipFile, pair: Pair, layout: Layout) -> tuple[Sample | None, tuple[str, ...]]:
    """Return the pair's sample, None if it is unusable, and the kinds to report: why it is, or what was converted."""
    if pair.image is None or pair.mask is None:
        return None, ("no_annotation" if pair.image else "no_image",)
    data, mask = read_member(archive, pair.image), read_member(archive, pair.mask)
    if data is None or mask is None:
        return None, ("damaged_in_zip",)
    inspected = inspect(data)
    if inspected.jpeg and "exif_rotated" in inspected.kinds:  # inspect() rotated it, but its mask is not rotated
        image = Image.open(io.BytesIO(data)).convert("RGB")
        inspected = Inspection(inspected.kinds, encode_image(image), *image.size)  # no EXIF: no reader rotates it
    if inspected.jpeg is None:
        return None, inspected.kinds
    mask = _convert_mask(mask, (inspected.width, inspected.height), layout)
    if isinstance(mask, str):
        return None, (*inspected.kinds, mask)
    return Sample(pair.key, inspected.jpeg, None, inspected.width, inspected.height, mask), inspected.kinds


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes | None:
    """Return a member's bytes; None if it is damaged, or larger than MAX_BYTES whatever its header declares."""
    try:
        with archive.open(member) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError:  # from the disk
        raise
    except Exception:  # zipfile and its decoders raise many types of errors for a damaged member
        return None
    return data if len(data) <= MAX_BYTES else None


def read_class_names(archive: zipfile.ZipFile, layout: Layout) -> tuple[list[str], str]:
    """Return the names of the classes from label 1 on, or [] and the reason.

    A pickled index is never loaded, because it could execute code.
    """
    name = layout.class_names_file
    member = next((each for each in archive.infolist() if re.split(r"[/\\]", each.filename)[-1] == name), None)
    data = read_member(archive, member) if member and member.file_size <= MAX_BYTES else None
    if data is None:
        return [], f"{layout.class_names_file} is missing or damaged"
    try:
        if layout is FULL:
            from scipy.io import loadmat  # executes no code of the file

            index = loadmat(io.BytesIO(data), variable_names=["index"], squeeze_me=True)["index"]
            return [str(name) if np.size(name) else "" for name in np.atleast_1d(index["objectnames"].item())], ""
        header, *lines = [line.split("\t") for line in data.decode().splitlines() if line.strip()]
        rows = {int(line[header.index("Idx")]): line[header.index("Name")].strip() for line in lines}
        return [rows[label] for label in range(1, layout.max_label + 1)], ""
    except Exception as error:  # scipy is missing, or the file is damaged, for which loadmat raises many types
        return [], f"{layout.class_names_file} cannot be read ({type(error).__name__}: {one_line(error)})"


def _match_members(
    members: dict[str, zipfile.ZipInfo], pattern: re.Pattern[str]
) -> dict[tuple[str, str], zipfile.ZipInfo]:
    """Return (split, path without ending) -> member, for members whose path matches."""
    return {(match[1], match[2]): member for name, member in members.items() if (match := pattern.fullmatch(name))}


def _convert_mask(data: bytes, size: tuple[int, int], layout: Layout) -> bytes | str:
    """Return the mask as PNG with label 0 -> ignored and c -> c - 1, or the kind of problem if it is unusable."""
    try:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        if image.size != size:  # checked before decoding, so that a mask needs no more memory than its image
            return "size_mismatch"
        if image.mode not in layout.mask_modes or data[24:25] != b"\x08":  # bits per channel; Pillow rescales others
            return "mask_not_8bit"
        values = np.asarray(image).astype(layout.label_dtype)
    except Exception:  # Pillow's decoders raise many types of errors for a damaged file
        return "mask_unreadable"
    labels = values[..., 0] // 10 * 256 + values[..., 1] if values.ndim == 3 else values
    if labels.max() > layout.max_label:
        return "label_out_of_range"
    # Unsigned: 0 - 1 wraps to the ignore value.
    return encode_image(Image.fromarray(labels - layout.label_dtype(1)), file_format="PNG")


def _check_complete(out: Path, source: str, settings: dict[str, Any]) -> None:
    """Raise UserError if the folder's shards have another source or other settings, or one is missing or truncated."""
    try:
        manifest = json.loads((out / MANIFEST).read_text())
        same = manifest["source"] == source and manifest["settings"] == settings
        complete = all((out / name).stat().st_size == entry["bytes"] for name, entry in manifest["shards"].items())
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError):
        same = complete = False
    if not (same and complete):
        raise UserError(f"--out {out} contains other or incomplete shards. Delete it, or pass a new folder.")


def _write(archive: zipfile.ZipFile, out: Path, layout: Layout, pairs: list[Pair], settings: dict[str, Any]) -> str:
    """Write shards, report and manifest. Return a summary."""
    classes, no_names = read_class_names(archive, layout)
    layout = layout._replace(max_label=len(classes) or layout.max_label)
    report, entries = [], {}
    partial = out.with_name(out.name + ".unfinished")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with ImageProgress(len(pairs)) as progress:
            for split, of_split in itertools.groupby(progress.track(pairs), key=lambda pair: pair.split):
                samples = _samples(archive, of_split, layout, report)
                for number, first in enumerate(samples):  # each shard takes its other samples from the same iterator
                    path = partial / f"{split}-{number:06d}.tar"
                    shard = itertools.chain([first], itertools.islice(samples, settings["per_shard"] - 1))
                    entries[path.name] = write_shard(path, shard)
        if not entries:
            kinds = ", ".join(report[0]["kinds"])
            raise UserError(f"none of the {len(pairs)} images is usable. Check {report[0]['source']} ({kinds}).")
        written, left_out = sum(e["samples"] for e in entries.values()), sum(r["action"] == "left_out" for r in report)
        content = {"input": len(pairs), "written": written, "left_out": left_out, "images": report}
        atomic.write_text_durably(partial / "report.json", json.dumps(content, indent=1) + "\n")
        write_manifest(partial, entries, classes=classes, source=layout.name, settings=settings)
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    summary = f"{out}: {written} images with masks, {len(report) - left_out} of them converted, {left_out} left out"
    return summary + (" (report.json)" if report else "") + (f"; classes have no names: {no_names}" if no_names else "")


def _samples(archive: zipfile.ZipFile, pairs: Iterable[Pair], layout: Layout, report: list) -> Iterator[Sample]:
    """Yield the samples of a split in order. Append what was converted or left out to `report`."""
    keys: set[str] = set()
    for pair in pairs:
        sample, kinds = convert_pair(archive, pair, layout)
        if pair.key in keys and sample:
            sample, kinds = None, (*kinds, "duplicate_key")
        if kinds:
            source = (pair.image or pair.mask or zipfile.ZipInfo()).filename
            action = "converted" if sample else "left_out"
            report.append({"source": source, "key": pair.key, "kinds": kinds, "action": action})
        if sample:
            keys.add(pair.key)
            yield sample
