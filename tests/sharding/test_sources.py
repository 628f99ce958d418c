import hashlib
import io
import os
import re
import socket
import subprocess
import sys
import tarfile

import pytest
from conftest import picture
from image_archives import (
    LEAVES,
    WNIDS,
    class_folders,
    class_tars,
    contents,
    encode,
    imagenet,
    keys_of,
    labels_of,
    photo,
    read_samples,
    report_of,
    shard_imagenet,
    tar_of,
    tar_with,
    val_files,
    web_shards,
    write_devkit,
    write_folder,
    write_tar,
)

from ddae.data.manifest import read_manifest
from ddae.data.shard_writer import Sample, write_shard

CLASSES = imagenet()
TRUTH = [4, 1, 5, 3, 2, 3, 1, 4]  # ILSVRC2012_ID of each validation image
WNID_OF = {number: wnid for number, wnid, _ in LEAVES}
WORDS = {wnid: words for _, wnid, words in LEAVES}


def digest(data):
    return hashlib.sha256(data).hexdigest()


def expected(classes=CLASSES, names=None):
    """Return SHA-256 -> label; classes are numbered in the order of their names."""
    number = {wnid: i for i, wnid in enumerate(sorted(names or classes))}
    return {digest(data): number[wnid] for wnid, files in classes.items() for data in files.values()}


def expected_val(count=8):
    return {
        digest(data): WNIDS.index(WNID_OF[TRUTH[i]])
        for i, data in enumerate(list(val_files(len(TRUTH)).values())[:count])
    }


def keys(classes=CLASSES):
    return {name.rpartition(".")[0] for files in classes.values() for name in files}


def write_layout(layout, folder):
    """Write CLASSES in a layout. Return the value of --train."""
    match layout:
        case "tar of class tars":
            return write_tar(folder / "ILSVRC2012_img_train.tar", class_tars(CLASSES))
        case "tar of class tars in a folder":
            return write_tar(folder / "t.tar", {f"train/{k}": v for k, v in class_tars(CLASSES).items()})
        case "folder of class tars":
            return write_folder(folder / "train", class_tars(CLASSES))
        case "pattern of class tars":
            return write_folder(folder / "tars", class_tars(CLASSES)) / "n*.tar"
        case "tar of class folders":
            return write_tar(folder / "all.tar", class_folders(CLASSES))
        case "tar of class folders in folders":
            return write_tar(folder / "all.tar", {f"./data/train/{k}": v for k, v in class_folders(CLASSES).items()})
        case "class folders":
            return write_folder(folder / "train", class_folders(CLASSES))
        case "linked class folders":
            write_folder(folder / "real", class_folders(CLASSES))
            (folder / "train").mkdir()
            for wnid in CLASSES:
                (folder / "train" / wnid).symlink_to(folder / "real" / wnid)
            return folder / "train"


@pytest.mark.parametrize(
    "layout",
    ["tar of class tars", "tar of class tars in a folder", "folder of class tars", "pattern of class tars"]
    + ["tar of class folders", "tar of class folders in folders", "class folders", "linked class folders"],
)
def test_every_layout_gives_the_same_labels_and_keys(layout, tmp_path):
    assert shard_imagenet("--train", write_layout(layout, tmp_path), "--out", tmp_path / "out") == 0
    assert labels_of(tmp_path / "out") == expected()
    assert keys_of(tmp_path / "out") == keys()
    assert read_manifest(tmp_path / "out")["classes"] == WNIDS
    assert report_of(tmp_path / "out")["images"] == []


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("flat", ["tar", "tar with a folder", "folder"])
def test_train_and_val_in_one_run(packed, flat, tmp_path):
    train = write_tar(tmp_path / "ILSVRC2012_img_train.tar", class_tars(CLASSES))
    devkit = write_devkit(tmp_path / ("kit.tar.gz" if packed else "kit"), TRUTH, packed=packed)
    match flat:
        case "tar":
            val = write_tar(tmp_path / "ILSVRC2012_img_val.tar", val_files(8))
        case "tar with a folder":
            val = write_tar(tmp_path / "v.tar", {f"val/{name}": data for name, data in val_files(8).items()})
        case "folder":
            val = write_folder(tmp_path / "val", val_files(8))
    assert shard_imagenet("--train", train, "--val", val, "--devkit", devkit, "--out", tmp_path / "out") == 0
    assert labels_of(tmp_path / "out", "train") == expected()
    assert labels_of(tmp_path / "out", "val") == expected_val()
    assert keys_of(tmp_path / "out", "val") == {name.removesuffix(".JPEG") for name in val_files(8)}
    manifest = read_manifest(tmp_path / "out")
    assert manifest["classes"] == WNIDS
    assert manifest["class_words"] == WORDS
    assert list(manifest["class_words"]) == WNIDS


def test_val_alone_has_all_classes_of_the_devkit(tmp_path):
    val = write_tar(tmp_path / "ILSVRC2012_img_val.tar", val_files(2))
    devkit = write_devkit(tmp_path / "kit.tar.gz", TRUTH)
    assert shard_imagenet("--val", val, "--devkit", devkit, "--out", tmp_path / "out") == 0
    assert labels_of(tmp_path / "out") == expected_val(2)
    assert read_manifest(tmp_path / "out")["classes"] == WNIDS


def test_val_with_fewer_classes_uses_the_numbers_of_training(tmp_path):
    train = write_folder(tmp_path / "train", class_folders(CLASSES))
    some = {wnid: {f"v_{name}": photo(700 + i) for i, name in enumerate(CLASSES[wnid])} for wnid in WNIDS[3:4]}
    val = write_folder(tmp_path / "val", class_folders(some))
    assert shard_imagenet("--train", train, "--val", val, "--out", tmp_path / "out") == 0
    assert set(labels_of(tmp_path / "out", "val").values()) == {3}


@pytest.mark.parametrize("form", ["cls", "json"])
def test_webdataset_shards_keep_labels_and_keys(form, tmp_path):
    samples = [(f"n0_{i:03d}", photo(i), i * 7 % 5) for i in range(20)]
    shards = web_shards(tmp_path / "theirs", samples, form)
    assert shard_imagenet("--train", shards / "imagenet-train-{0000..0002}.tar", "--out", tmp_path / "out") == 0
    assert labels_of(tmp_path / "out") == {digest(data): label for _, data, label in samples}
    assert keys_of(tmp_path / "out") == {key for key, _, _ in samples}
    assert report_of(tmp_path / "out")["images"] == []


def test_own_shards_can_be_sharded_again(tmp_path):
    devkit = write_devkit(tmp_path / "kit.tar.gz", TRUTH)
    val = write_tar(tmp_path / "val.tar", val_files(8))
    train = write_folder(tmp_path / "train", class_folders(CLASSES))
    first, again = tmp_path / "first", tmp_path / "again"
    assert shard_imagenet("--train", train, "--val", val, "--devkit", devkit, "--out", first) == 0
    assert shard_imagenet("--train", first, "--val", first, "--seed", 5, "--max_count", 3, "--out", again) == 0
    for split in ("train", "val"):
        assert labels_of(again, split) == labels_of(first, split)
        assert keys_of(again, split) == keys_of(first, split)
    assert read_manifest(again)["classes"] == WNIDS


def test_masks_are_skipped(tmp_path):
    samples = [Sample(f"s{i}", photo(i), None, 8, 8, mask=encode(picture(i).convert("L"), "PNG")) for i in range(4)]
    write_shard(tmp_path / "train-000000.tar", samples)
    assert shard_imagenet("--train", tmp_path / "train-000000.tar", "--out", tmp_path / "out") == 0
    assert keys_of(tmp_path / "out") == {f"s{i}" for i in range(4)}
    masks = {"count": 4, "first": [f"train-000000.tar/s{i}.png" for i in range(4)]}
    assert report_of(tmp_path / "out")["other_files"] == {"masks or other fields of samples": masks}


def test_output_inside_the_source_is_rejected(tmp_path, capsys):
    source = write_folder(tmp_path / "in", {f"{i}.jpg": photo(i) for i in range(3)})
    assert shard_imagenet("--train", source, "--out", source / "shards") == 2
    assert "inside it. Pass another folder" in capsys.readouterr().err
    assert not (source / "shards").exists()


def test_one_folder_with_shards_of_both_splits(tmp_path):
    """As in timm, where train and validation shards are in one folder."""
    train = [(f"t{i}", photo(i), i % 3) for i in range(8)]
    val = [(f"v{i}", photo(50 + i), i % 3) for i in range(8)]
    folder = web_shards(web_shards(tmp_path / "both", train, "cls"), val, "cls", "validation")
    assert shard_imagenet("--train", folder, "--val", folder, "--out", tmp_path / "out") == 0
    assert keys_of(tmp_path / "out", "train") == {f"t{i}" for i in range(8)}
    assert keys_of(tmp_path / "out", "val") == {f"v{i}" for i in range(8)}


@pytest.mark.parametrize("form", ["folder", "tar", "shards"])
def test_images_without_classes_have_no_labels(form, tmp_path):
    files = {f"{i}.jpg": photo(i) for i in range(9)}
    match form:
        case "folder":
            location = write_folder(tmp_path / "flat", files)
        case "tar":
            location = write_tar(tmp_path / "flat.tar", files)
        case "shards":
            write_tar(tmp_path / "flat-000.tar", dict(list(files.items())[:5]))
            write_tar(tmp_path / "flat-001.tar", dict(list(files.items())[5:]))
            location = tmp_path / "flat-{000..001}.tar"
    assert shard_imagenet("--train", location, "--out", tmp_path / "out") == 0
    assert labels_of(tmp_path / "out") == {digest(data): None for data in files.values()}
    for shard in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(shard) as archive:
            assert {name.partition(".")[2] for name in archive.getnames()} == {"jpg"}
    assert read_manifest(tmp_path / "out")["classes"] == []


SIMILAR_NAMES = {
    "images named alike": {"cat/1.jpg": photo(1), "dog/1.jpg": photo(2), "cat/2.jpg": photo(3), "dog/2.jpg": photo(4)},
    "numbers": {f"{group}/{i}.jpg": photo(1000 * group + i) for group in (1, 2, 12) for i in (1, 2, 12, 122)},
    "underscores": {"a/b_c.jpg": photo(1), "a_b/c.jpg": photo(2)},
    "punctuation": {"a/x y.jpg": photo(1), "a/x_y.jpg": photo(2), "a/x.y.jpg": photo(3), "b/é.jpg": photo(4)},
}


@pytest.mark.parametrize("form", ["folder", "tar", "class tars"])
@pytest.mark.parametrize("names", SIMILAR_NAMES)
def test_different_paths_are_not_duplicates(names, form, tmp_path):
    files = SIMILAR_NAMES[names]
    if form == "folder":
        location = write_folder(tmp_path / "in", files)
    elif form == "tar":
        location = write_tar(tmp_path / "in.tar", files)
    else:
        groups = {}
        for path, data in files.items():
            group, _, name = path.partition("/")
            groups.setdefault(group, {})[name] = data
        location = write_tar(tmp_path / "in.tar", class_tars(groups))
    assert shard_imagenet("--train", location, "--on_bad", "stop", "--out", tmp_path / "out") == 0
    number = {group: i for i, group in enumerate(sorted({path.partition("/")[0] for path in files}))}
    assert labels_of(tmp_path / "out") == {digest(data): number[path.partition("/")[0]] for path, data in files.items()}
    assert report_of(tmp_path / "out")["images"] == []


UNUSUAL_NAMES = [
    "with space.jpg",
    "größe.jpg",
    "犬.JPEG",
    "dots.in.the.name.jpeg",
    "y" * 240 + "1.jpg",
    "y" * 240 + "2.jpg",
    "a'quote\".jpg",
    "new\nline.jpg",
    "-dash.jpg",
    "UPPER.JPG",
    "plain.jpg",
    os.fsdecode(b"caf\xe9.jpg"),
]


@pytest.mark.parametrize("form", ["folder", "tar", "class tars"])
def test_unusual_file_names(form, tmp_path):
    files = {name: photo(i) for i, name in enumerate(UNUSUAL_NAMES)}
    if form == "folder":
        location = write_folder(tmp_path / "in", {f"die Klasse ü/{name}": data for name, data in files.items()})
        write_folder(location, {"other/plain.jpg": photo(99)})
    elif form == "tar":
        paths = {f"die Klasse ü/{name}": data for name, data in files.items()}
        location = write_tar(tmp_path / "in.tar", paths | {"other/plain2.jpg": photo(99)})
    else:
        location = write_tar(
            tmp_path / "in.tar", class_tars({"die Klasse ü": files, "other": {"plain2.jpg": photo(99)}})
        )
    assert shard_imagenet("--train", location, "--out", tmp_path / "out") == 0
    assert labels_of(tmp_path / "out") == {digest(data): 0 for data in files.values()} | {digest(photo(99)): 1}
    assert len(keys_of(tmp_path / "out")) == len(files) + 1
    assert all(key.isascii() and "." not in key and len(key) <= 90 for key in keys_of(tmp_path / "out"))
    assert report_of(tmp_path / "out")["images"] == []
    assert (tmp_path / "out" / "report.txt").read_text().startswith("13 images found = 13 written unchanged")
    for shard in (tmp_path / "out").glob("*.tar"):  # no name needs a second header
        with tarfile.open(shard) as archive:
            assert all(member.offset_data - member.offset == 512 for member in archive)


OTHER_FILES = {
    "README.txt": b"read me",
    ".DS_Store": b"\0",
    "._a.jpg": b"AppleDouble",
    "archive.zip": b"PK",
    "no_ending": b"x",
    os.fsdecode(b"caf\xe9.txt"): b"Latin-1 name",
}


@pytest.mark.parametrize("form", ["folder", "tar", "class tars"])
def test_files_that_are_not_images_are_skipped_and_listed(form, tmp_path):
    others = {f"{WNIDS[0]}/{name}": data for name, data in OTHER_FILES.items()}
    classes = {wnid: {**OTHER_FILES, **files} for wnid, files in CLASSES.items()}
    if form == "folder":
        location = write_folder(
            tmp_path / "in", {**class_folders(CLASSES), **others, "LICENSE": b"x", ".hidden/a.txt": b"y"}
        )
    elif form == "tar":
        location = write_tar(tmp_path / "in.tar", {"LICENSE": b"x", **others, **class_folders(CLASSES)})
    else:
        location = write_tar(tmp_path / "in.tar", {"LICENSE": b"x", **class_tars(classes)})
    assert shard_imagenet("--train", location, "--out", tmp_path / "out") == 0
    assert labels_of(tmp_path / "out") == expected()
    listed = [name for reason in report_of(tmp_path / "out")["other_files"].values() for name in reason["first"]]
    for name in ["LICENSE", *OTHER_FILES]:
        assert any(line.endswith(name) for line in listed), name
    assert "README.txt" in (tmp_path / "out" / "report.txt").read_text()


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_apple_double_file_of_a_class_tar_is_skipped(form, tmp_path):
    tars = {**class_tars(CLASSES), f"._{WNIDS[0]}.tar": b"\0\5\x16\7 AppleDouble"}
    location = write_folder(tmp_path / "train", tars) if form == "folder" else write_tar(tmp_path / "all.tar", tars)
    assert shard_imagenet("--train", location, "--out", tmp_path / "out") == 0
    assert labels_of(tmp_path / "out") == expected()


def test_a_class_named_after_a_split_is_a_class(tmp_path):
    classes = {"bullet_train": {"a.jpg": photo(1)}, "oval": {"b.jpg": photo(2)}, "dog": {"c.jpg": photo(3)}}
    folder = write_folder(tmp_path / "tars", class_tars(classes))
    assert shard_imagenet("--train", folder, "--out", tmp_path / "out") == 0
    assert labels_of(tmp_path / "out") == expected(classes)


def test_a_json_beside_class_folders_does_not_hide_the_classes(tmp_path):
    location = write_tar(tmp_path / "in.tar", {"dataset.json": b'{"name": "mine"}', **class_folders(CLASSES)})
    assert shard_imagenet("--train", location, "--out", tmp_path / "out") == 0
    assert labels_of(tmp_path / "out") == expected()


def test_the_report_is_bounded(tmp_path):
    files = {f"{i}.txt": b"x" for i in range(3000)} | {f".{i}": b"x" for i in range(50)}
    location = write_tar(tmp_path / "in.tar", {**class_folders(CLASSES), **files})
    assert shard_imagenet("--train", location, "--out", tmp_path / "out") == 0
    other = report_of(tmp_path / "out")["other_files"]
    assert {reason: entry["count"] for reason, entry in other.items()} == {
        ".txt files": 3000,
        "hidden or system files": 50,
    }
    assert all(len(entry["first"]) == 20 for entry in other.values())
    assert "and 2,980 more" in (tmp_path / "out" / "report.txt").read_text()


@pytest.mark.parametrize("form", ["folder", "file"])
def test_the_command_that_converts_parquet_works(form, tmp_path, capsys, monkeypatch):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = [{"image": {"bytes": photo(i), "path": f"{i}.jpg"}, "label": i % 3} for i in range(9)]
    (tmp_path / "data").mkdir()
    for part in range(3):
        pq.write_table(pa.Table.from_pylist(rows[part::3]), tmp_path / "data" / f"train-0000{part}.parquet")
    location = tmp_path / "data" if form == "folder" else tmp_path / "data" / "train-00001.parquet"
    assert shard_imagenet("--train", location, "--out", tmp_path / "out") == 2
    command = capsys.readouterr().err.partition("Convert them: ")[2]
    monkeypatch.chdir(tmp_path)
    subprocess.run(command.replace("python ", f"{sys.executable} ", 1), shell=True, check=True)
    assert shard_imagenet("--train", "images.tar", "--out", tmp_path / "out") == 0
    converted = rows if form == "folder" else rows[1::3]
    assert labels_of(tmp_path / "out") == {digest(row["image"]["bytes"]): row["label"] for row in converted}


def test_sockets_and_pipes_are_skipped(tmp_path, monkeypatch):
    location = write_folder(tmp_path / "in", class_folders(CLASSES))
    os.mkfifo(location / WNIDS[0] / "pipe.jpg")
    monkeypatch.chdir(location / WNIDS[0])  # the length of a socket's path is limited
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
        assert shard_imagenet("--train", location, "--out", tmp_path / "out") == 0
    assert labels_of(tmp_path / "out") == expected()


def invalid_args(kind, folder):
    """Return invalid arguments and a part of the expected error message."""
    train = ["--train", folder / "in.tar"]
    archive = tar_of(class_tars(CLASSES))
    flat = {f"{i}.jpg": photo(i) for i in range(6)}
    match kind:
        case "no source":
            return [], "neither --train nor --val"
        case "missing":
            return ["--train", folder / "nowhere.tar"], "does not exist"
        case "missing in a range":
            write_tar(folder / "a-000.tar", flat)
            return ["--train", folder / "a-{000..001}.tar"], "does not exist"
        case "not a tar":
            (folder / "in.tar").write_bytes(photo(1) * 3)
            return train, "cannot be read as a tar"
        case "empty file":
            (folder / "in.tar").write_bytes(b"")
            return train, "cannot be read as a tar"
        case "cut gzip":
            (folder / "in.tar").write_bytes(tar_of(flat, "w:gz")[:-2000])
            return train, "cannot be read as a tar"
        case "cut outer":
            (folder / "in.tar").write_bytes(archive[: len(archive) * 6 // 10])
            return train, "cannot be read as a tar"
        case "cut outer after a member":
            first = tarfile.open(fileobj=io.BytesIO(archive)).getmembers()[1]  # noqa: SIM115
            (folder / "in.tar").write_bytes(archive[: first.offset])
            return train, "cannot be read as a tar"
        case "cut inner":
            tars = class_tars(CLASSES)
            tars[f"{WNIDS[1]}.tar"] = tars[f"{WNIDS[1]}.tar"][:5000]
            write_tar(folder / "in.tar", tars)
            return train, "cannot be read as a tar"
        case "cut inner after a member":
            inner = class_tars(CLASSES)[f"{WNIDS[1]}.tar"]
            first = tarfile.open(fileobj=io.BytesIO(inner)).getmembers()[1]  # noqa: SIM115
            write_tar(folder / "in.tar", class_tars(CLASSES) | {f"{WNIDS[1]}.tar": inner[: first.offset]})
            return train, "cannot be read as a tar"
        case "broken header" | "broken inner header" | "zeroed header":
            data = bytearray(archive if kind != "broken inner header" else tar_of(flat))
            second = tarfile.open(fileobj=io.BytesIO(bytes(data))).getmembers()[2].offset  # noqa: SIM115
            if kind == "zeroed header":
                data[second : second + 512] = bytes(512)
            else:
                data[second + 3] ^= 0x20
            (folder / "in.tar").write_bytes(bytes(data) if kind != "broken inner header" else tar_of({"a.tar": data}))
            return train, "cannot be read as a tar"
        case "tar of text":
            write_tar(folder / "in.tar", {"a.txt": b"a", "b/c.txt": b"c"})
            return train, "contains no image"
        case "empty tar":
            (folder / "in.tar").write_bytes(tar_of({}))
            return train, "in.tar"
        case "empty folder":
            (folder / "in").mkdir()
            return ["--train", folder / "in"], "contains no image"
        case "folder of empty folders":
            (folder / "in" / "a").mkdir(parents=True)
            return ["--train", folder / "in"], "contains no image"
        case "splits beside other folders":
            write_folder(folder / "in", {f"{name}/a/{name}.jpg": photo(1) for name in ("train", "val", "more")})
            return ["--train", folder / "in"], "Pass each split's folder with --train or --val"
        case "another split":
            write_folder(folder / "in", {f"{split}/a/{i}.jpg": photo(i) for i, split in enumerate(("train", "test"))})
            return ["--val", folder / "in"], "has folders for test, train, none for val"
        case "loose images beside folders":
            write_folder(folder / "in", {"a/1.jpg": photo(1), "2.jpg": photo(2)})
            return ["--train", folder / "in"], "contains both images"
        case "loose images beside folders in a tar":
            write_tar(folder / "in.tar", {"a/1.jpg": photo(1), "b/3.jpg": photo(3), "2.jpg": photo(2)})
            return train, "contains both images"
        case "pipe":
            return ["--train", f"pipe:touch {folder / 'ran'}"], "would run a command"
        case "path upwards":
            write_tar(folder / "in.tar", {"a/1.jpg": photo(1), "a/../../2.jpg": photo(2)})
            return train, "a path outside its folder"
        case "absolute path":
            write_tar(folder / "in.tar", {"1.jpg": photo(1), str(folder / "2.jpg"): photo(2)})
            return train, "a path outside its folder"
        case "path upwards in a class tar":
            write_tar(folder / "in.tar", class_tars({"a": {"1.jpg": photo(1), "../2.jpg": photo(2)}}))
            return train, "a path outside its folder"
        case "symlink" | "hard link" | "character device" | "block device" | "fifo":
            kinds = {"symlink": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "fifo": tarfile.FIFOTYPE}
            kinds |= {"character device": tarfile.CHRTYPE, "block device": tarfile.BLKTYPE}
            tar_with(folder / "in.tar", "second.jpg", kinds[kind], "/etc/passwd" if kind == "symlink" else "first.jpg")
            return train, "a link or a device"
        case "label outside":
            write_folder(folder / "train", class_folders(CLASSES))
            web_shards(folder / "val", [(f"v{i}", photo(i), i) for i in range(6)], "cls", "val")
            return ["--train", folder / "train", "--val", folder / "val"], "has label 5"
        case "negative label":
            web_shards(folder / "in", [(f"v{i}", photo(i), i - 1) for i in range(6)], "json")
            return ["--train", folder / "in"], "has label -1"
        case "huge label":
            web_shards(folder / "in", [(f"v{i}", photo(i), 10**i) for i in range(14)], "cls")
            return ["--train", folder / "in"], "label"
        case "label is not a number":
            web_shards(folder / "in", [(f"v{i}", photo(i), WNIDS[i % 5]) for i in range(6)], "cls")
            return ["--train", folder / "in"], "label"
        case "infinite label":
            web_shards(folder / "in", [(f"v{i}", photo(i), "Infinity") for i in range(6)], "cls")
            return ["--train", folder / "in"], "label"
        case "one without a label":
            write_tar(folder / "in.tar", {"a.jpg": photo(1), "a.cls": b"1", "b.jpg": photo(2)})
            return train, "has no label"
        case "another list of classes":
            write_folder(folder / "cats", {"cat/1.jpg": photo(1), "dog/2.jpg": photo(2)})
            write_folder(folder / "others", {"bee/3.jpg": photo(3), "cat/4.jpg": photo(4)})
            assert shard_imagenet("--val", folder / "others", "--out", folder / "val") == 0
            return ["--train", folder / "cats", "--val", folder / "val"], "class"
        case "names beside numbers":
            web_shards(folder / "in", [(f"t{i}", photo(i), i) for i in range(5)], "cls")
            write_folder(folder / "val", {"zebra/1.jpg": photo(8), "yak/2.jpg": photo(9)})
            return ["--train", folder / "in", "--val", folder / "val"], "class"
        case "out is a file":
            write_tar(folder / "in.tar", flat)
            (folder / "out").write_text("mine")
            return train, "is a file"
        case "stray tars":
            write_tar(folder / "in.tar", flat)
            write_tar(folder / "out" / "mine.tar", flat)
            return train, "contains tars without"
        case "another seed" | "another source":
            write_tar(folder / "in.tar", flat)
            write_tar(folder / "else.tar", {"else.jpg": photo(9)})
            assert shard_imagenet(*train, "--out", folder / "out") == 0
            more = ["--seed", 1] if kind == "another seed" else ["--train", folder / "else.tar"]
            return [*train, *more], "seed 0, not 1" if more[0] == "--seed" else "another source"
        case "another format":
            write_tar(folder / "in.tar", flat)
            write_folder(folder / "out", {"manifest.json": b'{"format": "else", "settings": 3}'})
            return train, "contains shards made with another"
        case "out within a file":
            write_tar(folder / "in.tar", flat)
            (folder / "file").write_text("mine")
            return [*train, "--out", folder / "file" / "out"], "cannot be written"
        case "bad number":
            write_tar(folder / "in.tar", flat)
            return [*train, "--max_count", 0], "--max_count is 0"
        case "nothing usable":
            write_tar(folder / "in.tar", {"a.jpg": photo(1)[:-9], "b.jpg": b""})
            return train, "none of the 2 images is usable"
    raise AssertionError(kind)


def invalid_devkit_args(kind, folder):
    val = write_tar(folder / "ILSVRC2012_img_val.tar", val_files(8))
    kit = folder / "kit.tar.gz"
    args = ["--val", val, "--devkit", kit]
    train = ["--train", folder / "train"]
    match kind:
        case "not given":
            write_folder(folder / "train", class_folders(CLASSES))
            return [*train, "--val", val], "--devkit"
        case "missing":
            return args, "cannot be read"
        case "not a tar":
            kit.write_bytes(b"else" * 999)
            return args, "cannot be read"
        case "cut":
            write_devkit(kit, TRUTH)
            kit.write_bytes(kit.read_bytes()[:-300])
            return args, "kit.tar.gz"
        case "no meta.mat":
            kit.write_bytes(tar_of({"kit/data/ILSVRC2012_validation_ground_truth.txt": b"1\n"}, "w:gz"))
            return args, "does not contain data/meta.mat"
        case "empty folder":
            kit.mkdir()
            return args, "does not contain data/meta.mat"
        case "broken meta.mat":
            files = {"data/meta.mat": b"MATLAB" * 99, "data/ILSVRC2012_validation_ground_truth.txt": b"1\n"}
            kit.write_bytes(tar_of(files, "w:gz"))
            return args, "cannot be read"
        case "inner node as ground truth":
            write_devkit(kit, [1, 2, 6])
            return args, "contains class '6', outside meta.mat's 5 classes"
        case "text as ground truth":
            write_devkit(kit, ["one", "two"])
            return args, "outside meta.mat's 5 classes"
        case "non-decimal digits as ground truth":
            write_devkit(kit, ["²"])
            return args, "outside meta.mat's 5 classes"
        case "empty ground truth":
            write_devkit(kit, [])
            return args, "outside meta.mat's 5 classes"
        case "too few":
            write_devkit(kit, TRUTH[:7])
            return args, "not one of the devkit's 7 validation images"
        case "file name without number":
            write_devkit(kit, TRUTH)
            write_tar(val, {"ILSVRC2012_val_00000001.JPEG": photo(1), "one.JPEG": photo(2)})
            return args, "not one of the devkit's"
        case "class that training lacks":
            write_devkit(kit, TRUTH)
            write_folder(folder / "train", class_folders({wnid: CLASSES[wnid] for wnid in WNIDS[:4]}))
            return [*train, *args], f"has class '{WNIDS[4]}', which is not among the 4 classes of training"


def assert_rejected(args, message, folder, capsys):
    """Check for exit code 2, one error line, and no change on disk."""
    before = contents(folder)
    capsys.readouterr()
    assert shard_imagenet("--out", folder / "out", *args) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "images/s" not in line]
    lines = [line for line in errors if line.strip() and not re.match(r"\s*\d+%\|", line)]  # without progress bars
    assert len(lines) == 1, errors
    assert lines[0].startswith("shard_imagenet: ")
    assert message in lines[0]
    assert contents(folder).keys() == before.keys()
    assert contents(folder) == before


INVALID = """
no source,missing,missing in a range,not a tar,empty file,cut gzip,cut outer,cut outer after a member,
cut inner,cut inner after a member,broken header,broken inner header,zeroed header,tar of text,empty tar,empty folder,
folder of empty folders,splits beside other folders,another split,
loose images beside folders,loose images beside folders in a tar,pipe,path upwards,
absolute path,path upwards in a class tar,symlink,hard link,character device,block device,fifo,label outside,
negative label,huge label,label is not a number,infinite label,one without a label,another list of classes,
names beside numbers,
out is a file,stray tars,another seed,another source,another format,out within a file,bad number,nothing usable"""


@pytest.mark.parametrize("kind", [kind.strip() for kind in INVALID.split(",")])
def test_invalid_arguments_are_one_error_line_and_write_nothing(kind, tmp_path, capsys):
    assert_rejected(*invalid_args(kind, tmp_path), tmp_path, capsys)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "kind",
    ["not given", "missing", "not a tar", "cut", "no meta.mat", "empty folder", "broken meta.mat"]
    + [
        "inner node as ground truth",
        "text as ground truth",
        "non-decimal digits as ground truth",
        "empty ground truth",
        "too few",
        "file name without number",
    ]
    + ["class that training lacks"],
)
def test_invalid_devkit_is_one_error_line(kind, tmp_path, capsys):
    assert_rejected(*invalid_devkit_args(kind, tmp_path), tmp_path, capsys)


def test_empty_output_folder_stays_empty_after_an_error(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    write_tar(tmp_path / "in.tar", {f"{i}.jpg": photo(i)[:-9] for i in range(3)})
    assert_rejected(["--train", tmp_path / "in.tar", "--on_bad", "stop"], "truncated", tmp_path, capsys)


def test_second_run_finds_complete_shards(tmp_path, capsys):
    args = ["--train", write_layout("class folders", tmp_path), "--out", tmp_path / "out"]
    assert shard_imagenet(*args) == 0
    before = contents(tmp_path)
    capsys.readouterr()
    assert shard_imagenet(*args) == 0
    assert "is complete" in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_changed_source_is_rejected(tmp_path, capsys):
    location = write_layout("class folders", tmp_path)
    assert shard_imagenet("--train", location, "--out", tmp_path / "out") == 0
    write_folder(location, {f"{WNIDS[0]}/more.jpg": photo(77)})
    assert_rejected(["--train", location], "another source", tmp_path, capsys)


def test_read_samples(tmp_path):
    """Check the test helper."""
    assert shard_imagenet("--train", write_layout("class folders", tmp_path), "--out", tmp_path / "out") == 0
    assert len(read_samples(tmp_path / "out")) == 20
