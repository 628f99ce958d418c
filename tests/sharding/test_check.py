import json
import shutil
from pathlib import Path

import pytest
from image_archives import class_folders, contents, imagenet, read_samples, run_script, shard_imagenet, write_folder

from ddae.data.cache import Cache
from ddae.data.manifest import read_index
from ddae.data.shards import open_shards

SHARD = "train-000003.tar"
CACHE = Cache(Path("nowhere"), 0)


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undamaged")
    args = ["--train", write_folder(folder / "in", class_folders(imagenet(8))), "--out", folder / "out"]
    assert shard_imagenet(*args) == 0
    return folder / "out"


@pytest.fixture
def folder(undamaged, tmp_path):
    return shutil.copytree(undamaged, tmp_path / "shards")


def check(*args):
    return run_script("check_shards", "--workers", 2, *args)


@pytest.mark.parametrize("depth", [[], ["--fast"], ["--full"]])
def test_undamaged_shards_have_no_problems(depth, folder, capsys):
    before = contents(folder)
    assert check(folder, *depth) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}: 40 images, {'hashes and images' if '--full' in depth else 'sizes and indexes'} checked, no problems"
    ]
    assert contents(folder) == before


def flip(path, offset_in_file, mask=0xFF):
    data = bytearray(path.read_bytes())
    data[offset_in_file] ^= mask
    path.write_bytes(bytes(data))


def damage(kind, folder):
    shard, index = folder / SHARD, (folder / SHARD).with_suffix(".idx")
    keys, rows = read_index(index)
    key, (offset, length) = keys[1], rows[1].tolist()
    match kind:
        case "image data":
            flip(shard, offset + length // 2)
        case "image header":
            flip(shard, offset)
        case "image end":
            data = bytearray(shard.read_bytes())
            data[offset + length // 3 : offset + length] = bytes(length - length // 3)
            shard.write_bytes(bytes(data))
        case "tar header":
            flip(shard, offset - 512 + 3)
        case "size in tar header":
            flip(shard, offset - 512 + 130, 1)
        case "padding":
            flip(shard, len(shard.read_bytes()) - 5)
        case "label":
            offset_in_file = shard.read_bytes().index(f"{key}.cls".encode()) + 512
            flip(shard, offset_in_file, 0x01)
        case "label beyond":
            offset_in_file = shard.read_bytes().index(f"{key}.cls".encode()) + 512
            flip(shard, offset_in_file, 0x0C)
        case "cut":
            shard.write_bytes(shard.read_bytes()[:-700])
        case "longer":
            shard.write_bytes(shard.read_bytes() + bytes(512))
        case "missing shard":
            shard.unlink()
        case "missing index":
            index.unlink()
        case "short index":
            lines = index.read_text().splitlines(keepends=True)
            index.write_text("".join(lines[:-1]))
        case "index out of shard":
            index.write_text(index.read_text().replace(f" {offset} ", f" {offset + 10**9} "))
        case "shifted index":
            index.write_text(index.read_text().replace(f" {offset} ", f" {offset + 512} "))
        case "other keys in index":
            index.write_text(index.read_text().replace(key, key[:-1] + "x"))
        case "garbled index":
            index.write_bytes(bytes(range(256)))
        case "swapped shards":
            other = folder / "train-000004.tar"
            shard.rename(folder / "aside")
            other.rename(shard)
            (folder / "aside").rename(other)
        case "stray tar":
            shutil.copy(shard, folder / "train-000099.tar")
        case "part":
            (folder / f"{SHARD}.part").write_bytes(b"half")
        case "size in manifest" | "pixels in manifest" | "hash in manifest":
            manifest = json.loads((folder / "manifest.json").read_text())
            entry = manifest["shards"][SHARD]
            if kind == "size in manifest":
                entry["bytes"] += 512
            elif kind == "pixels in manifest":
                entry["sizes"][1][0] += 1
            else:
                entry["sha256"] = entry["sha256"][::-1]
            (folder / "manifest.json").write_text(json.dumps(manifest))
    return key


FAST = """cut,longer,missing shard,missing index,short index,index out of shard,garbled index,stray tar,part,
size in manifest"""
FULL = """image data,image header,image end,tar header,size in tar header,padding,label,label beyond,shifted index,
other keys in index,swapped shards,pixels in manifest,hash in manifest"""


@pytest.mark.parametrize("kind", [kind.strip() for kind in FAST.split(",")])
def test_fast_check_finds_damaged_sizes(kind, folder, capsys):
    damage(kind, folder)
    name = {"stray tar": "train-000099.tar", "part": f"{SHARD}.part"}.get(kind, SHARD)
    for depth in ("--fast", "--full"):
        assert check(folder, depth) == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines
        assert all(line.startswith((f"{name}: ", f"{folder}: ")) for line in lines)
        assert any(line.startswith(f"{name}: ") for line in lines)


@pytest.mark.parametrize("kind", [kind.strip() for kind in FULL.split(",")])
def test_full_check_finds_damaged_bytes(kind, folder, capsys):
    key = damage(kind, folder)
    assert check(folder, "--full") == 1
    lines = capsys.readouterr().out.splitlines()
    named = [line for line in lines if line.startswith(f"{SHARD}: ")]
    assert named
    allowed = ("train-000004.tar: ",) if kind == "swapped shards" else ()
    assert all(line.startswith((f"{SHARD}: ", f"{folder}: ", *allowed)) for line in lines)
    if kind in ("image header", "image end"):
        assert any(f"{SHARD}: {key}: cannot be decoded" in line for line in named)
    if kind == "pixels in manifest":
        assert any(key in line for line in named)
    if kind == "label beyond":
        assert any(f"{key}.cls" in line for line in named)


def test_all_problems_are_listed(folder, capsys):
    damage("image header", folder)
    damage("stray tar", folder)
    (folder / "train-000001.idx").unlink()
    (folder / "train-000000.tar").unlink()
    assert check(folder, "--full") == 1
    text = capsys.readouterr().out
    for name in ("train-000000.tar", "train-000001.tar", SHARD, "train-000099.tar"):
        assert f"\n{name}: " in f"\n{text}"


def test_marked_images_are_skipped_in_training(folder, capsys):
    key = damage("image header", folder)
    before = json.loads((folder / "manifest.json").read_text())
    assert check(folder, "--full", "--mark_bad") == 1
    assert "1 images are marked as bad" in capsys.readouterr().out
    after = json.loads((folder / "manifest.json").read_text())
    assert after["shards"][SHARD].pop("bad") == [key]
    assert after == before
    opened = open_shards(str(folder), CACHE)
    assert (len(opened), opened.num_bad) == (39, 1)
    good = [data for name, (data, _) in read_samples(folder).items() if name != f"{SHARD}:{key}"]
    assert [opened.read(i) for i in range(39)] == good
    assert check(folder, "--full", "--mark_bad") == 1  # its hash still differs
    out = capsys.readouterr().out
    assert "cannot be decoded" not in out
    assert "1 images are marked as bad" in out


@pytest.mark.parametrize("kind", ["none", "broken", "no folder"])
def test_missing_or_damaged_manifest(kind, folder, capsys):
    match kind:
        case "none":
            (folder / "manifest.json").unlink()
        case "broken":
            (folder / "manifest.json").write_text("{")
        case "no folder":
            folder = folder / "nowhere"
    for depth in ("--fast", "--full", "--mark_bad"):
        assert check(folder, depth) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert errors[0].startswith("check_shards: ")
        assert "manifest.json" in errors[0]
