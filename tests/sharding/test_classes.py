"""Classes by folders and archives: one rule for a folder, a tar and a zip."""

import hashlib
import os
import unicodedata

import pytest
from image_archives import WNIDS, labels_of, photo, report_of, shard_imagenet, tar_of, write_folder, write_tar
from test_archives import rejected, write_zip

from ddae.data.manifest import read_manifest
from ddae.errors import UserError
from ddae.sharding import sources
from ddae.sharding.scan import LabelRule

FORMS = ("folder", "tar", "zip")


def write(form, folder, files):
    """Write files as a folder, a tar or a zip. Return its path."""
    match form:
        case "folder":
            return write_folder(folder / "in", files)
        case "tar":
            return write_tar(folder / "in.tar", files)
        case "zip":
            return write_zip(folder / "in.zip", files)


def images(*folders, count=3):
    """Return different images in each of the folders."""
    return {f"{folder}/{i}.jpg": photo(count * n + i) for n, folder in enumerate(folders) for i in range(count)}


def named_labels(files, class_of):
    """Return SHA-256 -> name of the class by the path."""
    return {hashlib.sha256(data).hexdigest(): class_of(path) for path, data in files.items()}


def found_labels(out, split="train"):
    classes = read_manifest(out)["classes"]
    return {digest: None if label is None else classes[label] for digest, label in labels_of(out, split).items()}


def scan(location, **rule):
    """Return SHA-256 -> name of the class, None without one, of the images of a source."""
    index = sources.build_index("train", str(location), rule=LabelRule(**rule))
    names = (None if label < 0 else index.classes[label] for label in index.label.tolist())
    return {hashlib.sha256(index.read(i)).hexdigest(): name for i, name in enumerate(names)}


LAYOUTS = {  # folders -> class by the path, or the error
    "one level": (images("cat", "dog"), lambda path: path.split("/")[0]),
    "the same folder in each class": (images("n01/images", "n02/images"), lambda path: path.split("/")[0]),
    "the class's name again": (images("cat/cat", "dog/dog"), lambda path: path.split("/")[0]),
    "folders around all": (images("data/train/cat", "data/train/dog"), lambda path: path.split("/")[2]),
    "no folders": ({f"{i}.jpg": photo(i) for i in range(4)}, lambda path: None),
    "one folder around all": (images("photos"), lambda path: None),
    "folders in folders": (images("a/airfield", "c/church/indoor", "c/church/outdoor"), "has folders in folders"),
    "different folders in classes": (images("a/airfield", "b/badlands"), "has folders in folders"),
    "images beside folders": ({"1.jpg": photo(1)} | images("cat", "dog"), "contains both images and folders"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_rule_for_all_forms(layout, form, tmp_path, capsys):
    files, expected = LAYOUTS[layout]
    args = ["--train", write(form, tmp_path, files), "--out", tmp_path / "out"]
    if isinstance(expected, str):
        message = rejected(capsys, *args)
        assert expected in message
        assert "--labels none" in message
        assert not (tmp_path / "out").exists()
        assert scan(args[1], labels="none") == named_labels(files, lambda path: None)
    else:
        assert scan(args[1]) == named_labels(files, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("rule", "class_of"),
    [("folder", lambda path: path.split("/")[0]), ("path", lambda path: path.rpartition("/")[0])],
)
def test_a_flag_decides(rule, class_of, form, tmp_path):
    """The layout of Places365, whose classes are paths such as c/church/outdoor."""
    files = images("a/airfield", "c/church/indoor", "c/church/outdoor", "c/canyon")
    assert scan(write(form, tmp_path, files), classes=rule) == named_labels(files, class_of)


@pytest.mark.parametrize("form", FORMS)
def test_the_folder_of_the_split_is_used(form, tmp_path):
    train, val = images("set/train/cat", "set/train/dog"), images("set/val/cat", "set/val/dog", count=2)
    val = {path: photo(100 + i) for i, path in enumerate(val)}
    location = write(form, tmp_path, {**train, **val})
    assert shard_imagenet("--train", location, "--val", location, "--out", tmp_path / "out") == 0
    assert found_labels(tmp_path / "out", "train") == named_labels(train, lambda path: path.split("/")[2])
    assert found_labels(tmp_path / "out", "val") == named_labels(val, lambda path: path.split("/")[2])
    assert report_of(tmp_path / "out")["left_out"]["images of another split"]["count"] == len(train) + len(val)


HIDDEN = {
    ".thumbnails/1.jpg": b"x",
    "cat/.ipynb_checkpoints/1-checkpoint.jpg": b"x",
    "@eaDir/cat/1.jpg/SYNOPHOTO_THUMB_M.jpg": b"x",
    "$RECYCLE.BIN/S-1-5/$R1.jpg": b"x",
    "__MACOSX/cat/._1.jpg": b"x",
    "System Volume Information/x.png": b"x",
    ".Trash-1000/files/2.jpg": b"x",
    "dog/Thumbs.db": b"x",
}


@pytest.mark.parametrize("form", FORMS)
def test_hidden_and_system_entries_are_listed_and_no_classes(form, tmp_path):
    files = images("cat", "dog")
    location = write(form, tmp_path, {**HIDDEN, **files})
    assert shard_imagenet("--train", location, "--out", tmp_path / "out") == 0
    assert found_labels(tmp_path / "out") == named_labels(files, lambda path: path.split("/")[0])
    hidden = report_of(tmp_path / "out")["other_files"]["hidden or system files"]
    assert hidden["count"] == len(HIDDEN)
    assert len(hidden["first"]) == len(HIDDEN)


def write_numbered(folder, pattern, names=lambda i: f"{i}.jpg", count=3):
    """Write archives of three images each. Return path -> image."""
    files = {}
    for number in range(count):
        name = pattern.format(number)
        part = {names(3 * number + i): photo(3 * number + i) for i in range(3)}
        write_tar(folder / f"{name}.tar", part)
        files |= {f"{name}/{path}": data for path, data in part.items()}
    return files


@pytest.mark.parametrize("pattern", ["train_images_{}", "part{}", "{}", "data-{}"])
def test_numbered_archives_are_ambiguous(pattern, tmp_path, capsys):
    """train_images_0.tar to train_images_4.tar is the layout of ImageNet on Hugging Face."""
    files = write_numbered(tmp_path / "in", pattern)
    args = ["--train", tmp_path / "in", "--out", tmp_path / "out"]
    message = rejected(capsys, *args)
    assert f"numbered archives of images ({pattern.format(0)}.tar)" in message
    assert all(flag in message for flag in ("--classes archive", "--classes synset", "--labels none"))
    assert scan(args[1], classes="archive") == named_labels(files, lambda path: path.split("/")[0])
    assert scan(args[1], labels="none") == named_labels(files, lambda path: None)


def test_wordnet_ids_in_file_names(tmp_path):
    files = write_numbered(tmp_path / "in", "train_images_{}", lambda i: f"{WNIDS[i % 5]}_{i}_{WNIDS[i % 5]}.JPEG")
    args = ["--train", tmp_path / "in", "--out", tmp_path / "out", "--classes", "synset"]
    assert shard_imagenet(*args) == 0
    assert found_labels(tmp_path / "out") == named_labels(files, lambda path: path.split("/")[1].partition("_")[0])


def test_an_image_without_wordnet_id_is_rejected(tmp_path, capsys):
    location = write_tar(tmp_path / "in.tar", {f"{WNIDS[0]}_1.jpg": photo(1), "n0144_2.jpg": photo(2)})
    message = rejected(capsys, "--train", location, "--out", tmp_path / "out", "--classes", "synset")
    assert "n0144_2.jpg contains no WordNet id" in message


@pytest.mark.parametrize("pattern", ["part_{}", "train-{:06}"])
def test_numbered_archives_of_class_folders_are_parts(pattern, tmp_path):
    files = write_numbered(tmp_path / "in", pattern, lambda i: f"{('cat', 'dog', 'ape')[i % 3]}/{i}.jpg")
    assert scan(tmp_path / "in") == named_labels(files, lambda path: path.split("/")[1])


def test_numbered_shards_have_no_classes(tmp_path):
    files = write_numbered(tmp_path / "in", "train-{:06}")
    assert scan(tmp_path / "in") == named_labels(files, lambda path: None)


def test_class_tars_named_by_number(tmp_path):
    """Numbers that are not consecutive are names."""
    files = images("2", "10", "7")
    tars = {}
    for path, data in files.items():
        class_, _, name = path.partition("/")
        tars.setdefault(class_, {})[name] = data
    location = write_tar(tmp_path / "in.tar", {f"{class_}.tar": tar_of(of) for class_, of in tars.items()})
    assert scan(location) == named_labels(files, lambda path: path.split("/")[0])


def test_composed_and_decomposed_names_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != decomposed
    train, val = images(composed, "dog"), {f"{decomposed}/9.jpg": photo(90), "dog/8.jpg": photo(91)}
    locations = write_folder(tmp_path / "train", train), write_folder(tmp_path / "val", val)
    assert shard_imagenet("--train", locations[0], "--val", locations[1], "--out", tmp_path / "out") == 0
    assert set(found_labels(tmp_path / "out", "val").values()) == {composed, "dog"}


def test_classes_are_printed_before_the_work_starts(tmp_path, capsys):
    location = write_folder(tmp_path / "in", images("cat", "dog"))
    assert shard_imagenet("--train", location, "--out", tmp_path / "out") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["scanning --train", "train: 6 images of 2 classes"]
    assert [line.split() for line in lines[2:4]] == [["3", "cat", "in/cat/0.jpg"], ["3", "dog", "in/dog/0.jpg"]]


def test_dry_run_prints_everything_and_writes_nothing(tmp_path, capsys):
    classes = [f"class{i:02}" for i in range(30)]
    files = {**images(*classes, count=1), "class00/b.png": b"x", "class00/c.heic": b"x", ".DS_Store": b"x"}
    location = write_folder(tmp_path / "in", files)
    assert shard_imagenet("--train", location, "--out", tmp_path / "out", "--dry_run") == 0
    output = capsys.readouterr().out
    assert all(f" {class_} " in output for class_ in classes)
    assert "train: 31 images (30 .jpg, 1 .png)" in output
    assert "left out: 1 .heic (convert them to PNG first), such as class00/c.heic" in output
    assert "other files: 1 hidden or system files, such as .DS_Store" in output
    assert not (tmp_path / "out").exists()


class TestLinks:
    """Links and permissions in a folder."""

    def test_linked_folders_and_images_are_followed(self, tmp_path):
        files = images("cat", "dog")
        write_folder(tmp_path / "real", files)
        (tmp_path / "in" / "cat").mkdir(parents=True)
        for path in files:
            if path.startswith("cat"):
                (tmp_path / "in" / path).symlink_to(tmp_path / "real" / path)
        (tmp_path / "in" / "dog").symlink_to(tmp_path / "real" / "dog")
        assert shard_imagenet("--train", tmp_path / "in", "--out", tmp_path / "out") == 0
        assert found_labels(tmp_path / "out") == named_labels(files, lambda path: path.split("/")[0])

    def test_links_to_a_folder_below_a_class_are_followed(self, tmp_path):
        write_folder(tmp_path / "more", {"9.jpg": photo(90)})
        location = write_folder(tmp_path / "in", images("cat/images", "dog/images"))
        (location / "cat" / "images" / "more").symlink_to(tmp_path / "more")
        assert shard_imagenet("--train", location, "--out", tmp_path / "out", "--classes", "folder") == 0
        assert found_labels(tmp_path / "out")[hashlib.sha256(photo(90)).hexdigest()] == "cat"

    def test_dangling_links_are_counted(self, tmp_path):
        files = images("cat", "dog")
        location = write_folder(tmp_path / "in", files)
        (location / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
        (location / "ape").symlink_to(tmp_path / "nowhere")
        assert shard_imagenet("--train", location, "--out", tmp_path / "out") == 0
        report = report_of(tmp_path / "out")
        assert report["left_out"]["dangling links, pipes or sockets"] == {"count": 1, "first": ["cat/gone.jpg"]}
        assert report["other_files"]["dangling links, pipes or sockets"] == {"count": 1, "first": ["ape"]}
        assert report["found"] == len(files) + 1

    def test_a_link_to_a_folder_around_it_is_rejected(self, tmp_path, capsys):
        location = write_folder(tmp_path / "in", images("cat", "dog"))
        (location / "cat" / "loop").symlink_to(location)
        assert "is a link to a folder that contains it" in rejected(
            capsys, "--train", location, "--out", tmp_path / "out"
        )

    def test_a_folder_that_cannot_be_read_ends_the_run(self, tmp_path, monkeypatch):
        location = write_folder(tmp_path / "in", images("cat", "dog"))
        scandir = os.scandir

        def deny(path):
            if str(path).endswith("cat"):
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", deny)
        with pytest.raises(UserError, match=r"cat cannot be read \(Permission denied\)"):
            sources.build_index("train", str(location))
