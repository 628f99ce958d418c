"""Verify shards against their manifest.

The fast check compares sizes and indexes; the full check also hashes every shard, reads every tar header and decodes
every image.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from ddae.data.manifest import MANIFEST, read_index, read_manifest
from ddae.data.sample_index import COLUMNS, index_names, map_columns, read_header
from ddae.data.shard_writer import sample_index, write_manifest
from ddae.errors import UserError
from ddae.sharding import workers
from ddae.sharding.archives import members, read_at
from ddae.sharding.inspection import MAX_BYTES, inspect


class Problem(NamedTuple):
    """A difference between a shard and its manifest entry."""

    shard: str
    description: str
    bad_key: str = ""  # key of a sample that cannot be decoded

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.shard, self.bad_key, self.description)))


def check(folder: Path, full: bool, num_workers: int) -> tuple[list[Problem], int]:
    """Return all problems of a folder of shards, and its number of images. Raise UserError without a manifest."""
    manifest = read_manifest(folder)
    shards, num_classes = manifest["shards"], len(manifest.get("classes", []))
    problems = [problem for name, entry in shards.items() for problem in _check_sizes(folder / name, entry)]
    problems += [Problem(p.name, "is not in the manifest") for p in folder.glob("*.tar") if p.name not in shards]
    problems += [Problem(path.name, "is an incomplete file") for path in folder.glob("*.part")]
    total = sum(entry["samples"] for entry in shards.values())
    if "accounting" in manifest:
        problems += _check_accounting(manifest["accounting"], total)
    if full:
        tasks = [(folder / name, shards[name], num_classes) for name in shards if (folder / name).is_file()]
        for of_shard in workers.run(_check_content, tasks, num_workers, total):
            problems += of_shard
    if not problems:  # otherwise the indexes differ, too
        for split in sorted({name.rpartition("-")[0] for name in shards}):
            problems += _check_sample_index(folder, split, manifest, full)
    return sorted(set(problems)), total


def make_index(folder: Path) -> int:
    """Write the sample indexes of a folder of shards, such as those of version 0.1. Return the number of images."""
    manifest = read_manifest(folder)
    shards = manifest.pop("shards")
    del manifest["format"]  # added by write_manifest()
    write_manifest(folder, shards, **manifest)
    return sum(entry["samples"] for entry in shards.values())


def _check_sample_index(folder: Path, split: str, manifest: dict[str, Any], full: bool) -> list[Problem]:
    """Check that the sample index of a split, if there is one, is up to date; full: compare it with the shards."""
    header, columns = (folder / name for name in index_names(split))
    if not header.exists():
        return []
    try:
        read = read_header(header)
        index = map_columns(columns, read)
    except UserError as error:
        return [Problem(header.name, str(error))]
    if read["manifest_bytes"] != (folder / MANIFEST).stat().st_size:
        return [Problem(header.name, "is older than the manifest. Pass --index to write it again.")]
    if full:
        expected = sample_index(folder, split, manifest["shards"], tuple(manifest.get("classes") or ()))
        differs = any((expected.columns[name] != index.columns[name]).any() for name in COLUMNS)
        if differs or (expected.shards, expected.classes) != (index.shards, index.classes):
            return [Problem(header.name, "does not match the shards. Pass --index to write it again.")]
    return []


def _check_accounting(accounting: dict[str, Any], num_samples: int) -> list[Problem]:
    """Check found = written + converted + left out, and that the shards hold what was written and converted."""
    found, left_out = accounting["found"], sum(accounting["left_out"].values())
    written = accounting["written"] + accounting["converted"]
    if (found - left_out, written) == (num_samples, num_samples):
        return []
    equation = f"{found} images found, {left_out} left out, {written} written or converted, {num_samples} in the shards"
    return [Problem(MANIFEST, f"does not account for all images ({equation})")]


def mark_bad(folder: Path, problems: list[Problem]) -> int:
    """Add images that cannot be decoded to the manifest's "bad" lists, so that training skips them.

    Return the number of images that are listed now.
    """
    manifest = read_manifest(folder)
    shards = manifest.pop("shards")
    for problem in problems:
        if problem.bad_key:
            entry = shards[problem.shard]
            entry["bad"] = sorted({*entry.get("bad", []), problem.bad_key})
    del manifest["format"]  # added by write_manifest()
    write_manifest(folder, shards, **manifest)
    return sum(len(entry.get("bad", [])) for entry in shards.values())


def _check_sizes(shard: Path, entry: dict[str, Any]) -> list[Problem]:
    """Check a shard's size and index, without reading the shard."""
    if not shard.is_file():
        return [Problem(shard.name, "is missing")]
    problems, size = [], shard.stat().st_size
    if size != entry["bytes"]:
        problems.append(Problem(shard.name, f"has {size} bytes; expected {entry['bytes']}"))
    try:
        keys, index = read_index(shard.with_suffix(".idx"))
    except UserError as error:
        return [*problems, Problem(shard.name, str(error))]
    if len(keys) != entry["samples"] or (index.sum(1) > entry["bytes"]).any():
        problems.append(Problem(shard.name, "does not match its index"))
    return problems


def _check_content(shard: Path, entry: dict[str, Any], num_classes: int) -> list[Problem]:
    """Check a shard's hash, tar headers, labels, images and index; in a worker."""
    problems = []
    with open(shard, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            problems.append(Problem(shard.name, "has changed since it was written (SHA-256)"))
    images, known_bad = [], set(entry.get("bad", []))
    try:
        for member in members(shard):
            key, _, ending = member.name.partition(".")
            if ending == "cls":
                label = read_at(shard, member.offset, min(member.length, 32))
                if num_classes and not (label.isdigit() and int(label) < num_classes):
                    description = f"{member.name} is {label!r}; expected a number below {num_classes}"
                    problems.append(Problem(shard.name, description))
            elif ending == "jpg":
                if key not in known_bad:
                    size = entry["sizes"][len(images) : len(images) + 1]
                    problems += _check_image(shard, key, member.offset, member.length, size)
                images.append((key, member.offset, member.length))
                workers.count_images()
        keys, index = read_index(shard.with_suffix(".idx"))
        if images != [(key, *row) for key, row in zip(keys, index.tolist(), strict=True)]:
            problems.append(Problem(shard.name, "does not match its index"))
    except UserError as error:
        problems.append(Problem(shard.name, str(error)))
    return problems


def _check_image(shard: Path, key: str, offset: int, length: int, size: list[list[int]]) -> list[Problem]:
    """Decode one image and compare its size with the manifest's. size: [[width, height]], or [] if not listed."""
    image = inspect(read_at(shard, offset, min(length, MAX_BYTES + 1)))
    if image.jpeg is None:
        return [Problem(shard.name, f"cannot be decoded ({', '.join(image.kinds)})", key)]
    if image.kinds:
        return [Problem(shard.name, f"{key} is not a plain RGB JPEG ({', '.join(image.kinds)})")]
    if [[image.width, image.height]] != size:
        return [Problem(shard.name, f"{key} has {image.width} x {image.height} pixels; its manifest lists {size}")]
    return []
