"""A folder of images as data.train."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from image_archives import encode, photo
from PIL import Image

from ddae.config.base import ShardsConfig
from ddae.config.presets import preset
from ddae.data.cache import Cache
from ddae.data.shards import open_shards
from ddae.errors import UserError
from ddae.sharding import photos
from ddae.sharding.photos import choose_validation, is_photo_folder, scan_photos, typical_side, with_shards
from ddae.sharding.scan import LabelRule


@pytest.fixture
def folder(tmp_path) -> Path:
    """150 photographs in dated folders, beside files that are none."""
    root = tmp_path / "photos"
    for number in range(150):
        day = root / "2024" / f"2024-05-{1 + number // 50:02d}"
        day.mkdir(parents=True, exist_ok=True)
        (day / f"IMG_{number:04d}.JPG").write_bytes(photo(number))
    (root / "notes.txt").write_text("x")
    (root / "2024" / "wide.png").write_bytes(encode(Image.new("RGB", (1400, 700), "red"), "PNG"))
    return root


def config(folder: Path, **data):
    data = {"train": str(folder), "cache": str(folder.parent / "cache"), **data}
    return replace(preset("own"), data=replace(preset("own").data, **data))


def test_folder_becomes_shards_once(folder, capsys):
    made = with_shards(config(folder), 64)
    first = capsys.readouterr().out
    assert "151 images found = 150 written unchanged + 1 converted + 0 left out" in first
    train, val = (open_shards(made.data.train, Cache(Path("unused"), 1), split) for split in ("train", "val"))
    assert len(train) + len(val) == 151
    assert 150 * 0.05 <= len(val) <= 150 * 0.05 + photos.BURST
    assert max(np.minimum(train.width, train.height).max(), np.minimum(val.width, val.height).max()) <= 512
    before = {path: path.stat().st_mtime_ns for path in Path(made.data.train).iterdir()}
    photos._scan.cache_clear()
    assert with_shards(config(folder), 64) == made
    assert {path: path.stat().st_mtime_ns for path in Path(made.data.train).iterdir()} == before
    assert "images found" not in capsys.readouterr().out
    assert not list((folder.parent / "cache").glob(".*.lock"))


def test_another_content_or_share_becomes_other_shards(folder):
    made = {with_shards(config(folder), 64).data.train}
    made.add(with_shards(config(folder, val_share=0.3), 64).data.train)
    made.add(with_shards(config(folder), 448).data.train)  # larger images are kept for it
    (folder / "new.jpg").write_bytes(photo(200))
    photos._scan.cache_clear()
    made.add(with_shards(config(folder), 64).data.train)
    assert len(made) == 4


def test_bursts_stay_on_one_side(folder):
    found = scan_photos(config(folder, val_share=0.3).data)
    sides: dict[tuple[str, int], set[str]] = {}
    for index in (found.train, found.val):
        for i in range(len(index)):
            name = Path(index.name(i))
            siblings = sorted(each.name for each in (folder / name.parent).iterdir() if each.suffix != ".txt")
            burst = (str(name.parent), siblings.index(name.name) // photos.BURST)
            sides.setdefault(burst, set()).add(index.split)
    assert all(len(each) == 1 for each in sides.values())
    assert {split for each in sides.values() for split in each} == {"train", "val"}


def test_choice_does_not_depend_on_other_folders(folder):
    before = scan_photos(config(folder, val_share=0.5).data)
    chosen = {before.val.name(i) for i in range(len(before.val))}
    (folder / "2023").mkdir()
    (folder / "2023" / "a.jpg").write_bytes(photo(300))
    photos._scan.cache_clear()
    after = scan_photos(config(folder, val_share=0.5).data)
    now = {after.val.name(i) for i in range(len(after.val))}
    assert len(chosen & now) >= len(chosen) - photos.BURST  # the threshold may move by one burst


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_share(folder, share):
    index = photos.build_index("train", str(folder), rule=LabelRule(labels="none"))
    chosen = choose_validation(index, share)
    assert chosen.any() == (share > 0)
    assert not chosen.all()


def test_folders_are_classes_on_request(folder):
    (folder / "2024" / "wide.png").unlink()
    unlabelled, labelled = (with_shards(config(folder, labels=each), 64).data.train for each in ("none", "folders"))
    assert unlabelled != labelled
    cache = Cache(Path("unused"), 1)
    assert open_shards(unlabelled, cache).classes == ()
    assert open_shards(labelled, cache).classes == ("2024-05-01", "2024-05-02", "2024-05-03")


def test_a_folder_with_splits_is_divided_as_it_is(folder):
    for number in range(30):
        split = folder / ("val" if number < 10 else "train")
        split.mkdir(exist_ok=True)
    for split in ("train", "val"):
        for number in range(100 if split == "train" else 10):
            (folder / split / f"{split}{number}.jpg").write_bytes(photo(number + 500 * (split == "val")))
    for old in [*(folder / "2024").rglob("*.JPG"), folder / "2024" / "wide.png"]:
        old.unlink()
    found = scan_photos(config(folder).data)
    assert (len(found.train), len(found.val)) == (100, 10)


def test_typical_side(folder):
    sides = []
    for path in [*folder.rglob("*.JPG"), *folder.rglob("*.png")]:
        with Image.open(path) as image:
            sides.append(min(image.size))
    assert len(set(sides)) > 1
    assert typical_side(scan_photos(config(folder, val_share=0.0).data).train) == int(np.median(sides))


def test_which_folders_are_of_images(folder, tmp_path):
    assert is_photo_folder(str(folder))
    shards = with_shards(config(folder), 64).data.train
    for other in (shards, f"{shards}/train-{{000000..000003}}.tar", "", "s3://bucket/x", ("a", "b"), "missing"):
        assert not is_photo_folder(other)
    (tmp_path / "labels.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"labels.csv, a file. Pass the folder that contains the images."):
        is_photo_folder(str(tmp_path / "labels.csv"))


def files_in(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "contains no image"),
        ({f"{n}.jpg": photo(n) for n in range(3)}, "contains 3 images; expected at least 100"),
        ({f"{n}.jpg": b"no image" for n in range(120)}, "none of the 120 images is usable"),
        ({"labels.csv": b"a,b"}, "contains no image"),
    ],
)
def test_unusable_folders_leave_nothing_behind(content, message, tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    for name, data in content.items():
        (root / name).write_bytes(data)
    before = files_in(tmp_path)
    with pytest.raises(UserError, match=message):
        with_shards(config(root, cache=str(tmp_path / "deep" / "cache")), 64)
    assert files_in(tmp_path) == before


def test_class_folders_are_needed_for_labels(tmp_path):
    for number in range(100):
        (tmp_path / f"{number}.jpg").write_bytes(photo(number))
    with pytest.raises(UserError, match=r"data.labels is folders, but .* contains no class folders"):
        scan_photos(ShardsConfig(train=str(tmp_path), labels="folders"))


def test_only_rank_0_prints(folder, capsys, monkeypatch):
    monkeypatch.setitem(os.environ, "RANK", "3")
    with_shards(config(folder), 64)
    assert capsys.readouterr().out == ""
