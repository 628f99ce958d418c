"""Inspect an image file: whether it is a plain RGB JPEG, how it differs from one, and what is stored in a shard.

Every image is decoded completely. If it decodes but is not a plain RGB JPEG, it is converted to an upright one; if it
does not decode, it is unusable. JPEGs are decoded by libjpeg-turbo in strict mode, because Pillow ignores its warnings.
"""

import io
import re
import warnings
from typing import NamedTuple

import simplejpeg
from PIL import Image, features

from ddae.data.decode import SOI, encode_image, has_stray_bytes, is_truncated
from ddae.data.photo import orientation, upright_rgb

MAX_PIXELS = 1 << 26  # 67 million; ImageNet's largest image has 61 million
MAX_BYTES = 1 << 28  # of one image file: 256 MiB
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # decoded by Pillow itself, without other programs
IMAGE_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGE_ENDINGS += (".ppm", ".pgm", ".pbm", ".pnm")
UNSUPPORTED_ENDINGS = (".heic", ".heif", ".jp2", ".j2k", ".jxl", ".dng", ".cr2", ".nef", ".arw", ".svg", ".psd", ".raw")
if features.check("avif"):
    FORMATS += ("AVIF",)
    IMAGE_ENDINGS += (".avif",)
else:  # pillow-simd, or an older Pillow
    UNSUPPORTED_ENDINGS += (".avif",)
# libjpeg's warnings after which pixels are wrong. Others are about bytes that it skips, and about headers.
DAMAGE = re.compile(r"premature end|bad Huffman code|instead of RST|extraneous bytes before marker 0xd[0-7]")

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is the stricter limit
warnings.filterwarnings("ignore", module="PIL")  # about malformed metadata; damaged pixels are detected below


class Inspection(NamedTuple):
    """The result of inspecting an image file."""

    kinds: tuple[str, ...]  # differences from a plain RGB JPEG (docs/data.md lists them); empty: none
    jpeg: bytes | None  # stored in a shard; None: the file is unusable
    width: int = 0  # pixels
    height: int = 0  # pixels


def inspect(data: bytes, resize_shorter: int = 0, quality: int = 95) -> Inspection:
    """Decode an image file, and convert it if it is not a plain RGB JPEG or is too large.

    An image whose shorter side exceeds resize_shorter (pixels; 0: no limit) is resized to it. quality: of every JPEG
    that is encoded here; plain RGB JPEGs that are not resized keep their bytes.
    """
    if not data:
        return Inspection(("empty",), None)
    try:
        return _inspect(data, resize_shorter, quality)
    except Image.DecompressionBombError:
        return Inspection(("bomb",), None)
    except Exception as error:  # Pillow's decoders raise many types of errors for a damaged file
        is_cut = "truncated" in str(error) or _lacks_end(data)
        return Inspection(("truncated" if is_cut else "unreadable",), None)


def _inspect(data: bytes, resize_shorter: int, quality: int) -> Inspection:
    """Return what inspect() does. Raise whatever Pillow raises for a file that it cannot decode."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS or len(data) > MAX_BYTES:
        return Inspection(("bomb",), None)
    if is_truncated(data):
        return Inspection(("truncated",), None)
    size, downscale = image.size, 0 < resize_shorter < min(image.size)
    rotated = orientation(image) != 1  # read before load(), which rotates a TIFF
    warning = _libjpeg_warning(data) if data.startswith(SOI) else None
    if warning is not None and DAMAGE.search(warning):
        return Inspection(("truncated" if "premature end" in warning else "damaged",), None)
    malformed = warning is not None or has_stray_bytes(data)
    if not data.startswith(SOI) or malformed or downscale:
        image.load()
    kinds = (*_kinds(image, data, rotated), *(("malformed",) if malformed else ()))
    if not kinds and not downscale:
        return Inspection((), data, *size)
    image = upright_rgb(image)
    if downscale:
        scale = resize_shorter / min(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)  # type: ignore[arg-type]
    return Inspection(kinds, encode_image(image, quality), *image.size)


def _libjpeg_warning(data: bytes) -> str | None:
    """Return the first warning or error of libjpeg-turbo about a JPEG; None: none.

    It reads all coded blocks, and computes the pixels at 1/8 scale.
    """
    try:
        simplejpeg.decode_jpeg(data, min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:
        return str(error)
    return None


def make_thumbnail(data: bytes) -> bytes | None:
    """Return a JPEG of the image within 128 x 128 pixels; None if it cannot be decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.draft(image.mode, (128, 128))  # decodes a JPEG at 1/2, 1/4 or 1/8 of its size, but not below 128
        image = upright_rgb(image)
        image.thumbnail((128, 128))
        return encode_image(image, 85)
    except Exception:  # as in inspect()
        return None


def _kinds(image: Image.Image, data: bytes, rotated: bool) -> tuple[str, ...]:
    """Return how a decoded image differs from a plain RGB JPEG."""
    kinds = []
    if image.format not in ("JPEG", "MPO"):  # MPO: several JPEGs in one file; the first is decoded
        kinds.append(str(image.format).lower())  # png, webp, gif, ...
    if image.mode.startswith("I") or (image.format == "PNG" and data[24:25] == b"\x10"):
        kinds.append("16bit")
    if image.mode.startswith(("1", "L", "I")):
        kinds.append("greyscale")
    elif image.mode == "CMYK":
        kinds.append("cmyk")
    if rotated or orientation(image) != 1:  # a PNG may have its EXIF after its pixels
        kinds.append("exif_rotated")
    return tuple(kinds)


def _lacks_end(data: bytes) -> bool:
    """Return whether a file that does not decode starts as an image file does and lacks its end."""
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-64:]
    if data.startswith(b"RIFF"):
        return len(data) < int.from_bytes(data[4:8], "little") + 8
    return is_truncated(data)
