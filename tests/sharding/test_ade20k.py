"""Conversion of ADE20K's zip to shards, on small zips of every layout. Images encode their mask's labels as brightness,
so that an image that is rotated relative to its mask is detected."""

import errno
import io
import json
import os
import re
import runpy
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from webdataset.compat import WebDataset

from ddae.data.shard_writer import write_shard
from ddae.sharding import ade20k
from ddae.sharding.ade20k import prepare, read_member

SCRIPT = str(Path(__file__).parents[2] / "data_prep/prepare_ade20k.py")
SCENE = "ADEChallengeData2016"
NAMES = [f"thing {label}, synonym" for label in range(1, 151)]
FULL_ROOTS = ["ADE20K_2016_07_26/images", "ADE20K_2021_17_01/images/ADE"]


def labels_of(number, last=150, size=(48, 40)):
    """Return labels [H, W] in blocks of 8 x 8 pixels, including 0 (unlabelled) and the largest label."""
    width, height = size
    blocks = np.random.default_rng(number).integers(0, last + 1, (height // 8, width // 8))
    blocks[0, 0], blocks[-1, -1] = 0, last
    return blocks.repeat(8, 0).repeat(8, 1)


def jpeg(labels, orientation=1, mode="RGB"):
    """Return an image whose brightness is proportional to the label."""
    image, buffer = Image.fromarray((labels * 255 // max(labels.max(), 1)).astype(np.uint8)).convert(mode), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(buffer, "JPEG", quality=95, exif=exif if orientation != 1 else b"")
    return buffer.getvalue()


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def full_mask(labels):
    """Return a mask as in the full ADE20K: class in red (tens only) and green, instance in blue."""
    instances = np.arange(labels.size).reshape(labels.shape) % 7
    return png(np.stack([labels // 256 * 10 + 7, labels % 256, instances], -1).astype(np.uint8))


def scene_files(train=5, val=2):
    files = {f"{SCENE}/": b"", f"{SCENE}/objectInfo150.txt": object_info(), f"{SCENE}/sceneCategories.txt": b"x y\n"}
    for split, name, count in (("training", "train", train), ("validation", "val", val)):
        for number in range(1, count + 1):
            labels = labels_of(number)
            files[f"{SCENE}/images/{split}/ADE_{name}_{number:08d}.jpg"] = jpeg(labels)
            files[f"{SCENE}/annotations/{split}/ADE_{name}_{number:08d}.png"] = png(labels.astype(np.uint8))
    return files


def object_info():
    lines = [f"{label}{' ' * (label == 22)}\t0.1\t9\t3\t{name} " for label, name in enumerate(NAMES, 1)]
    return "\n".join(["Idx\tRatio\tTrain\tVal\tName", *lines, ""]).encode()


def full_files(root, last=3144):
    files = {}
    for number, place in enumerate(["training/a/abbey/ADE_train_00000970", "validation/b/bar/ADE_val_00000001"]):
        labels = labels_of(number, last)
        files[f"{root}/{place}.jpg"] = jpeg(labels)
        files[f"{root}/{place}_seg.png"] = full_mask(labels)
        files[f"{root}/{place}_parts_1.png"] = files[f"{root}/{place}_parts_2.png"] = b"skipped"
        files[f"{root}/{place}_atr.txt"] = b"skipped"
        files[f"{root}/{place}/instance_000_{place.split('/')[-1]}.png"] = b"skipped"
    return files


def index_mat(names):
    buffer, cells = io.BytesIO(), np.empty((1, len(names)), object)
    cells[0] = names
    savemat(buffer, {"index": {"objectnames": cells, "objectcounts": np.ones((len(names), 1))}})
    return buffer.getvalue()


def make_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def change_header(path, name, offset, value):
    """Overwrite a field of a member's entry in the zip's central directory."""
    data = bytearray(path.read_bytes())
    entry = next(
        m.start() for m in re.finditer(b"PK\x01\x02", data) if data[m.start() + 46 :].startswith(name.encode())
    )
    data[entry + offset : entry + offset + len(value)] = value
    path.write_bytes(data)


def read(folder, split):
    """Return key -> image and mask, read with webdataset."""
    paths = [str(path) for path in sorted(folder.glob(f"{split}-*.tar"))]
    records = list(WebDataset(paths, shardshuffle=False, empty_check=False))
    assert count_samples(folder, split) == len(records)
    pairs = {r["__key__"]: (Image.open(io.BytesIO(r["jpg"])), Image.open(io.BytesIO(r["png"]))) for r in records}
    for record in records:
        pairs[record["__key__"]][0].info["file"] = record["jpg"]  # its bytes, beside its pixels
    return pairs


def count_samples(folder, split):
    """Return the number of samples in the manifest."""
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    return sum(entry["samples"] for name, entry in shards.items() if name.startswith(split))


def report_of(folder):
    """Return key -> kinds and action. Check that the numbers add up."""
    report = json.loads((folder / "report.json").read_text())
    assert report["written"] == count_samples(folder, "train") + count_samples(folder, "val")
    assert report["input"] == report["written"] + report["left_out"]
    assert report["left_out"] == sum(line["action"] == "left_out" for line in report["images"])
    return {line["key"]: (line["kinds"], line["action"]) for line in report["images"]}


def run_script(path, out, *args, patch=""):
    """Run the script in a subprocess. patch: Python code that is executed before it."""
    args = [SCRIPT, str(path), "--out", str(out), *args]
    folder = str(Path(SCRIPT).parent)  # which Python adds to the path when it runs the script
    code = f"import sys, runpy\nsys.argv, sys.path[:0] = {args}, [{folder!r}]\n{patch}\n"
    code += f"runpy.run_path({SCRIPT!r}, run_name='__main__')"
    return subprocess.run([sys.executable, *(["-c", code] if patch else args)], capture_output=True, text=True)


@pytest.fixture
def assert_rejected(monkeypatch, capsys):
    """Run the script in this process. It must print one line, exit with code 2, and create or remove no file."""

    def call(path, out, *args, message):
        before = sorted(out.parent.rglob("*"))
        monkeypatch.setattr(sys, "argv", [SCRIPT, str(path), "--out", str(out), *args])
        with pytest.raises(SystemExit) as exited:
            runpy.run_path(SCRIPT, run_name="__main__")
        printed = capsys.readouterr()
        assert exited.value.code == 2
        assert re.search(f"prepare_ade20k: .*({message}).*\n$", printed.err), printed.err
        assert printed.out == ""
        assert sorted(out.parent.rglob("*")) == before
        return printed.err

    return call


def test_scene_parse_pixel_by_pixel(tmp_path):
    files = scene_files()
    done = run_script(make_zip(tmp_path / "a.zip", files), tmp_path / "deep/out", "--per_shard", "2")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "deep/out"
    names = {f"train-{n:06d}.{end}" for n in range(3) for end in ("tar", "idx")} | {"val-000000.tar", "val-000000.idx"}
    indexes = {f"{split}.index.{ending}" for split in ("train", "val") for ending in ("json", "bin")}
    assert {path.name for path in out.iterdir()} == names | indexes | {"manifest.json", "report.json"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    for split, folder, count in (("train", "training", 5), ("val", "validation", 2)):
        samples = read(out, split)
        assert list(samples) == [f"ADE_{split}_{number:08d}" for number in range(1, count + 1)]
        for number, (key, (image, mask)) in enumerate(samples.items(), 1):
            labels = labels_of(number)
            assert mask.mode == "L"
            np.testing.assert_array_equal(np.asarray(mask), np.where(labels == 0, 255, labels - 1))
            assert image.info["file"] == files[f"{SCENE}/images/{folder}/{key}.jpg"]  # unchanged bytes
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["classes"] == NAMES
    assert manifest["settings"] == {"reduce_zero_label": True, "ignore": 255, "per_shard": 2, "images": 7}
    assert report_of(out) == {}


@pytest.mark.parametrize("root", FULL_ROOTS)
def test_full_ade20k_has_16_bit_masks(root, tmp_path):
    files = full_files(root)
    names = [f"name {label}" for label in range(1, 3145)]
    files[f"{root.split('/')[0]}/index_ade20k.mat"] = index_mat(names)
    prepare(make_zip(tmp_path / "a.zip", files), tmp_path / "out", 500)
    for number, split in enumerate(("train", "val")):
        ((_, mask),) = read(tmp_path / "out", split).values()
        labels = labels_of(number, 3144)
        assert {0, 3144} <= set(labels.flat)
        assert mask.mode == "I;16"
        np.testing.assert_array_equal(np.asarray(mask), np.where(labels == 0, 65535, labels - 1))
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["settings"]["ignore"] == 65535
    assert manifest["classes"] == names
    assert report_of(tmp_path / "out") == {}


def test_pickled_index_is_never_loaded(tmp_path):
    """Unpickling this index would create a file."""
    created = tmp_path / "ran"
    files = full_files(FULL_ROOTS[1])
    files["ADE20K_2021_17_01/index_ade20k.pkl"] = f"cposix\nsystem\n(S'touch {created}'\ntR.".encode()
    printed = prepare(make_zip(tmp_path / "a.zip", files), tmp_path / "out", 500)
    assert not created.exists()
    assert "classes have no names: index_ade20k.mat is missing" in printed
    assert json.loads((tmp_path / "out/manifest.json").read_text())["classes"] == []


@pytest.mark.parametrize("content", [b"", b"Idx\tName\n1\twall\n", b"\xff\xfe", b"no table"])
def test_unreadable_class_names_are_reported(content, tmp_path):
    files = scene_files(1, 1) | {f"{SCENE}/objectInfo150.txt": content}
    assert "classes have no names: objectInfo150.txt" in prepare(make_zip(tmp_path / "a.zip", files), tmp_path / "o", 9)
    assert json.loads((tmp_path / "o/manifest.json").read_text())["classes"] == []


@pytest.mark.parametrize("orientation", [3, 6])
def test_image_with_exif_orientation_matches_its_mask(orientation, tmp_path):
    files, labels = scene_files(1, 1), labels_of(1)
    files[f"{SCENE}/images/training/ADE_train_00000001.jpg"] = jpeg(labels, orientation)
    prepare(make_zip(tmp_path / "a.zip", files), tmp_path / "out", 500)
    ((image, mask),) = read(tmp_path / "out", "train").values()
    assert image.getexif().get(0x0112, 1) == 1
    assert image.size == mask.size == (48, 40)
    ((width, height),) = json.loads((tmp_path / "out/manifest.json").read_text())["shards"]["train-000000.tar"]["sizes"]
    assert (width, height) == (48, 40)
    brightness = np.asarray(mask).astype(np.uint8) + np.uint8(1)  # the label, which jpeg() encoded
    assert np.abs(np.asarray(image)[..., 0] - brightness * (255 / 150)).mean() < 6
    assert report_of(tmp_path / "out") == {"ADE_train_00000001": (["exif_rotated"], "converted")}


def test_unusable_pairs_are_reported(tmp_path):
    files, labels = scene_files(12, 1), labels_of(1)
    image, mask = (
        f"{SCENE}/{kind}/training/ADE_train_%08d.{end}" for kind, end in (("images", "jpg"), ("annotations", "png"))
    )
    files[image % 1] = jpeg(labels)[:-300]
    files[image % 2] = b"not an image"
    files[mask % 3] = files[mask % 3][:-60]
    files[mask % 4] = png(labels[:, :-1].astype(np.uint8))
    files[mask % 5] = png(np.where(labels == 0, 151, labels).astype(np.uint8))
    files[mask % 6] = png(np.stack([labels] * 3, -1).astype(np.uint8))
    files[mask % 7] = png(labels.astype(np.uint16))
    del files[mask % 8], files[image % 9]
    files[image % 10] = jpeg(labels, mode="L")
    files[image % 11] = jpeg(labels, mode="CMYK")
    prepare(make_zip(tmp_path / "a.zip", files), tmp_path / "out", 500)
    assert report_of(tmp_path / "out") == {
        "ADE_train_00000001": (["truncated"], "left_out"),
        "ADE_train_00000002": (["unreadable"], "left_out"),
        "ADE_train_00000003": (["mask_unreadable"], "left_out"),
        "ADE_train_00000004": (["size_mismatch"], "left_out"),
        "ADE_train_00000005": (["label_out_of_range"], "left_out"),
        "ADE_train_00000006": (["mask_not_8bit"], "left_out"),
        "ADE_train_00000007": (["mask_not_8bit"], "left_out"),
        "ADE_train_00000008": (["no_annotation"], "left_out"),
        "ADE_train_00000009": (["no_image"], "left_out"),
        "ADE_train_00000010": (["greyscale"], "converted"),
        "ADE_train_00000011": (["cmyk"], "converted"),
    }
    train = read(tmp_path / "out", "train")
    assert list(train) == [f"ADE_train_{number:08d}" for number in (10, 11, 12)]
    assert {image.mode for image, _ in train.values()} == {"RGB"}
    sources = [line["source"] for line in json.loads((tmp_path / "out/report.json").read_text())["images"]]
    assert sources[7:9] == [image % 8, mask % 9]


def test_duplicate_key_is_written_once(tmp_path):
    files = full_files(FULL_ROOTS[0])
    for end in (".jpg", "_seg.png"):
        files[f"{FULL_ROOTS[0]}/training/z/zoo/ADE_train_00000970{end}"] = files[
            f"{FULL_ROOTS[0]}/training/a/abbey/ADE_train_00000970{end}"
        ]
    prepare(make_zip(tmp_path / "a.zip", files), tmp_path / "out", 500)
    assert report_of(tmp_path / "out") == {"ADE_train_00000970": (["duplicate_key"], "left_out")}


def test_label_without_class_name_is_left_out(tmp_path):
    files = full_files(FULL_ROOTS[0], last=300) | {"ADE20K_2016_07_26/index_ade20k.mat": index_mat(["x"] * 300)}
    place = f"{FULL_ROOTS[0]}/training/a/abbey/ADE_train_00000970"
    files[f"{place}_seg.png"] = full_mask(labels_of(0, 301))
    prepare(make_zip(tmp_path / "a.zip", files), tmp_path / "out", 500)
    assert report_of(tmp_path / "out") == {"ADE_train_00000970": (["label_out_of_range"], "left_out")}


def test_damaged_members_are_reported(tmp_path):
    """One member has changed bytes; another declares fewer bytes than it has."""
    files = scene_files(3, 1)
    path = make_zip(tmp_path / "a.zip", files)
    data = bytearray(path.read_bytes())
    start = data.index(b"ADE_train_00000001.jpg") + 22
    data[start + 100 : start + 120] = bytes(20)
    path.write_bytes(data)
    change_header(path, f"{SCENE}/annotations/training/ADE_train_00000002.png", 24, struct.pack("<I", 20))
    prepare(path, tmp_path / "out", 500)
    assert report_of(tmp_path / "out") == {
        "ADE_train_00000001": (["damaged_in_zip"], "left_out"),
        "ADE_train_00000002": (["damaged_in_zip"], "left_out"),
    }


def test_read_member_limits_the_size(tmp_path, monkeypatch):
    with zipfile.ZipFile(make_zip(tmp_path / "a.zip", {"a": bytes(1000)})) as archive:
        monkeypatch.setattr(ade20k, "MAX_BYTES", 1000)
        assert read_member(archive, archive.getinfo("a")) == bytes(1000)
        monkeypatch.setattr(ade20k, "MAX_BYTES", 999)
        assert read_member(archive, archive.getinfo("a")) is None


def test_output_is_reproducible(tmp_path):
    path = make_zip(tmp_path / "a.zip", scene_files())
    (tmp_path / "two").mkdir()  # an existing empty folder is accepted
    other = make_zip(tmp_path / "b.zip", dict(reversed(scene_files().items())))
    for zipped, out in ((path, "one"), (path, "two"), (other, "three")):
        prepare(zipped, tmp_path / out, 3)
    for file in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()
        assert (tmp_path / "three" / file.name).read_bytes() == file.read_bytes()


def test_complete_folder_is_kept_and_other_shards_are_rejected(tmp_path, assert_rejected):
    path, out = make_zip(tmp_path / "a.zip", scene_files()), tmp_path / "out"
    prepare(path, out, 500)
    times = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    again = run_script(path, out)
    assert again.returncode == 0
    assert "is complete" in again.stdout
    assert_rejected(path, out, "--per_shard", "2", message="contains other or incomplete shards")
    assert_rejected(make_zip(tmp_path / "b.zip", scene_files(4, 2)), out, message="contains other or incomplete shards")
    assert_rejected(
        make_zip(tmp_path / "c.zip", full_files(FULL_ROOTS[0])), out, message="contains other or incomplete shards"
    )
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == times
    with open(out / "train-000000.tar", "ab") as shard:
        shard.truncate(1000)
    assert_rejected(path, out, message="contains other or incomplete shards")
    (out / "train-000000.tar").unlink()
    assert_rejected(path, out, message="contains other or incomplete shards")


def test_killed_run_starts_over(tmp_path):
    path, out = make_zip(tmp_path / "a.zip", scene_files()), tmp_path / "out"
    kill = "import os, ddae.data.shard_writer as w; w.write_manifest = lambda *a, **k: os.kill(os.getpid(), 9)"
    assert run_script(path, out, "--per_shard", "1", patch=kill).returncode == -9
    assert not out.exists()
    assert (tmp_path / "out.unfinished/train-000004.tar").exists()
    prepare(path, out, 3)
    assert sorted(p.name for p in out.glob("*.tar")) == ["train-000000.tar", "train-000001.tar", "val-000000.tar"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "out"]


@pytest.mark.parametrize(
    "case", ["no file", "folder", "text", "cut", "other zip", "images alone", "masks alone", "both"]
)
def test_other_files_are_rejected(case, tmp_path, assert_rejected):
    path, files = tmp_path / "a.zip", scene_files(2, 1)
    match case:
        case "no file":
            message = "No such file"
        case "folder":
            path.mkdir()
            message = "Is a directory"
        case "text":
            path.write_text("not a zip")
            message = "is not a complete zip"
        case "cut":
            path.write_bytes(make_zip(path, files).read_bytes()[:-500])
            message = "is not a complete zip"
        case "other zip":
            make_zip(path, {"images/cat.jpg": b"x", "README": b"y"})
            message = "contains 0 images"
        case "images alone":
            make_zip(path, {name: data for name, data in files.items() if "annotations" not in name})
            message = "masks of 0 layouts"
        case "masks alone":
            make_zip(path, {name: data for name, data in files.items() if "images" not in name})
            message = "contains 0 images"
        case "both":
            make_zip(path, files | full_files(FULL_ROOTS[0]))
            message = "masks of 2 layouts"
    assert len(assert_rejected(path, tmp_path / "out", message=message).splitlines()) == 1


def test_error_in_a_subprocess(tmp_path):
    done = run_script(tmp_path / "none.zip", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr == f"prepare_ade20k: {tmp_path}/none.zip: No such file or directory. Nothing was written.\n"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_backslashes_in_paths(tmp_path):
    """As some programs on Windows write them."""
    files = scene_files()
    prepare(make_zip(tmp_path / "a.zip", files), tmp_path / "a", 500)
    windows = {name.replace("/", "\\"): data for name, data in files.items()}
    prepare(make_zip(tmp_path / "b.zip", windows), tmp_path / "b", 500)
    for shard in (tmp_path / "a").glob("*.tar"):
        assert (tmp_path / "b" / shard.name).read_bytes() == shard.read_bytes()
    assert (tmp_path / "b" / "manifest.json").read_text() == (tmp_path / "a" / "manifest.json").read_text()


@pytest.mark.parametrize("name", ["../evil.jpg", "a/../../evil.jpg", "/etc/evil", "..\\evil", "C:\\evil"])
def test_unsafe_paths_are_rejected(name, tmp_path, assert_rejected):
    path = make_zip(tmp_path / "a.zip", scene_files(1, 1) | {name: b"x"})
    assert_rejected(path, tmp_path / "out", message="outside its folder")


def test_encrypted_and_oversized_members_are_rejected(tmp_path, assert_rejected):
    name = f"{SCENE}/annotations/training/ADE_train_00000001.png"
    path = make_zip(tmp_path / "a.zip", scene_files(2, 1))
    change_header(path, name, 8, b"\x01\x00")
    assert_rejected(path, tmp_path / "out", message="is encrypted")
    make_zip(path, scene_files(2, 1))
    change_header(path, name, 24, struct.pack("<I", (1 << 28) + 1))
    assert_rejected(path, tmp_path / "out", message="larger than 256 MiB")


def test_no_usable_image(tmp_path, assert_rejected):
    files = {name: b"broken" if name.endswith(".jpg") else data for name, data in scene_files(2, 1).items()}
    assert_rejected(
        make_zip(tmp_path / "a.zip", files), tmp_path / "out", message="none of the 3 images is usable.*unreadable"
    )


def test_full_disk(tmp_path, assert_rejected, monkeypatch):
    """The disk is full when half of the second shard is written."""

    def fill(path, samples):
        if path.name.startswith("train"):
            return write_shard(path, samples)
        path.with_suffix(".tar.part").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = make_zip(tmp_path / "a.zip", scene_files(2, 1))
    monkeypatch.setattr(ade20k, "write_shard", fill)
    assert_rejected(path, tmp_path / "out", message="No space left")


def test_unusable_output_folder(tmp_path, assert_rejected):
    path, out = make_zip(tmp_path / "a.zip", scene_files(2, 1)), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("text")
    assert_rejected(path, out, message="not an empty folder")
    assert_rejected(path, path, message="not an empty folder")
    assert_rejected(path, path / "below", message="Not a directory|File exists")
    (out / "manifest.json").write_text("[]")
    assert_rejected(path, out, message="contains other or incomplete shards")
    assert_rejected(path, tmp_path / "new", "--per_shard", "0", message="expected at least 1")
    assert (out / "thesis.tex").read_text() == "text"


def test_progress_is_a_line_at_the_end_without_a_terminal(tmp_path):
    """Standard error is not a terminal here: progress is a line at the end, and else every ten seconds."""
    slow = """import time
from ddae.sharding import ade20k
convert_pair = ade20k.convert_pair
ade20k.convert_pair = lambda *args: time.sleep(0.05) or convert_pair(*args)"""
    start = time.monotonic()
    done = run_script(make_zip(tmp_path / "a.zip", scene_files(18, 2)), tmp_path / "out", patch=slow)
    lines = [line for line in done.stderr.splitlines() if "images/s" in line]
    assert "20 of 20 images" in lines[-1]
    assert len(lines) <= 1 + (time.monotonic() - start) / 10  # 20 lines on a terminal
    assert "out: 20 images" in done.stdout
