import io
import subprocess
import time

import numpy as np
import pytest
from conftest import picture
from image_archives import (
    EXPECTED,
    bad_corpus,
    bomb,
    decoded,
    encoded,
    photo,
    png16,
    traps,
    turned,
    with_thumbnail,
)
from PIL import Image, ImageOps

from ddae.data.decode import is_cut
from ddae.sharding.inspection import inspect

BAD, PLAIN = bad_corpus(), traps()


@pytest.mark.parametrize("kind", [kind for kind in EXPECTED if not kind.startswith("duplicate")])
def test_what_is_odd_is_named(kind):
    found = inspect(BAD[kind])
    assert list(found.kinds) == EXPECTED[kind][0]
    assert (found.jpeg is None) == (EXPECTED[kind][1] == "left_out")
    if found.jpeg is not None:
        with Image.open(io.BytesIO(found.jpeg)) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (found.width, found.height))
        assert inspect(found.jpeg).kinds == ()


@pytest.mark.parametrize("trap", PLAIN)
def test_a_plain_jpeg_is_kept_byte_for_byte(trap):
    found = inspect(PLAIN[trap])
    assert found.kinds == ()
    assert found.jpeg == PLAIN[trap]
    with Image.open(io.BytesIO(PLAIN[trap])) as image:
        assert (found.width, found.height) == image.size


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_photo_becomes_upright(orientation):
    data = turned(3, orientation)
    found = inspect(data)
    with Image.open(io.BytesIO(data)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image), np.int32)
    assert found.kinds == ("exif_rotated",)
    assert upright.shape[:2] == (found.height, found.width)
    assert np.abs(decoded(found.jpeg) - upright).mean() < 3
    with Image.open(io.BytesIO(found.jpeg)) as image:
        assert image.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_and_not_clipped(channels):
    found = inspect(png16(0, channels))
    ramp = np.linspace(0, 255, 96 * 80 * channels).reshape(80, 96, channels)
    assert np.abs(decoded(found.jpeg) - ramp).mean() < 2


def test_a_dark_image_of_sixteen_bits_stays_dark():
    dark = Image.fromarray(np.ones((40, 40), np.uint16))
    assert decoded(inspect(encoded(dark, "PNG")).jpeg).max() < 3


def test_cmyk_keeps_its_colours():
    assert np.abs(decoded(inspect(BAD["cmyk"]).jpeg) - decoded(encoded(picture(902)))).mean() < 12


@pytest.mark.parametrize("save", [{}, {"progressive": True}, {"subsampling": 0}])
def test_every_cut_is_found(save):
    data = photo(5, **save)
    for length in np.random.default_rng(1).integers(1, len(data), 40).tolist():
        assert inspect(data[:length]) == (("truncated",), None, 0, 0), length


@pytest.mark.parametrize("missing", [1, 2])
def test_a_missing_end_is_found_in_every_photo(missing):
    """Of some files the decoder has all pixels before it looks for the end."""
    for number in (1, 4, 55, 80, 91, 97):
        for save in ({}, {"progressive": True}, {"subsampling": 0}):
            assert inspect(photo(number, **save)[:-missing]) == (("truncated",), None, 0, 0), (number, save)


def test_a_cut_photo_with_a_thumbnail_is_truncated():
    data = with_thumbnail(4)
    start = data.index(b"\xff\xd9") + 2  # of what follows the thumbnail's end
    for length in np.linspace(start, len(data) - 2, 12).astype(int).tolist():
        assert inspect(data[:length]) == (("truncated",), None, 0, 0), length


def test_damage_of_any_kind_raises_nothing():
    rng = np.random.default_rng(0)
    for data in (photo(6), BAD["png"], BAD["webp"], BAD["cmyk"], with_thumbnail(6)):
        for _ in range(30):
            broken = bytearray(data)
            for place in rng.integers(0, min(len(data), 700), 4):
                broken[place] = rng.integers(256)
            found = inspect(bytes(broken))
            assert found.jpeg is not None or found.kinds


def decodes(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).load()
    except Exception:
        return False
    return True


@pytest.mark.parametrize("save", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 2}])
def test_a_photo_is_usable_where_all_its_pixels_decode(save):
    """Though they are not all made: what damage ends a whole decoding is found, and nothing else."""
    rng, verdicts = np.random.default_rng(2), set()
    for number in range(300):
        broken = bytearray(photo(number % 20, **save))
        for place in rng.integers(2, len(broken) - 2, rng.integers(1, 20)):
            broken[place] = rng.integers(256)
        if number % 3 == 0:
            place = rng.integers(600, len(broken))
            del broken[place : place + rng.integers(1, 3000)]
            broken += b"\xff\xd9"
        usable = decodes(bytes(broken)) and not is_cut(bytes(broken))
        assert (inspect(bytes(broken)).jpeg is not None) == usable
        verdicts.add(usable)
    assert verdicts == {False, True}


def test_a_turned_tiff_is_said_to_be_turned():
    rotated, buffer = Image.Exif(), io.BytesIO()
    rotated[0x0112] = 6
    picture(3).resize((40, 30)).save(buffer, "TIFF", exif=rotated)
    found = inspect(buffer.getvalue())
    assert set(found.kinds) == {"tiff", "exif_rotated"}
    assert (found.width, found.height) == (30, 40)


def test_a_bomb_is_not_decoded():
    start = time.monotonic()
    assert inspect(BAD["bomb"]) == (("bomb",), None, 0, 0)
    assert inspect(bomb(8193, 8192)) == (("bomb",), None, 0, 0)
    assert time.monotonic() - start < 2


def test_no_other_program_is_run(monkeypatch):
    """Pillow hands Encapsulated PostScript to Ghostscript, whatever the file is called."""
    called = []
    for name in ("check_call", "run", "Popen", "check_output"):
        monkeypatch.setattr(subprocess, name, lambda *words, **more: called.append(words))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    found = inspect(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n")
    assert found.jpeg is None
    assert called == []


@pytest.mark.parametrize("size", [(100, 61), (61, 100), (64, 64), (2000, 90)])
def test_the_shorter_side_is_resized(size):
    found = inspect(encoded(picture(1).resize(size)), resize_shorter=32)
    assert found.kinds == ()
    assert min(found.width, found.height) == 32
    assert abs(found.width - size[0] * 32 / min(size)) <= 1
    assert abs(found.height - size[1] * 32 / min(size)) <= 1
    assert decoded(found.jpeg).shape[:2] == (found.height, found.width)


def test_a_smaller_image_is_not_resized():
    for size in (32, 10):
        data = encoded(picture(1).resize((size, 90)))
        assert inspect(data, resize_shorter=32).jpeg == data


def test_a_turned_photo_is_upright_and_resized():
    data = turned(8, 6)
    found = inspect(data, resize_shorter=32)
    with Image.open(io.BytesIO(data)) as image:
        width, height = ImageOps.exif_transpose(image).size
    assert found.kinds == ("exif_rotated",)
    assert (width > height) == (found.width > found.height)
    assert min(found.width, found.height) == 32


def test_quality_counts_for_what_is_written_anew():
    low, high = (inspect(BAD["png"], quality=quality).jpeg for quality in (20, 95))
    assert len(low) < len(high)
    assert inspect(photo(1), quality=20).jpeg == photo(1)
