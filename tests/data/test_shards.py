import gc
import io
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import make_shards, sample
from PIL import Image

from ddae.data.cache import Cache
from ddae.data.shards import find_shards, open_shards
from ddae.errors import UserError

CACHE = Cache(Path("nowhere"), 0)  # not used by local shards


def test_images_are_read_by_index(shards):
    opened = open_shards(str(shards), CACHE)
    assert len(opened) == 100
    for number in (0, 39, 40, 63, 64, 99):
        assert opened.read(number) == sample(number).jpeg
        with Image.open(io.BytesIO(opened.read(number))) as image:
            assert image.size == (opened.width[number], opened.height[number])


def test_webdataset_reads_the_shards(shards):
    records = list(webdataset.WebDataset(find_shards(str(shards)), shardshuffle=False, empty_check=False))
    assert [record["__key__"] for record in records] == [sample(i).key for i in range(100)]
    assert records[7]["jpg"] == sample(7).jpeg
    assert records[7]["cls"] == b"2"


def test_index_equals_dalis(shards, tmp_path):
    wds2idx = pytest.importorskip("wds2idx")
    shard = Path(find_shards(str(shards))[1])
    with wds2idx.IndexCreator(str(shard), str(tmp_path / "dali.idx"), verbose=False) as creator:
        creator.create_index()
    assert (tmp_path / "dali.idx").read_text() == shard.with_suffix(".idx").read_text()


def test_equal_samples_give_equal_bytes(shards, tmp_path):
    again = make_shards(tmp_path)
    for path in shards.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_patterns_and_folders_find_the_same_shards(shards):
    assert find_shards(str(shards)) == find_shards(str(shards / "train-*.tar"))
    assert len(find_shards(str(shards / "train-00000[01].tar"))) == 2


def damage(kind, folder):
    """Damage shards without a sample index, as version 0.1 wrote them."""
    for path in folder.glob("*.index.*"):
        path.unlink()
    shard = folder / "train-000001.tar"
    manifest = folder / "manifest.json"
    match kind:
        case "truncated":
            shard.write_bytes(shard.read_bytes()[:-1000])
        case "no index":
            shard.with_suffix(".idx").unlink()
        case "short index":
            lines = shard.with_suffix(".idx").read_text().splitlines(keepends=True)
            shard.with_suffix(".idx").write_text("".join(lines[:-1]))
        case "old index":
            shard.with_suffix(".idx").write_text("v1.1 2\n")
        case "no manifest":
            manifest.unlink()
        case "broken manifest":
            manifest.write_text(manifest.read_text()[:-20])
        case "other manifest":
            manifest.write_text(json.dumps({"format": "else"}))
        case "one size short":
            content = json.loads(manifest.read_text())
            content["shards"][shard.name]["sizes"].pop()
            manifest.write_text(json.dumps(content))
        case "sizes are a number":
            content = json.loads(manifest.read_text())
            content["shards"][shard.name]["sizes"] = 24
            manifest.write_text(json.dumps(content))
        case "index is not text":
            index = shard.with_suffix(".idx")
            index.write_bytes(index.read_bytes().replace(b"s00", b"s\xff0", 1))
        case "binary manifest":
            manifest.write_bytes(bytes(range(256)))
        case "garbled index":
            shard.with_suffix(".idx").write_text("v1.2 24\njpg x y z\n")
        case "empty index":
            shard.with_suffix(".idx").write_text("")
        case "unknown shard":
            (folder / "train-000009.tar").write_bytes(shard.read_bytes())


@pytest.mark.parametrize(
    "kind, message",
    {
        "truncated": "is truncated or was changed",
        "no index": "has no index",
        "short index": "lists 23 samples; its manifest states 24",
        "old index": "not an index of version",
        "no manifest": "is missing",
        "broken manifest": "is not JSON",
        "other manifest": "is not a manifest",
        "one size short": "the entry for train-000001.tar in .* is incomplete",
        "sizes are a number": "the entry for train-000001.tar in .* is incomplete",
        "index is not text": "without offset and size of a jpg file",
        "binary manifest": "is not JSON",
        "garbled index": "without offset and size of a jpg file",
        "empty index": "is not an index of version",
        "unknown shard": "is not in",
    }.items(),
)
def test_damage_is_reported(kind, message, tmp_path):
    make_shards(tmp_path)
    assert len(open_shards(str(tmp_path), CACHE)) == 100
    damage(kind, tmp_path)
    with pytest.raises(UserError, match=message):
        open_shards(str(tmp_path), CACHE)


@pytest.mark.parametrize("where", ["", "/nowhere", "/nowhere/*.tar"])
def test_missing_shards_are_reported(where):
    with pytest.raises(UserError, match="data_prep"):
        find_shards(where)


def test_a_trailing_slash_changes_nothing(shards):
    assert open_shards(f"{shards}/", CACHE).paths == open_shards(str(shards), CACHE).paths


def test_an_open_brace_is_reported():
    with pytest.raises(UserError, match=r"in which a brace is not closed\. Write a range as"):
        find_shards("data/train-{000000..000003.tar")


def test_sample_photos_writes_both_splits(tmp_path):
    command = [sys.executable, "data_prep/sample_photos.py", "--out", str(tmp_path / "photos")]
    command += ["--train_per_photo", "3", "--val_per_photo", "2", "--per_shard", "20"]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    train, val = (open_shards(str(tmp_path / "photos"), CACHE, split) for split in ("train", "val"))
    assert len(train) == 33
    assert len(val) == 22
    assert "33 training and 22 validation" in first.stdout
    assert "is complete" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_sample_photos_writes_segmentation_masks(tmp_path):
    command = [sys.executable, "data_prep/sample_photos.py", "--out", str(tmp_path / "scenes"), "--masks"]
    command += ["--train_per_photo", "3", "--val_per_photo", "2"]
    subprocess.run(command, capture_output=True, text=True, check=True)
    shards = open_shards(str(tmp_path / "scenes"), CACHE, "val")
    backgrounds = []
    for number, location in enumerate(shards.file_locations("png")):
        mask = np.asarray(Image.open(io.BytesIO(shards.read_file(number, location))))
        assert mask.shape == (shards.height[number], shards.width[number])
        assert 2 <= len(np.unique(mask)) <= 4  # a background and one to three pieces
        assert mask.max() < len(shards.classes) == 11
        backgrounds.append(mask[0, 0])
    assert len(np.unique(backgrounds)) > 5


def test_missing_shard_is_reported(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "data")
    (tmp_path / "data" / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"lacks train-000001.tar, which its manifest.json lists"):
        open_shards(str(tmp_path / "data"), CACHE)


def test_threads_close_their_files(shards, tmp_path):
    gc.collect()
    opened, before = open_shards(str(shards), CACHE), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(opened.read, range(100)))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["a [1]", "b {x,y}", "c *?", "~", "d e"])
def test_a_path_is_literal_first(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    make_shards(folder)
    assert len(open_shards(str(folder), CACHE)) == 100
    assert find_shards(str(folder / "train-000001.tar")) == [str(folder / "train-000001.tar")]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    make_shards(tmp_path / "data")
    for where in ("~/data", "~/data/", "~/data/train-*.tar"):
        assert len(open_shards(where, CACHE)) == 100


@pytest.mark.parametrize("content", ["tars", "images", "numbered"])
def test_other_data_sets_give_the_command_that_shards_them(content, tmp_path):
    """Shards of img2dataset or timm, or a folder of images."""
    folder = tmp_path / "my photos"
    folder.mkdir()
    name = {"tars": "train-0000.tar", "images": "1.jpg", "numbered": "00000.tar"}[content]
    (folder / name).write_bytes(sample(0).jpeg)
    command = rf"Run python data_prep/shard_imagenet.py --train '{folder}' --out data/shards"
    with pytest.raises(UserError, match=re.escape(command)):
        open_shards(str(folder), CACHE)


@pytest.mark.parametrize("page", ["<!DOCTYPE html><html>Sign in</html>", "\n <html>"])
def test_a_web_page_is_no_manifest(page, tmp_path):
    (make_shards(tmp_path) / "manifest.json").write_text(page)
    with pytest.raises(UserError, match="is a web page, such as a login page"):
        open_shards(str(tmp_path), CACHE)
