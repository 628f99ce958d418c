"""Shards against their manifest: is everything there, whole, and what it is said to be?

Fast: sizes and indexes. Full: every hash, every tar header, every image decoded.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from ddae.data.shard_writer import write_manifest
from ddae.data.shards import read_index, read_manifest
from ddae.errors import UserError
from ddae.sharding import workers
from ddae.sharding.inspection import MAX_BYTES, inspect
from ddae.sharding.tar import members, read_at

CHUNK = 1 << 22  # bytes


class Problem(NamedTuple):
    """Something that is not as the manifest says."""

    shard: str
    what: str
    bad_key: str = ""  # the sample, where it is an image that cannot be decoded

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.shard, self.bad_key, self.what)))


def check(folder: Path, full: bool, num_workers: int) -> tuple[list[Problem], int]:
    """All problems of a folder of shards, and the number of images in it; UserError where there is no manifest."""
    manifest = read_manifest(folder)
    shards, num_classes = manifest["shards"], len(manifest.get("classes", []))
    problems = [problem for name, entry in shards.items() for problem in _look(folder / name, entry)]
    problems += [Problem(p.name, "is not in the manifest") for p in folder.glob("*.tar") if p.name not in shards]
    problems += [Problem(path.name, "was never finished") for path in folder.glob("*.part")]
    total = sum(entry["samples"] for entry in shards.values())
    if full:
        tasks = [(folder / name, shards[name], num_classes) for name in shards if (folder / name).is_file()]
        for found in workers.run(_read, tasks, num_workers, total) if tasks else ():
            problems += found
    return sorted(set(problems)), total


def mark_bad(folder: Path, problems: list[Problem]) -> int:
    """List images that cannot be decoded in the manifest, so that training leaves them out; how many are listed."""
    manifest = read_manifest(folder)
    shards = manifest.pop("shards")
    for problem in problems:
        if problem.bad_key:
            entry = shards[problem.shard]
            entry["bad"] = sorted({*entry.get("bad", []), problem.bad_key})
    del manifest["format"]
    write_manifest(folder, shards, **manifest)
    return sum(len(entry.get("bad", [])) for entry in shards.values())


def _look(shard: Path, entry: dict[str, Any]) -> list[Problem]:
    """What the sizes and the index of a shard show."""
    if not shard.is_file():
        return [Problem(shard.name, "is missing")]
    problems, size = [], shard.stat().st_size
    if size != entry["bytes"]:
        problems.append(Problem(shard.name, f"has {size} bytes, not {entry['bytes']}"))
    try:
        keys, index = read_index(shard.with_suffix(".idx"))
    except UserError as error:
        return [*problems, Problem(shard.name, str(error))]
    if len(keys) != entry["samples"] or (index.sum(1) > entry["bytes"]).any():
        problems.append(Problem(shard.name, "has an index that does not fit it"))
    return problems


def _read(shard: Path, entry: dict[str, Any], num_classes: int) -> list[Problem]:
    """What the bytes of a shard show; in a worker."""
    problems, digest = [], hashlib.sha256()
    with open(shard, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != entry["sha256"]:
        problems.append(Problem(shard.name, "its bytes are not those that were written (sha256)"))
    found, known_bad = [], set(entry.get("bad", []))
    try:
        for member in members(shard):
            key, _, ending = member.name.partition(".")
            if ending == "cls":
                label = read_at(shard, member.offset, min(member.length, 32))
                if num_classes and not (label.isdigit() and int(label) < num_classes):
                    problems.append(Problem(shard.name, f"{member.name} is {label!r}, none of {num_classes} classes"))
            if ending != "jpg":
                continue
            if key not in known_bad:
                problems += _decode(
                    shard, key, member.offset, member.length, entry["sizes"][len(found) : len(found) + 1]
                )
            found.append((key, member.offset, member.length))
            workers.count_one()
        keys, index = read_index(shard.with_suffix(".idx"))
        if found != [(key, *place) for key, place in zip(keys, index.tolist(), strict=True)]:
            problems.append(Problem(shard.name, "has an index that does not fit it"))
    except UserError as error:
        problems.append(Problem(shard.name, str(error)))
    return problems


def _decode(shard: Path, key: str, offset: int, length: int, size: list[list[int]]) -> list[Problem]:
    """What decoding one image shows."""
    finding = inspect(read_at(shard, offset, min(length, MAX_BYTES + 1)))
    if finding.jpeg is None:
        return [Problem(shard.name, f"cannot be decoded ({', '.join(finding.kinds)})", key)]
    if finding.kinds:
        return [Problem(shard.name, f"{key} is no plain RGB JPEG ({', '.join(finding.kinds)})")]
    if [[finding.width, finding.height]] != size:
        return [Problem(shard.name, f"{key} is {finding.width} x {finding.height} pixels, its manifest says {size}")]
    return []
