"""ADE20K's zip -> shards, on small zips of every layout. A picture's red channel says its mask's label, so that an
image and a mask that lie differently are found out."""

import errno
import io
import json
import os
import re
import runpy
import struct
import subprocess
import sys
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
    """Blocks of 8 x 8 pixels, the first unlabelled, the last of the largest label."""
    width, height = size
    blocks = np.random.default_rng(number).integers(0, last + 1, (height // 8, width // 8))
    blocks[0, 0], blocks[-1, -1] = 0, last
    return blocks.repeat(8, 0).repeat(8, 1)


def jpeg(labels, orientation=1, mode="RGB"):
    """A picture that is bright where the label is large."""
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
    """Class in red and green, instances in blue, as the full ADE20K has them; what tens leave of red means nothing."""
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
        files[f"{root}/{place}_parts_1.png"] = files[f"{root}/{place}_parts_2.png"] = b"passed over"
        files[f"{root}/{place}_atr.txt"] = b"passed over"
        files[f"{root}/{place}/instance_000_{place.split('/')[-1]}.png"] = b"passed over"
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
    """Overwrite a field of a member's entry in the zip's directory, where readers look."""
    data = bytearray(path.read_bytes())
    entry = next(
        m.start() for m in re.finditer(b"PK\x01\x02", data) if data[m.start() + 46 :].startswith(name.encode())
    )
    data[entry + offset : entry + offset + len(value)] = value
    path.write_bytes(data)


def read(folder, split):
    """key -> image and mask, through plain webdataset."""
    paths = [str(path) for path in sorted(folder.glob(f"{split}-*.tar"))]
    records = list(WebDataset(paths, shardshuffle=False, empty_check=False))
    assert samples_of(folder, split) == len(records)
    pairs = {r["__key__"]: (Image.open(io.BytesIO(r["jpg"])), Image.open(io.BytesIO(r["png"]))) for r in records}
    for record in records:
        pairs[record["__key__"]][0].info["file"] = record["jpg"]  # its bytes, beside its pixels
    return pairs


def samples_of(folder, split):
    """As the manifest counts them."""
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    return sum(entry["samples"] for name, entry in shards.items() if name.startswith(split))


def report_of(folder):
    """key -> kinds and action; the numbers must add up."""
    report = json.loads((folder / "report.json").read_text())
    assert report["written"] == samples_of(folder, "train") + samples_of(folder, "val")
    assert report["input"] == report["written"] + report["left_out"]
    assert report["left_out"] == sum(line["action"] == "left_out" for line in report["images"])
    return {line["key"]: (line["kinds"], line["action"]) for line in report["images"]}


def command(path, out, *words, patch=""):
    """The script in a process of its own, as a user calls it; `patch` is Python that runs before it."""
    words = [SCRIPT, str(path), "--out", str(out), *words]
    start = ["-c", f"import sys, runpy\nsys.argv = {words}\n{patch}\nrunpy.run_path({SCRIPT!r}, run_name='__main__')"]
    return subprocess.run([sys.executable, *(start if patch else words)], capture_output=True, text=True)


@pytest.fixture
def refused(monkeypatch, capsys):
    """The script with a mistake, in this process: one sentence, exit code 2, and no file made or lost."""

    def call(path, out, *words, says):
        before = sorted(out.parent.rglob("*"))
        monkeypatch.setattr(sys, "argv", [SCRIPT, str(path), "--out", str(out), *words])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(SCRIPT, run_name="__main__")
        said = capsys.readouterr()
        assert stop.value.code == 2
        assert re.search(f"prepare_ade20k: .*({says}).*\n$", said.err), said.err
        assert said.out == ""
        assert sorted(out.parent.rglob("*")) == before
        return said.err

    return call


def test_scene_parse_pixel_by_pixel(tmp_path):
    files = scene_files()
    done = command(make_zip(tmp_path / "a.zip", files), tmp_path / "deep/out", "--per_shard", "2")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "deep/out"
    names = {f"train-{n:06d}.{end}" for n in range(3) for end in ("tar", "idx")} | {"val-000000.tar", "val-000000.idx"}
    assert {path.name for path in out.iterdir()} == names | {"manifest.json", "report.json"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    for split, folder, count in (("train", "training", 5), ("val", "validation", 2)):
        samples = read(out, split)
        assert list(samples) == [f"ADE_{split}_{number:08d}" for number in range(1, count + 1)]
        for number, (key, (image, mask)) in enumerate(samples.items(), 1):
            labels = labels_of(number)
            assert mask.mode == "L"
            np.testing.assert_array_equal(np.asarray(mask), np.where(labels == 0, 255, labels - 1))
            assert image.info["file"] == files[f"{SCENE}/images/{folder}/{key}.jpg"]  # byte for byte
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["classes"] == NAMES
    assert manifest["settings"] == {"reduce_zero_label": True, "ignore": 255, "per_shard": 2, "images": 7}
    assert report_of(out) == {}


@pytest.mark.parametrize("root", FULL_ROOTS)
def test_all_classes_have_16_bits(root, tmp_path):
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


def test_a_pickle_is_never_opened(tmp_path):
    """Unpickling this index would make a file."""
    made = tmp_path / "ran"
    files = full_files(FULL_ROOTS[1])
    files["ADE20K_2021_17_01/index_ade20k.pkl"] = f"cposix\nsystem\n(S'touch {made}'\ntR.".encode()
    said = prepare(make_zip(tmp_path / "a.zip", files), tmp_path / "out", 500)
    assert not made.exists()
    assert "classes have no names: index_ade20k.mat is missing" in said
    assert json.loads((tmp_path / "out/manifest.json").read_text())["classes"] == []


@pytest.mark.parametrize("content", [b"", b"Idx\tName\n1\twall\n", b"\xff\xfe", b"no table"])
def test_names_that_cannot_be_read_are_said(content, tmp_path):
    files = scene_files(1, 1) | {f"{SCENE}/objectInfo150.txt": content}
    assert "classes have no names: objectInfo150.txt" in prepare(make_zip(tmp_path / "a.zip", files), tmp_path / "o", 9)
    assert json.loads((tmp_path / "o/manifest.json").read_text())["classes"] == []


@pytest.mark.parametrize("orientation", [3, 6])
def test_an_image_that_exif_turns_stays_with_its_mask(orientation, tmp_path):
    files, labels = scene_files(1, 1), labels_of(1)
    files[f"{SCENE}/images/training/ADE_train_00000001.jpg"] = jpeg(labels, orientation)
    prepare(make_zip(tmp_path / "a.zip", files), tmp_path / "out", 500)
    ((image, mask),) = read(tmp_path / "out", "train").values()
    assert image.getexif().get(0x0112, 1) == 1
    assert image.size == mask.size == (48, 40)
    ((width, height),) = json.loads((tmp_path / "out/manifest.json").read_text())["shards"]["train-000000.tar"]["sizes"]
    assert (width, height) == (48, 40)
    brightness = np.asarray(mask).astype(np.uint8) + np.uint8(1)  # the label again, as jpeg() painted it
    assert np.abs(np.asarray(image)[..., 0] - brightness * (255 / 150)).mean() < 6
    assert report_of(tmp_path / "out") == {"ADE_train_00000001": (["exif_rotated"], "converted")}


def test_what_cannot_be_used_is_named(tmp_path):
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


def test_one_key_in_two_folders_is_written_once(tmp_path):
    files = full_files(FULL_ROOTS[0])
    for end in (".jpg", "_seg.png"):
        files[f"{FULL_ROOTS[0]}/training/z/zoo/ADE_train_00000970{end}"] = files[
            f"{FULL_ROOTS[0]}/training/a/abbey/ADE_train_00000970{end}"
        ]
    prepare(make_zip(tmp_path / "a.zip", files), tmp_path / "out", 500)
    assert report_of(tmp_path / "out") == {"ADE_train_00000970": (["duplicate_key"], "left_out")}


def test_a_label_without_a_name_is_left_out(tmp_path):
    files = full_files(FULL_ROOTS[0], last=300) | {"ADE20K_2016_07_26/index_ade20k.mat": index_mat(["x"] * 300)}
    place = f"{FULL_ROOTS[0]}/training/a/abbey/ADE_train_00000970"
    files[f"{place}_seg.png"] = full_mask(labels_of(0, 301))
    prepare(make_zip(tmp_path / "a.zip", files), tmp_path / "out", 500)
    assert report_of(tmp_path / "out") == {"ADE_train_00000970": (["label_out_of_range"], "left_out")}


def test_damage_in_the_zip_is_named(tmp_path):
    """A member whose bytes changed, and one that declares fewer bytes than it has."""
    files = scene_files(3, 1)
    path = make_zip(tmp_path / "a.zip", files)
    data = bytearray(path.read_bytes())
    place = data.index(b"ADE_train_00000001.jpg") + 22
    data[place + 100 : place + 120] = bytes(20)
    path.write_bytes(data)
    change_header(path, f"{SCENE}/annotations/training/ADE_train_00000002.png", 24, struct.pack("<I", 20))
    prepare(path, tmp_path / "out", 500)
    assert report_of(tmp_path / "out") == {
        "ADE_train_00000001": (["damaged_in_zip"], "left_out"),
        "ADE_train_00000002": (["damaged_in_zip"], "left_out"),
    }


def test_no_more_is_read_than_allowed(tmp_path, monkeypatch):
    with zipfile.ZipFile(make_zip(tmp_path / "a.zip", {"a": bytes(1000)})) as archive:
        monkeypatch.setattr(ade20k, "MAX_BYTES", 1000)
        assert read_member(archive, archive.getinfo("a")) == bytes(1000)
        monkeypatch.setattr(ade20k, "MAX_BYTES", 999)
        assert read_member(archive, archive.getinfo("a")) is None


def test_the_same_zip_gives_the_same_bytes(tmp_path):
    path = make_zip(tmp_path / "a.zip", scene_files())
    (tmp_path / "two").mkdir()  # an empty folder may be there
    other = make_zip(tmp_path / "b.zip", dict(reversed(scene_files().items())))
    for zipped, out in ((path, "one"), (path, "two"), (other, "three")):
        prepare(zipped, tmp_path / out, 3)
    for file in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()
        assert (tmp_path / "three" / file.name).read_bytes() == file.read_bytes()


def test_a_complete_folder_is_kept_and_another_refused(tmp_path, refused):
    path, out = make_zip(tmp_path / "a.zip", scene_files()), tmp_path / "out"
    prepare(path, out, 500)
    times = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    again = command(path, out)
    assert again.returncode == 0
    assert "is complete" in again.stdout
    refused(path, out, "--per_shard", "2", says="holds other shards")
    refused(make_zip(tmp_path / "b.zip", scene_files(4, 2)), out, says="holds other shards")
    refused(make_zip(tmp_path / "c.zip", full_files(FULL_ROOTS[0])), out, says="holds other shards")
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == times
    with open(out / "train-000000.tar", "ab") as shard:
        shard.truncate(1000)
    refused(path, out, says="not all of them")
    (out / "train-000000.tar").unlink()
    refused(path, out, says="not all of them")


def test_a_killed_run_starts_over(tmp_path):
    path, out = make_zip(tmp_path / "a.zip", scene_files()), tmp_path / "out"
    kill = "import os, ddae.data.shard_writer as w; w.write_manifest = lambda *a, **k: os.kill(os.getpid(), 9)"
    assert command(path, out, "--per_shard", "1", patch=kill).returncode == -9
    assert not out.exists()
    assert (tmp_path / "out.unfinished/train-000004.tar").exists()
    prepare(path, out, 3)
    assert sorted(p.name for p in out.glob("*.tar")) == ["train-000000.tar", "train-000001.tar", "val-000000.tar"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "out"]


@pytest.mark.parametrize(
    "mistake", ["no file", "folder", "text", "cut", "other zip", "images alone", "masks alone", "both"]
)
def test_a_file_that_is_not_ade20ks(mistake, tmp_path, refused):
    path, files = tmp_path / "a.zip", scene_files(2, 1)
    match mistake:
        case "no file":
            says = "No such file"
        case "folder":
            path.mkdir()
            says = "Is a directory"
        case "text":
            path.write_text("not a zip")
            says = "not a whole zip"
        case "cut":
            path.write_bytes(make_zip(path, files).read_bytes()[:-500])
            says = "not a whole zip"
        case "other zip":
            make_zip(path, {"images/cat.jpg": b"x", "README": b"y"})
            says = "holds 0 images"
        case "images alone":
            make_zip(path, {name: data for name, data in files.items() if "annotations" not in name})
            says = "masks of 0 kinds"
        case "masks alone":
            make_zip(path, {name: data for name, data in files.items() if "images" not in name})
            says = "holds 0 images"
        case "both":
            make_zip(path, files | full_files(FULL_ROOTS[0]))
            says = "masks of 2 kinds"
    assert len(refused(path, tmp_path / "out", says=says).splitlines()) == 1


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    done = command(tmp_path / "none.zip", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr == f"prepare_ade20k: {tmp_path}/none.zip: No such file or directory; nothing was made\n"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../evil.jpg", "a/../../evil.jpg", "/etc/evil", "..\\evil", "C:\\evil"])
def test_members_outside_of_a_folder(name, tmp_path, refused):
    path = make_zip(tmp_path / "a.zip", scene_files(1, 1) | {name: b"x"})
    refused(path, tmp_path / "out", says="lies outside")


def test_encrypted_and_huge_members(tmp_path, refused):
    name = f"{SCENE}/annotations/training/ADE_train_00000001.png"
    path = make_zip(tmp_path / "a.zip", scene_files(2, 1))
    change_header(path, name, 8, b"\x01\x00")
    refused(path, tmp_path / "out", says="is encrypted")
    make_zip(path, scene_files(2, 1))
    change_header(path, name, 24, struct.pack("<I", (1 << 28) + 1))
    refused(path, tmp_path / "out", says="larger than 256 MiB")


def test_not_one_image(tmp_path, refused):
    files = {name: b"broken" if name.endswith(".jpg") else data for name, data in scene_files(2, 1).items()}
    refused(make_zip(tmp_path / "a.zip", files), tmp_path / "out", says="not one image of 3 can be used: .*unreadable")


def test_no_space_left(tmp_path, refused, monkeypatch):
    """The disk is full at the second shard, half of which is written."""

    def fill(path, samples):
        if path.name.startswith("train"):
            return write_shard(path, samples)
        path.with_suffix(".tar.part").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = make_zip(tmp_path / "a.zip", scene_files(2, 1))
    monkeypatch.setattr(ade20k, "write_shard", fill)
    refused(path, tmp_path / "out", says="No space left")


def test_out_that_cannot_be_used(tmp_path, refused):
    path, out = make_zip(tmp_path / "a.zip", scene_files(2, 1)), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    refused(path, out, says="not an empty folder")
    refused(path, path, says="not an empty folder")
    refused(path, path / "below", says="Not a directory|File exists")
    (out / "manifest.json").write_text("[]")
    refused(path, out, says="holds other shards")
    refused(path, tmp_path / "new", "--per_shard", "0", says="at least one")
    assert (out / "thesis.tex").read_text() == "mine"


def test_progress_is_not_a_flood(tmp_path):
    """Standard error is no terminal here: a first and a last line, none between them within ten seconds."""
    slow = "import time, ddae.sharding.ade20k as a; f = a.convert; a.convert = lambda *x: time.sleep(0.05) or f(*x)"
    done = command(make_zip(tmp_path / "a.zip", scene_files(18, 2)), tmp_path / "out", patch=slow)
    assert "20/20" in done.stderr
    assert done.stderr.count("images/s]") == 2
    assert "out: 20 images" in done.stdout
