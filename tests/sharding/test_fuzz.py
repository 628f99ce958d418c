"""Random mutations of images, archives, shards, indexes and manifests: no traceback, no hang, bounded memory, every
image accounted for, nothing written outside the target.

`make test` runs a part of the mutations, `make test-slow` all of them. Mutation i depends on i alone.
"""

import io
import json
import resource
import signal
import tarfile
import zipfile
from collections import Counter
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import make_shards, picture
from image_archives import class_folders, class_tars, encode, imagenet, irregular_images, photo, tar_of

from ddae.data.cache import Cache
from ddae.data.decode import decode_crop, first_rows, is_truncated
from ddae.data.manifest import read_manifest
from ddae.data.shards import open_shards
from ddae.errors import UserError
from ddae.sharding.check import check
from ddae.sharding.inspection import inspect
from ddae.sharding.scan import LabelRule
from ddae.sharding.sharder import Settings, shard
from ddae.sharding.sources import build_index

MAX_SECONDS, MAX_GIB = 60, 1
COUNTS = {"images": (600, 6000), "scans": (200, 2500), "whole runs": (25, 500), "shards": (60, 1000)}
TARGETS = [pytest.param(kind, counts[0], id=kind) for kind, counts in COUNTS.items()]
TARGETS += [pytest.param(kind, counts[1], id=f"{kind}, all", marks=pytest.mark.slow) for kind, counts in COUNTS.items()]
NAMES = ("../x.jpg", "/etc/x.jpg", "a\0b.jpg", "." * 90, "x.tar", "x.cls", "\xff\xfe.jpg", "a/b/c.jpg", "", "é.png")


def mutate(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """Return the data with one to four random changes; other: a source of foreign parts."""
    result = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        if not result:
            return b""
        at = int(rng.integers(min(len(result), 700) if rng.random() < 0.4 else len(result)))
        length = int(rng.integers(1, max(2, len(result) // 4)))
        match rng.integers(9):
            case 0:
                result[at] ^= 1 << int(rng.integers(8))
            case 1:
                result[at : at + 8] = rng.bytes(min(8, len(result) - at))
            case 2:
                result[at : at + 4] = bytes([int(rng.choice([0, 255]))]) * min(4, len(result) - at)
            case 3:
                del result[at:]
            case 4:
                del result[at : at + length]
            case 5:
                result[at:at] = result[at : at + length]
            case 6:
                start = int(rng.integers(len(other) + 1))
                result[at:at] = other[start : start + length]
            case 7:
                result[at : at + length] = bytes(min(length, len(result) - at))
            case 8:
                number = str(int(rng.choice([-1, 0, 1, 7, 255, 2**31, 2**63, 10**30]))).encode()
                result[at : at + len(number)] = number
    return bytes(result)


def mutate_tar_headers(data: bytes, rng: np.random.Generator) -> bytes:
    """Return a tar with changed fields in one to three headers, whose checksums are right."""
    result = bytearray(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        starts = [member.offset for member in archive]
    for start in rng.choice(starts, min(len(starts), int(rng.integers(1, 4))), replace=False).tolist():
        match rng.integers(5):
            case 0:
                result[start : start + 100] = str(rng.choice(NAMES)).encode("utf-8", "replace")[:100].ljust(100, b"\0")
            case 1:
                size = int(rng.choice([0, 1, 511, 512, 10**6, 8**11 - 1]))
                result[start + 124 : start + 136] = f"{size:011o}".encode() + b"\0"
            case 2:
                result[start + 156] = int(rng.choice(list(b"0123456789LKSVMDxgA")))
            case 3:
                result[start + 124 : start + 136] = rng.bytes(12)
            case 4:
                result[start + 257 : start + 265] = b"ustar  \0" if rng.random() < 0.5 else rng.bytes(8)
        result[start + 148 : start + 156] = b" " * 8
        result[start + 148 : start + 156] = f"{sum(result[start : start + 512]):06o}\0 ".encode()
    return bytes(result)


def mutate_files(data: bytes, rng: np.random.Generator) -> bytes:
    """Return a tar with changed content of one to five of its files."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        found = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
        files = {name: file.read() for name, file in found.items() if file is not None}
    names = list(files)
    for name in rng.choice(names, min(len(names), int(rng.integers(1, 6))), replace=False).tolist():
        other = files[names[int(rng.integers(len(names)))]]
        files[name] = mutate_files(files[name], rng) if name.endswith(".tar") else mutate(files[name], rng, other)
    return tar_of(files)


@contextmanager
def limited():
    """Fail after MAX_SECONDS."""

    def fail(*_):
        raise AssertionError(f"it took more than {MAX_SECONDS} s")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(MAX_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def memory(name: str) -> int:
    """Return a value of this process's memory in KiB: VmRSS, now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


@cache
def seeds_of_images() -> list[bytes]:
    """Return images of many structures and formats."""
    images = {name: data for name, data in irregular_images().items() if name != "bomb"}
    formats = [encode(picture(1), form) for form in ("PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")]
    options = ({}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1})
    return [*images.values(), *formats, *(photo(i, **each) for i, each in enumerate(options))]


@cache
def seeds_of_archives() -> dict[str, bytes]:
    """Return small archives of each form by the ending of their name."""
    classes = {wnid: dict(list(files.items())[:2]) for wnid, files in imagenet().items()}
    labelled = {}
    for i in range(5):
        labelled |= {f"{i}.jpg": photo(i), f"{i}.cls": b"%d" % i, f"{i}.json": json.dumps({"label": i}).encode()}
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in class_folders(classes).items():
            archive.writestr(name, data)
    return {
        "nested.tar": tar_of(class_tars(classes)),
        "folders.tar": tar_of(class_folders(classes)),
        "labelled.tar": tar_of(labelled),
        "compressed.tar.gz": tar_of(class_folders(classes), "w:gz"),
        "zipped.zip": zipped.getvalue(),
    }


def fuzz_images(rng, tmp_path, outcomes):
    seeds = seeds_of_images()
    data, other = (seeds[int(rng.integers(len(seeds)))] for _ in range(2))
    broken = mutate(data, rng, other)
    inspected = inspect(broken, resize_shorter=int(rng.choice([0, 50])))
    assert (inspected.jpeg is None) <= bool(inspected.kinds)
    outcomes[inspected.kinds[0] if inspected.kinds else "plain"] += 1
    first_rows(broken, 10)
    is_truncated(broken)
    if inspected.jpeg is not None:
        assert decode_crop(inspected.jpeg, (0, 0, inspected.width, inspected.height), False, 8).shape == (3, 8, 8)


def write_source(rng, folder: Path) -> Path:
    """Write a mutated archive."""
    archives = seeds_of_archives()
    name = str(rng.choice(list(archives)))
    data, other = archives[name], archives[str(rng.choice(list(archives)))]
    kind = int(rng.integers(3)) if name.endswith(".tar") else 0
    mutations = (
        lambda: mutate(data, rng, other),
        lambda: mutate_tar_headers(data, rng),
        lambda: mutate_files(data, rng),
    )
    (folder / name).write_bytes(mutations[kind]())
    return folder / name


def fuzz_scans(rng, tmp_path, outcomes):
    path = write_source(rng, tmp_path)
    try:
        index = build_index("train", str(path), None, None, LabelRule(labels="auto" if rng.random() < 0.5 else "none"))
    except UserError:
        outcomes["refused"] += 1
        return
    assert len({index.key_of(i) for i in range(len(index))}) == len(index)
    assert all(index.source(i) and index.length[i] >= 0 for i in range(len(index)))
    outcomes["read"] += 1


def fuzz_whole_runs(rng, tmp_path, outcomes):
    path, out = write_source(rng, tmp_path), tmp_path / "target" / "out"
    before = sorted(tmp_path.rglob("*"))
    try:
        index = build_index("train", str(path))
        shard([index], out, Settings(), 1)
    except UserError:
        outcomes["refused"] += 1
        assert sorted(tmp_path.rglob("*")) == before
        return
    assert {each.parts[len(tmp_path.parts)] for each in tmp_path.rglob("*")} == {path.name, "target"}
    accounting = read_manifest(out)["accounting"]
    found = len(index) + index.tally.left_out.total()
    assert accounting["found"] == found
    assert found == accounting["written"] + accounting["converted"] + sum(accounting["left_out"].values())
    assert check(out, True, 1)[0] == []
    outcomes["sharded"] += 1


def fuzz_shards(rng, tmp_path, outcomes):
    folder = make_shards(tmp_path)
    files = sorted(folder.iterdir())
    path = files[int(rng.integers(len(files)))]
    path.write_bytes(mutate(path.read_bytes(), rng, files[0].read_bytes()))
    if rng.random() < 0.5:
        for each in folder.glob("*.index.*"):
            each.unlink()
    try:
        opened = open_shards(str(folder), Cache(tmp_path, 0))
        for i in range(0, len(opened), 7):
            opened.read(i)
        opened.labels()
        outcomes["opened"] += 1
    except UserError:
        outcomes["refused"] += 1
    except OSError as error:
        if error.errno is not None:  # otherwise the shard is too short: a bad sample for the loader
            raise
        outcomes["too short"] += 1
    try:
        check(folder, bool(rng.random() < 0.2), 1)
    except UserError:
        outcomes["not checked"] += 1


@pytest.mark.parametrize("kind, count", TARGETS)
def test_mutations(kind, count, tmp_path_factory):
    outcomes: Counter[str] = Counter()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, children_before = memory("VmRSS"), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    run = {"images": fuzz_images, "scans": fuzz_scans, "whole runs": fuzz_whole_runs, "shards": fuzz_shards}[kind]
    for number in range(count):
        folder = tmp_path_factory.mktemp("fuzz") if kind != "images" else None
        with limited():
            try:
                run(np.random.default_rng([number, list(COUNTS).index(kind)]), folder, outcomes)
            except Exception as error:
                raise AssertionError(f"mutation {number} of {kind}") from error
    assert memory("VmHWM") - before < MAX_GIB << 20  # KiB
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of all worker processes, with what they share
    assert largest == children_before or largest < memory("VmHWM") + (MAX_GIB << 20)
    print(f"{count} mutations of {kind}: {dict(outcomes.most_common())}")
    assert len(outcomes) > 1
