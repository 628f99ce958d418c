"""Looking at one image file: is it a plain RGB JPEG, what is odd about it, and what it becomes in a shard.

Every image is decoded to its end. An odd one that decodes becomes an RGB JPEG, upright; the rest cannot be used.
"""

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ddae.data.decode import is_cut

MAX_PIXELS = 1 << 26  # 67 million; ImageNet's largest has 61
MAX_BYTES = 1 << 28  # of one image file: 256 MiB
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # what Pillow itself decodes
ORIENTATION = 0x0112  # EXIF's tag; 1 is upright

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is the stricter guard
warnings.filterwarnings("ignore", module="PIL")  # of metadata that is odd or cut: what matters is found below


class Finding(NamedTuple):
    """What was found in an image file."""

    kinds: tuple[str, ...]  # what is odd: none for a plain RGB JPEG
    jpeg: bytes | None  # what goes into a shard; None where the file cannot be used
    width: int = 0
    height: int = 0


def inspect(data: bytes, resize_shorter: int = 0, quality: int = 95) -> Finding:
    """Decode an image file and say what it is.

    Where the shorter side is larger than resize_shorter (pixels; 0: never) the image is made smaller. What is not kept
    byte for byte is written as JPEG of that quality.
    """
    if not data:
        return Finding(("empty",), None)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS or len(data) > MAX_BYTES:
            return Finding(("bomb",), None)
        if image.mode == "F":
            return Finding(("unreadable",), None)  # numbers of no known range
        size, smaller = image.size, 0 < resize_shorter < min(image.size)
        turned = _orientation(image) != 1  # which loading a TIFF undoes
        if not smaller:  # a JPEG's coded blocks are all read, where damage shows, but few pixels made of them
            image.draft(image.mode, (1, 1))
        image.load()
        if is_cut(data):  # all pixels came, the last of them perhaps guessed
            return Finding(("truncated",), None)
        kinds = _kinds(image, data, turned)
    except Image.DecompressionBombError:
        return Finding(("bomb",), None)
    except Exception:  # Pillow's decoders raise whatever a broken file leads them to
        return Finding(("truncated" if _lacks_its_end(data) else "unreadable",), None)
    if not kinds and not smaller:
        return Finding((), data, *size)
    if image.size != size:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    image = _upright_rgb(image)
    if smaller:
        share = resize_shorter / min(image.size)
        image = image.resize([max(1, round(side * share)) for side in image.size], Image.Resampling.LANCZOS)  # type: ignore[arg-type]
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Finding(kinds, buffer.getvalue(), image.width, image.height)


def thumbnail(data: bytes) -> bytes | None:
    """A JPEG of the image within 128 x 128 pixels; None for one that cannot be decoded."""
    try:
        image, buffer = Image.open(io.BytesIO(data), formats=FORMATS), io.BytesIO()
        image.draft(image.mode, (128, 128))  # a JPEG is decoded at half its size or less, as long as it stays above
        image = _upright_rgb(image)
        image.thumbnail((128, 128))
        image.save(buffer, "JPEG", quality=85)
    except Exception:  # as in inspect
        return None
    return buffer.getvalue()


def _kinds(image: Image.Image, data: bytes, turned: bool) -> tuple[str, ...]:
    """What is odd about an opened image that has all its pixels."""
    kinds = []
    if image.format not in ("JPEG", "MPO"):  # MPO: several JPEGs in one file, of which the first is read
        kinds.append(str(image.format).lower())  # png, webp, gif, ...
    if image.mode.startswith("I") or (image.format == "PNG" and data[24:25] == b"\x10"):
        kinds.append("16bit")
    if image.mode.startswith(("1", "L", "I")):
        kinds.append("greyscale")
    elif image.mode == "CMYK":
        kinds.append("cmyk")
    if turned or _orientation(image) != 1:  # of a PNG it may come last
        kinds.append("exif_rotated")
    return tuple(kinds)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken metadata says nothing
        return 1
    return value if value in range(2, 9) else 1


def _lacks_its_end(data: bytes) -> bool:
    """Whether a file that does not decode begins as an image does and lacks its end."""
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-64:]
    if data.startswith(b"RIFF"):
        return len(data) < int.from_bytes(data[4:8], "little") + 8
    return is_cut(data)


def _upright_rgb(image: Image.Image) -> Image.Image:
    """The image as a person sees it: turned as its EXIF says, three channels of 8 bits."""
    upright = ImageOps.exif_transpose(image) if _orientation(image) != 1 else image
    if upright.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
        values = np.asarray(upright).astype(np.int32)
        np.clip(values, 0, 65535, out=values)
        values += 128
        values //= 257
        upright = Image.fromarray(values.astype(np.uint8))
    return upright.convert("RGB")
