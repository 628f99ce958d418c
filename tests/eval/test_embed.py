"""Embeddings of image files."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from image_archives import decode, photo, rotated
from PIL import Image

import ddae
from ddae.commands.embed import main
from ddae.config.pretrain import ModelConfig
from ddae.data.decode import decode_crop
from ddae.data.sampling import central_crops
from ddae.errors import UserError
from ddae.eval.baselines import untrained_encoder
from ddae.export.encoder import write_export
from ddae.models.patches import normalise
from ddae.models.vit import Encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "encoder"
    write_export(
        untrained_encoder(Encoder(ModelConfig(width=24, depth=2, heads=2, image_size=32, patch_size=8))), folder
    )
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    root = tmp_path / "photos"
    (root / "day").mkdir(parents=True)
    for number in range(30):
        (root / "day" / f"{number:02d}.jpg").write_bytes(photo(number))
    return root


def run(monkeypatch, capsys, *args) -> str:
    monkeypatch.setattr(sys, "argv", ["ddae embed", *map(str, args)])
    main()
    return capsys.readouterr().out


def test_files(encoder, photos, tmp_path, monkeypatch, capsys):
    shutil.copy(photos / "day" / "03.jpg", photos / "copy.jpg")
    with Image.open(photos / "day" / "04.jpg") as image:
        image.resize((image.width * 3 // 4, image.height * 3 // 4)).save(photos / "small.png")
    (photos / "broken.jpg").write_bytes(b"x")
    out = tmp_path / "out"
    text = run(monkeypatch, capsys, "--encoder", encoder, photos, "--out", out, "--parquet", "--workers", 1)
    assert "32 embeddings of width 24, 1 could not be read; 2 pairs of near-duplicates" in text
    assert "broken.jpg cannot be read as an image" in text
    with np.load(out / "embeddings.npz") as file:
        embeddings, names = file["embeddings"], file["names"].tolist()
    assert embeddings.dtype == np.float32
    assert embeddings.shape == (32, 24)
    assert set(names) == {str(path) for path in photos.rglob("*.*") if path.name != "broken.jpg"}
    with open(out / "duplicates.csv") as file:
        pairs = {frozenset(Path(row[key]).name for key in ("first", "second")) for row in csv.DictReader(file)}
    assert pairs == {frozenset(("copy.jpg", "03.jpg")), frozenset(("small.png", "04.jpg"))}
    table = pq.read_table(out / "embeddings.parquet").to_pydict()
    assert table["name"] == names
    np.testing.assert_array_equal(np.array(table["embedding"], np.float32), embeddings)
    results = json.loads((out / "results.json").read_text())
    assert list(results["unreadable"]) == [str(photos / "broken.jpg")]
    for name in ("map.png", "duplicates.png"):
        with Image.open(out / name) as image:
            assert min(image.size) > 100
    again = run(monkeypatch, capsys, "--encoder", encoder, photos, "--out", out, "--workers", 0)  # replaces its own
    assert "32 embeddings" in again
    assert not (out / "embeddings.parquet").exists()


def test_values_are_those_of_the_transform(encoder, photos):
    loaded = ddae.load_encoder(encoder)
    files = sorted(photos.rglob("*.jpg"))[:5]
    values = ddae.embed(encoder, files)
    for value, file in zip(values, files, strict=True):
        with Image.open(file) as image, torch.no_grad():
            pixels = loaded.transform(image)
            assert pixels.shape == (3, 32, 32)
            expected = loaded(pixels[None])[0, 1:].mean(0)
        torch.testing.assert_close(torch.from_numpy(value), expected)
    np.testing.assert_array_equal(ddae.embed(encoder, photos)[:5], values)
    with Image.open(files[2]) as image:
        np.testing.assert_allclose(ddae.embed(encoder, image)[0], values[2], rtol=1e-5)


def test_transform_is_the_crop_of_evaluations(encoder):
    data = photo(7)
    height, width, _ = decode(data).shape
    box = central_crops(torch.zeros(0), torch.tensor([width]), torch.tensor([height]), (1.0, 1.0)).boxes[0].tolist()
    expected = normalise(torch.from_numpy(decode_crop(data, tuple(box), False, 32)), "half", torch.float32)
    import io

    with Image.open(io.BytesIO(data)) as image:
        torch.testing.assert_close(ddae.load_encoder(encoder).transform(image), expected, rtol=0, atol=0)


def test_orientation_is_applied(encoder, tmp_path):
    (tmp_path / "plain.jpg").write_bytes(photo(5))
    (tmp_path / "rotated.jpg").write_bytes(rotated(5, 3))
    plain, turned = ddae.embed(encoder, [tmp_path / "plain.jpg", tmp_path / "rotated.jpg"])
    with Image.open(tmp_path / "plain.jpg") as image:
        expected = ddae.embed(encoder, image.transpose(Image.Transpose.ROTATE_180))[0]
    np.testing.assert_allclose(turned, expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(plain, turned, atol=1e-4)


def test_mistakes(encoder, photos, tmp_path, monkeypatch, capsys):
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    other.mkdir()
    (other / "mine.txt").write_text("x")
    (tmp_path / "broken.jpg").write_bytes(b"x")
    for images, out, message in (
        (empty, tmp_path / "new", "contains no image"),
        (tmp_path / "missing", tmp_path / "new", "missing does not exist"),
        (tmp_path / "broken.jpg", tmp_path / "new", "none of 1 images can be read"),
        (photos, other, "contains mine.txt, which ddae embed did not write"),
        (photos, other / "mine.txt", "is a file"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, capsys, "--encoder", encoder, images, "--out", out)
        assert not (tmp_path / "new").exists()
    assert (other / "mine.txt").read_text() == "x"
    with pytest.raises(UserError, match=r"broken.jpg cannot be read"):
        ddae.embed(encoder, [photos / "day" / "00.jpg", tmp_path / "broken.jpg"])


def test_few_photos_have_a_map(encoder, tmp_path, monkeypatch, capsys):
    (tmp_path / "one.jpg").write_bytes(photo(1))
    text = run(
        monkeypatch, capsys, "--encoder", encoder, tmp_path / "one.jpg", "--out", tmp_path / "out", "--workers", 0
    )
    assert "1 embeddings of width 24; 0 pairs" in text
