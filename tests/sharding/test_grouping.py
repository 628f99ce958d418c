"""Samples and labels of webdataset archives: grouping by key, label files, and what is refused."""

import hashlib
import json

import pytest
from image_archives import (
    WNIDS,
    labels_of,
    photo,
    report_of,
    shard_imagenet,
    tar_of,
    write_devkit,
    write_tar,
)
from test_archives import rejected

from ddae.data.manifest import read_manifest
from ddae.sharding.scan import LabelRule
from ddae.sharding.sources import build_index


def digest(number):
    return hashlib.sha256(photo(number)).hexdigest()


def in_tar(folder, files):
    return ["--train", write_tar(folder / "in.tar", files), "--out", folder / "out"]


def scan(folder, files, **rule):
    """Return the index of a tar of these files, and SHA-256 -> label, None without one."""
    index = build_index("train", str(write_tar(folder / "in.tar", files)), rule=LabelRule(**rule))
    labels = (None if label < 0 else label for label in index.label.tolist())
    return index, {hashlib.sha256(index.read(i)).hexdigest(): label for i, label in enumerate(labels)}


def labelled(count, image="{}.jpg", label="{}.cls"):
    """Return images and label files with the labels 0, 1, 2, 0, ..."""
    files = {}
    for i in range(count):
        files |= {image.format(i): photo(i), label.format(i): b"%d" % (i % 3)}
    return files


def expected(count):
    return {digest(i): i % 3 for i in range(count)}


GROUPED = {
    "one folder": ("{}.jpg", "{}.cls"),
    "folders": ("a{}/x.jpg", "a{}/x.cls"),
    "keys with dots": ("img.{}.jpg", "img.{}.cls"),
    "more dots": ("2024.10.{}.jpg", "2024.10.{}.cls"),
    "a field before the ending": ("{}.image.jpg", "{}.label.cls"),
    "upper case": ("{}.JPG", "{}.CLS"),
    "a PNG": ("{}.png", "{}.Cls"),
}


@pytest.mark.parametrize("names", GROUPED)
@pytest.mark.parametrize("order", ["as written", "labels last", "labels first", "reversed"])
def test_labels_belong_to_images_by_key(names, order, tmp_path):
    files = labelled(20, *GROUPED[names])
    paths = list(files)
    match order:
        case "labels last":
            paths.sort(key=lambda path: path.lower().endswith("cls"))
        case "labels first":
            paths.sort(key=lambda path: not path.lower().endswith("cls"))
        case "reversed":
            paths.reverse()
    index, found = scan(tmp_path, {path: files[path] for path in paths})
    assert found == expected(20)
    assert index.tally.other_files.counts["label files"] == 20


def test_the_same_keys_in_two_shards_are_different_samples(tmp_path):
    write_tar(tmp_path / "in" / "a-000.tar", {"0.jpg": photo(0), "0.cls": b"0"})
    write_tar(tmp_path / "in" / "a-001.tar", {"0.jpg": photo(1), "0.cls": b"1"})
    assert shard_imagenet("--train", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert labels_of(tmp_path / "out") == {digest(0): 0, digest(1): 1}


LABELS = {  # content -> class number, or what the error contains
    "7": 7,
    " 7\n": 7,
    "007": 7,
    "7.0": 7,
    "7.9": "the label 7.9",
    "true": "the label true",
    "[3]": "the label [3]",
    "": 'the label ""',
    "Infinity": "the label Infinity",
    "tench": "the label 'tench'",
    "-1": "label -1",
    "99999999999999999999": "label 99999999999999999999",
}


@pytest.mark.parametrize("form", ["cls", "json"])
@pytest.mark.parametrize("text", LABELS)
def test_a_label_is_a_class_number_or_refused_with_its_key(text, form, tmp_path, capsys):
    content = text
    if form == "json":
        is_json = text.strip() not in ("007", "", "tench")
        content = '{"caption": "x", "label": %s}' % (text if is_json else json.dumps(text))
    files = {"n/a.jpg": photo(0), f"n/a.{form}": content.encode()}
    if isinstance(LABELS[text], int):
        assert scan(tmp_path, files)[1] == {digest(0): LABELS[text]}
    else:
        message = rejected(capsys, *in_tar(tmp_path, files))
        assert LABELS[text] in message
        assert "n/a" in message
        assert scan(tmp_path, files, labels="none")[1] == {digest(0): None}


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"not JSON"])
def test_a_json_file_that_is_none_is_refused(content, tmp_path, capsys):
    message = rejected(capsys, *in_tar(tmp_path, {"a.jpg": photo(0), "a.json": content}))
    assert "has the label not JSON in a.json" in message


def test_metadata_without_a_label_is_no_label(tmp_path):
    """As in img2dataset's shards."""
    files = {"0.jpg": photo(0), "0.json": b'{"caption": "x", "key": "0"}', "0.txt": b"x", "1.jpg": photo(1)}
    assert scan(tmp_path, files)[1] == {digest(0): None, digest(1): None}


def synsets(count, form="json"):
    """Return images whose labels are WordNet ids."""
    files = {}
    for i in range(count):
        name = WNIDS[i % 5]
        files |= {
            f"{i}.jpg": photo(i),
            f"{i}.{form}": name.encode() if form == "cls" else b'{"label": "%s"}' % name.encode(),
        }
    return files


@pytest.mark.parametrize("form", ["json", "cls"])
def test_names_as_labels(form, tmp_path, capsys):
    args = in_tar(tmp_path, synsets(10, form))
    assert f"has the label '{WNIDS[0]}'" in rejected(capsys, *args)
    assert shard_imagenet(*args, "--classes", "label") == 0
    assert labels_of(tmp_path / "out") == {digest(i): i % 5 for i in range(10)}
    assert read_manifest(tmp_path / "out")["classes"] == WNIDS


def test_names_of_the_devkit_are_known(tmp_path):
    val = [
        "--val",
        write_tar(tmp_path / "val.tar", synsets(10)),
        "--devkit",
        write_devkit(tmp_path / "kit.tar.gz", [1, 2]),
    ]
    assert shard_imagenet(*val, "--out", tmp_path / "out") == 0
    assert labels_of(tmp_path / "out") == {digest(i): i % 5 for i in range(10)}


def test_a_name_that_training_lacks_is_refused(tmp_path, capsys):
    train = {f"{name}/{name}.jpg": photo(50 + i) for i, name in enumerate(WNIDS[:4])}
    args = ["--train", write_tar(tmp_path / "train.tar", train), "--val", write_tar(tmp_path / "val.tar", synsets(10))]
    message = rejected(capsys, *args, "--out", tmp_path / "out")
    assert f"val.tar: 4.jpg has class '{WNIDS[4]}', which is not among the 4 classes of training" in message


def test_numbers_beside_names_are_refused(tmp_path, capsys):
    files = {"a.jpg": photo(0), "a.cls": b"0", "b.jpg": photo(1), "b.cls": b"cat"}
    message = rejected(capsys, *in_tar(tmp_path, files), "--classes", "label")
    assert "has class numbers (0) and class names ('cat')" in message


MASKS = {
    "a PNG beside a JPEG": {"x.jpg": photo(0), "x.png": photo(9)},
    "a field": {"x.png": photo(0), "x.seg.png": photo(9)},
    "several fields": {"x.jpg": photo(0), "x.seg.png": photo(9), "x.depth.png": photo(8)},
    "the field first": {"x.mask0.png": photo(9), "x.webp": photo(0)},
}


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("kind", MASKS)
def test_masks_are_no_photos(kind, with_labels, tmp_path):
    files = {**MASKS[kind], **({"x.cls": b"3"} if with_labels else {})}
    index, labels = scan(tmp_path, files)
    assert labels == {digest(0): 3 if with_labels else None}
    assert index.key_of(0) == "x"
    assert index.tally.other_files.counts["masks or other fields of samples"] == len(MASKS[kind]) - 1


def test_photos_with_dots_in_their_names_are_photos(tmp_path):
    files = {f"Screenshot 2024.10.{i}.jpg": photo(i) for i in range(5)} | {"IMG.jpg": photo(5), "IMG.1.jpg": photo(6)}
    assert set(scan(tmp_path, files)[1]) == {digest(i) for i in range(7)}


AMBIGUOUS = {
    "one label for two images": ({"img.1.jpg": photo(0), "img.2.jpg": photo(1), "img.cls": b"1"}, "img has 2 images"),
    "a label missing": ({"img.1.jpg": photo(0), "img.2.jpg": photo(1), "img.2.cls": b"1"}, "img has 2 images"),
    "two images of one name": ({"a/x.jpg": photo(0), "a/x.jpeg": photo(1), "a/x.cls": b"1"}, "a/x has several images"),
    "two labels": ({"x.jpg": photo(0), "x.cls": b"1", "x.json": b'{"label": 2}'}, "x has two labels, 1 (x.cls) and 2"),
    "two labels in other case": ({"x.jpg": photo(0), "x.cls": b"1", "x.CLS": b"2"}, "x has two labels"),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_what_is_not_clear_is_refused_with_the_key(kind, tmp_path, capsys):
    files, message = AMBIGUOUS[kind]
    assert message in rejected(capsys, *in_tar(tmp_path, files))
    assert not (tmp_path / "out").exists()


def test_labels_that_agree_are_one(tmp_path):
    files = {"x.jpg": photo(0), "x.cls": b"2", "x.json": b'{"label": 2, "width": 8}'}
    assert scan(tmp_path, files)[1] == {digest(0): 2}


def test_of_files_with_the_same_name_the_last_one_counts(tmp_path):
    """As in a tar that is unpacked."""
    old, new = (
        tar_of({"x.jpg": photo(0), "x.cls": b"0", "y.jpg": photo(1), "y.cls": b"1"}),
        {"x.jpg": photo(2), "x.cls": b"2"},
    )
    (tmp_path / "in.tar").write_bytes(old + tar_of(new))
    assert shard_imagenet("--train", tmp_path / "in.tar", "--out", tmp_path / "out") == 0
    assert labels_of(tmp_path / "out") == {digest(1): 1, digest(2): 2}
    report = report_of(tmp_path / "out")
    assert report["left_out"]["replaced by a later file of the same name"] == {"count": 1, "first": ["in.tar/x.jpg"]}
    assert report["found"] == report["written"] + 1 == 3


def test_label_files_without_an_image_are_counted(tmp_path):
    files = {**labelled(3), "9.cls": b"1", "dataset.json": b'{"name": "mine"}'}
    other_files = scan(tmp_path, files)[0].tally.other_files
    assert other_files.counts["label files without an image"] == 2
    assert other_files.names["label files without an image"] == ["9.cls", "dataset.json"]


def test_a_label_without_an_image_does_not_hide_the_classes_of_folders(tmp_path):
    files = {"cat/1.jpg": photo(0), "dog/2.jpg": photo(1), "cat/9.cls": b"7"}
    index, labels = scan(tmp_path, files)
    assert labels == {digest(0): 0, digest(1): 1}
    assert index.classes == ["cat", "dog"]
