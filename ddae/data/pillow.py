"""Decoding with Pillow (or pillow-simd, which has the same name): one image at a time, in reader processes."""

import io

import numpy as np
from PIL import Image

from ddae.data.jpeg import first_rows
from ddae.data.resize import resize


def decode(encoded: bytes, box: tuple[int, int, int, int], flip: bool, size: int) -> np.ndarray:
    """An image file's box (left, top, width, height), bicubic with antialiasing to size x size: uint8 [3, S, S].

    Rows below the box are not decoded. Raises ValueError for a box outside the image, and what Pillow raises for a file
    that it cannot decode.
    """
    left, top, width, height = box
    with Image.open(io.BytesIO(first_rows(encoded, top + height))) as image:
        if left + width > image.width or top + height > image.height:
            raise ValueError(f"it has {image.width} x {image.height} pixels, fewer than its manifest says")
        crop = image.crop((left, top, left + width, top + height))
    crop = crop if crop.mode == "RGB" else crop.convert("RGB")  # which would copy what is RGB already
    return resize(np.array(crop), flip, size)


def whole(encoded: bytes) -> np.ndarray:
    """An image file as it is stored: uint8 [3, H, W]. Raises what Pillow raises for a file that it cannot decode."""
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
