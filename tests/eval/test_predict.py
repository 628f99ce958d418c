"""Image files as predictions read them: any depth, channels and orientation, as the sharder reads them."""

import numpy as np
import pytest
from PIL import Image

from ddae.errors import UserError
from ddae.eval.predict import load_rgb

RAMP = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)


@pytest.mark.parametrize("name", ["x.png", "x.tiff"])
def test_sixteen_bits_are_scaled_and_not_clipped(name, tmp_path):
    Image.fromarray(RAMP).save(tmp_path / name)
    image = np.asarray(load_rgb(tmp_path / name))
    assert image.shape == (64, 64, 3)
    assert np.abs(image[..., 0] - RAMP / 257).max() <= 0.5


def test_orientation_is_applied(tmp_path):
    picture = Image.fromarray(np.zeros((4, 8, 3), np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "x.jpg", exif=exif)
    assert load_rgb(tmp_path / "x.jpg").size == (4, 8)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(20)])
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.png cannot be read as an image: .*Pass a JPEG or PNG"):
        load_rgb(tmp_path / "x.png")
