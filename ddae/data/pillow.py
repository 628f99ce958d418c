"""Decoding with Pillow (or pillow-simd, which has the same name): one image at a time, in reader processes."""

import io

import numpy as np
from PIL import Image

from ddae.data.jpeg import first_rows


def decode(encoded: bytes, box: tuple[int, int, int, int], flip: bool, size: int) -> np.ndarray:
    """An image file's box (left, top, width, height), bicubic with antialiasing to size x size: uint8 [3, S, S].

    Rows below the box are not decoded. Raises ValueError for a box outside the image, and what Pillow raises for a file
    that it cannot decode.
    """
    left, top, width, height = box
    with Image.open(io.BytesIO(first_rows(encoded, top + height))) as image:
        if left + width > image.width or top + height > image.height:
            raise ValueError(f"it has {image.width} x {image.height} pixels, fewer than its manifest says")
        image = image.convert("RGB").crop((left, top, left + width, top + height))
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image).transpose(2, 0, 1)
