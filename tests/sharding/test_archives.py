"""Archives as they are found: concatenated, incomplete, sparse, of several volumes, compressed, zipped."""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import subprocess
import tarfile
import zipfile

import pytest
from image_archives import (
    WNIDS,
    class_folders,
    class_tars,
    imagenet,
    keys_of,
    labels_of,
    photo,
    report_of,
    shard_imagenet,
    tar_of,
    write_folder,
    write_tar,
)

CLASSES = imagenet()
EXPECTED = {
    hashlib.sha256(data).hexdigest(): WNIDS.index(wnid) for wnid, files in CLASSES.items() for data in files.values()
}
PHOTOS = {f"{i:03}.jpg": photo(i) for i in range(30)}


def rejected(capsys, *args) -> str:
    """Return the error message of a command that must be rejected."""
    capsys.readouterr()
    assert shard_imagenet(*args) == 2
    return capsys.readouterr().err


def halves() -> tuple[bytes, bytes]:
    """Return two tars of class folders."""
    files = list(class_folders(CLASSES).items())
    return tar_of(dict(files[:9])), tar_of(dict(files[9:]))


@pytest.mark.parametrize("nested", [False, True])
def test_concatenated_tars_are_read_to_the_end(nested, tmp_path):
    first, second = halves()
    data = tar_of({"all.tar": first + second}) if nested else first + second
    (tmp_path / "in.tar").write_bytes(data)
    assert shard_imagenet("--train", tmp_path / "in.tar", "--out", tmp_path / "out") == 0
    assert labels_of(tmp_path / "out") == EXPECTED


def test_a_tar_without_padding_may_be_concatenated(tmp_path):
    """As Go's archive/tar writes it: two blocks of zeros, not padded to a record."""
    first, second = (data.rstrip(b"\0") for data in halves())
    parts = [data + bytes(-len(data) % 512 + 1024) for data in (first, second)]
    (tmp_path / "in.tar").write_bytes(b"".join(parts))
    assert shard_imagenet("--train", tmp_path / "in.tar", "--out", tmp_path / "out") == 0
    assert labels_of(tmp_path / "out") == EXPECTED


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("at", ["header", "content"])
def test_a_preallocated_download_is_rejected(nested, at, tmp_path, capsys):
    """Its second half is zeros; the archive seems to end where they begin."""
    data = tar_of({name: content + bytes(3000) for name, content in PHOTOS.items()})
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        middle = archive.getmembers()[15]
    cut = middle.offset if at == "header" else middle.offset_data + 700
    data = data[:cut] + bytes(len(data) - cut)
    (tmp_path / "in.tar").write_bytes(tar_of({"a.tar": data, "b.tar": tar_of(PHOTOS)}) if nested else data)
    message = rejected(capsys, "--train", tmp_path / "in.tar", "--out", tmp_path / "out")
    assert "zeros follow, as in an incomplete download" in message
    if not nested:
        assert f"of {len(data):,}" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("junk", [b"\0" * 2048 + b"signature", b"<html>" * 99])
def test_anything_else_after_the_end_is_rejected(junk, tmp_path, capsys):
    data = tar_of(PHOTOS)
    (tmp_path / "in.tar").write_bytes(data + junk)
    assert "cannot be read as a tar" in rejected(capsys, "--train", tmp_path / "in.tar", "--out", tmp_path / "out")


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_a_sparse_file_is_rejected_by_name(form, tmp_path, capsys):
    sparse = tmp_path / "hole.jpg"
    with open(sparse, "wb") as file:
        file.write(photo(1))
        file.seek(1 << 20)
        file.write(b"end")
    command = ["tar", "--sparse", f"--format={form}", "-C", tmp_path, "-cf", tmp_path / "in.tar", "hole.jpg"]
    subprocess.run(command, check=True)
    message = rejected(capsys, "--train", tmp_path / "in.tar", "--out", tmp_path / "out")
    assert "hole.jpg" in message
    assert "a sparse file" in message


def special(kind: bytes, name: str) -> bytes:
    """Return the header of a member without content."""
    info = tarfile.TarInfo(name)
    info.type = kind
    return info.tobuf(tarfile.GNU_FORMAT)


def test_a_volume_label_is_skipped(tmp_path):
    (tmp_path / "in.tar").write_bytes(special(b"V", "PHOTOS 2024") + tar_of(PHOTOS))
    assert shard_imagenet("--train", tmp_path / "in.tar", "--out", tmp_path / "out") == 0
    assert keys_of(tmp_path / "out") == {name.removesuffix(".jpg") for name in PHOTOS}


def test_the_second_volume_is_rejected(tmp_path, capsys):
    (tmp_path / "in.tar").write_bytes(special(b"M", "003.jpg") + tar_of(PHOTOS))
    message = rejected(capsys, "--train", tmp_path / "in.tar", "--out", tmp_path / "out")
    assert "'003.jpg' begins in another one" in message


COMPRESS = {"tar.gz": gzip.compress, "tgz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_tars_give_the_same_shards(ending, tmp_path):
    plain = tar_of(class_tars(CLASSES))
    (tmp_path / "in.tar").write_bytes(plain)
    (tmp_path / f"in.{ending}").write_bytes(COMPRESS[ending](plain))
    for name, out in (("in.tar", "a"), (f"in.{ending}", "b")):
        assert shard_imagenet("--train", tmp_path / name, "--out", tmp_path / out) == 0
    assert labels_of(tmp_path / "b") == EXPECTED
    for shard in (tmp_path / "a").glob("*.tar"):
        assert (tmp_path / "b" / shard.name).read_bytes() == shard.read_bytes()
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == sorted(p.name for p in (tmp_path / "a").iterdir())


def test_labels_in_a_compressed_tar(tmp_path):
    files = {f"{i}.jpg": photo(i) for i in range(9)} | {f"{i}.cls": b"%d" % (i % 3) for i in range(9)}
    (tmp_path / "in.tar.gz").write_bytes(tar_of(files, "w:gz"))
    assert shard_imagenet("--train", tmp_path / "in.tar.gz", "--out", tmp_path / "out") == 0
    assert labels_of(tmp_path / "out") == {hashlib.sha256(photo(i)).hexdigest(): i % 3 for i in range(9)}


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_damaged_compressed_tar_is_rejected(ending, tmp_path, capsys):
    data = bytearray(COMPRESS[ending](tar_of(class_tars(CLASSES))))
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    (tmp_path / f"in.{ending}").write_bytes(data)
    message = rejected(capsys, "--train", tmp_path / f"in.{ending}", "--out", tmp_path / "out")
    assert f"in.{ending} cannot be read as a tar" in message
    assert not (tmp_path / "out").exists()


def write_zip(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read(compression, tmp_path):
    files = {f"train/{name}": data for name, data in class_folders(CLASSES).items()}
    location = write_zip(tmp_path / "in.zip", files | {"__MACOSX/train/._x.jpg": b"x"}, compression)
    assert shard_imagenet("--train", location, "--out", tmp_path / "out") == 0
    assert labels_of(tmp_path / "out") == EXPECTED
    assert report_of(tmp_path / "out")["other_files"]["hidden or system files"]["count"] == 1


def test_a_zip_with_backslashes_and_labels(tmp_path):
    files = {f"set\\{i}.{end}": photo(i) if end == "jpg" else b"%d" % i for i in range(4) for end in ("jpg", "cls")}
    assert shard_imagenet("--train", write_zip(tmp_path / "in.zip", files), "--out", tmp_path / "out") == 0
    assert labels_of(tmp_path / "out") == {hashlib.sha256(photo(i)).hexdigest(): i for i in range(4)}


def test_a_damaged_image_in_a_zip_is_left_out(tmp_path):
    location = write_zip(tmp_path / "in.zip", PHOTOS)
    with zipfile.ZipFile(location) as archive:
        info = archive.getinfo("007.jpg")
    data = bytearray(location.read_bytes())
    data[info.header_offset + 37 : info.header_offset + 60] = b"\xff" * 23
    location.write_bytes(data)
    assert shard_imagenet("--train", location, "--out", tmp_path / "out") == 0
    report = report_of(tmp_path / "out")
    assert report["left_out"] == {"unreadable": {"count": 1, "first": ["in.zip/007.jpg"]}}
    assert (report["found"], report["written"]) == (30, 29)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "is not a complete zip"),
        ("upwards", "a path outside its folder"),
        ("drive", "a path outside its folder"),
        ("lzma", "not supported (method 14 of 000.jpg)"),
        ("a tar", "is not a complete zip"),
    ],
)
def test_a_zip_that_cannot_be_read_is_rejected(kind, message, tmp_path, capsys):
    path = write_zip(tmp_path / "in.zip", PHOTOS, zipfile.ZIP_LZMA if kind == "lzma" else zipfile.ZIP_STORED)
    match kind:
        case "cut":
            path.write_bytes(path.read_bytes()[:-300])
        case "upwards":
            write_zip(path, {"../a.jpg": photo(1)})
        case "drive":
            write_zip(path, {"C:\\photos\\a.jpg": photo(1)})
        case "a tar":
            path.write_bytes(tar_of(PHOTOS))
    assert message in rejected(capsys, "--train", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_archives_beside_images_are_rejected(tmp_path, capsys):
    folder = write_folder(tmp_path / "in", {"cat/1.jpg": photo(1), "dog/2.jpg": photo(2)})
    write_tar(folder / "more.tar", PHOTOS)
    message = rejected(capsys, "--train", folder, "--out", tmp_path / "out")
    assert "contains both archives (more.tar) and images (cat/1.jpg)" in message


def test_special_characters_in_paths_are_literal(tmp_path):
    folder = write_folder(tmp_path / "a [1] {x,y} *~", class_folders(CLASSES))
    out = tmp_path / "out [2] *"
    assert shard_imagenet("--train", folder, "--out", out) == 0
    assert len(list(out.iterdir())) > 3
    archive = write_tar(tmp_path / "b [1] *.tar", class_folders(CLASSES))
    assert shard_imagenet("--train", archive, "--out", tmp_path / "again") == 0
    assert labels_of(tmp_path / "again") == EXPECTED


def test_home_and_patterns_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_folder(tmp_path / "tars", class_tars(CLASSES))
    for location in ("~/tars", "~/tars/n*.tar", f"~/tars/{{{','.join(WNIDS)}}}.tar"):
        out = tmp_path / str(len(os.listdir(tmp_path)))
        assert shard_imagenet("--train", location, "--out", out) == 0
        assert labels_of(out) == EXPECTED
