"""Image files as users have them: any format and mode, upright by their EXIF orientation; the crop of evaluations."""

from pathlib import Path

import numpy as np
from PIL import Image

from ddae.config.base import ImageSize
from ddae.data.decode import resize
from ddae.errors import UserError, one_line

ORIENTATION = 0x0112  # EXIF tag; 1 is upright
ROTATIONS = {  # by orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_rgb(photo: str | Path) -> Image.Image:
    """Load an image file as RGB with 8 bits per channel, in its EXIF orientation, as the sharder does.

    Raise UserError if the file is not an image.
    """
    try:
        with Image.open(photo) as image:
            return upright_rgb(image)
    except Exception as error:  # Pillow raises many types for damaged files
        raise UserError(f"{photo} cannot be read as an image: {one_line(error)}. Pass a JPEG or PNG.") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return the image rotated as its EXIF orientation requires, as RGB with 8 bits per channel.

    Raise ValueError for pixels whose range is unknown: floating-point, or integers of more than 16 bits.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    image.load()  # which rotates a TIFF
    rotation = ROTATIONS.get(orientation(image))
    upright = image if rotation is None else image.transpose(rotation)
    if upright.mode.startswith("I"):  # 16 bits per pixel, which convert() would clip at 255
        values = np.asarray(upright).astype(np.int32)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError("its pixels have more than 16 bits, of unknown range")
        values += 128
        values //= 257
        upright = Image.fromarray(values.astype(np.uint8))
    return upright.convert("RGB")


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if it is missing or invalid."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # malformed EXIF
        return 1
    return value if value in range(2, 9) else 1


def central_crop(image: Image.Image, size: ImageSize) -> np.ndarray:
    """Return the crop of evaluations (sampling.central_crops) of an RGB image, resized: uint8 [3, H, W]."""
    import torch  # here: sharding uses this module and needs no torch

    from ddae.data.sampling import aspect_of, central_crops

    width, height = torch.tensor([image.width]), torch.tensor([image.height])
    crops = central_crops(torch.zeros(0), width, height, (1.0, 1.0), aspect_of(size))
    left, top, wide, tall = crops.boxes[0].tolist()
    return resize(np.array(image.crop((left, top, left + wide, top + tall))), False, size)
