import io

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from ddae.data.decode import decode_crop, first_rows, is_truncated, resize


def jpeg(number=0, size=(150, 117), **options) -> bytes:
    buffer = io.BytesIO()
    picture(number).resize(size).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"restart_marker_rows": 1}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}])
def test_first_rows_are_identical_to_those_of_the_whole_file(subsampling, options):
    data = jpeg(subsampling=subsampling, **options)
    whole, shortened = decode(data), 0
    for rows in range(1, 118):
        part = decode(first_rows(data, rows))
        assert rows <= len(part) <= rows + 32
        assert (part[:rows] == whole[:rows]).all()
        shortened += len(part) < len(whole)
    assert shortened > 70


def test_first_rows_returns_other_files_unchanged():
    buffer = io.BytesIO()
    picture(0).save(buffer, "PNG")
    for data in (jpeg(progressive=True), buffer.getvalue(), b"", b"\xff\xd8", b"\xff\xd8\xff\xc0\x00", b"text" * 20):
        assert first_rows(data, 1) == data
    assert first_rows(jpeg(), 117) == jpeg()


@pytest.mark.parametrize("box", [(0, 0, 200, 160), (10, 20, 60, 50), (140, 100, 60, 60), (0, 0, 1, 1)])
def test_crop_matches_pillows_bicubic_crop_of_the_whole_image(box):
    """The mean difference is at most 0.5 of 255: two fixed-point roundings of the same weights."""
    data = jpeg(3, (200, 160))
    left, top, width, height = box
    region = Image.open(io.BytesIO(data)).crop((left, top, left + width, top + height))
    expected = np.asarray(region.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)
    crop = decode_crop(data, box, False, 32)
    assert np.abs(crop - expected).mean() <= 0.5
    assert (decode_crop(data, box, True, 32) == crop[:, :, ::-1]).all()
    assert (crop == resize(np.array(region), False, 32)).all()


def test_box_outside_the_image_is_rejected():
    for box in [(0, 0, 151, 10), (0, 100, 10, 18)]:
        with pytest.raises(ValueError, match="fewer than its manifest states"):
            decode_crop(jpeg(), box, False, 16)


def test_truncated_files_are_detected():
    thumbnail = b"Exif\0\0" + jpeg(1, (16, 16))
    for data in (jpeg(), jpeg(progressive=True), jpeg(exif=thumbnail)):
        assert not is_truncated(data)
        assert not is_truncated(memoryview(data))
        assert not is_truncated(data + b"\0" * 5000)  # padding of some writers
        for end in (-1, -2, -100, len(data) // 2, len(data) // 4, 3):
            assert is_truncated(data[:end]), end
    assert not is_truncated(b"no image")  # not a JPEG; decoding fails
