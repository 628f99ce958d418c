"""Image files to pixels with Pillow (or pillow-simd, which has the same import name), one image at a time."""

import io
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F


def resize(crop: np.ndarray, flip: bool, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [3, S, S], bicubic with antialiasing as torchvision's, flipped left to right or not."""
    planes = torch.from_numpy(crop).permute(2, 0, 1)[None]  # torch is fast where the colours of a pixel lie together
    resized = F.interpolate(planes, (size, size), mode="bicubic", antialias=True)[0]
    return (resized.flip(-1) if flip else resized).numpy()


SOI, EOI = b"\xff\xd8", b"\xff\xd9"  # begin and end of an image
SOS = 0xDA  # marker of a scan: coded pixels follow, in which no EOI can occur
SEQUENTIAL = (0xC0, 0xC1)  # markers of frames whose rows are coded from top to bottom, once
TAIL = 1024  # bytes; the end of the image is nearly always among the last of the file


def is_cut(file: bytes | memoryview) -> bool:
    """Whether a file that begins as a JPEG does lacks its end."""
    if file[:2] != SOI:
        return False
    scan = next((place for marker, place in _segments(file) if marker == SOS), None)
    if scan is None:
        return True
    return EOI not in bytes(file[max(scan, len(file) - TAIL) :]) and EOI not in bytes(file[scan:])


def first_rows(data: bytes, rows: int) -> bytes:
    """The file with its height lowered, so that a decoder stops after the first `rows` rows, or a few more.

    Those rows are what the whole file gives, to the bit: the file's own rows of blocks are kept, and one row more, from
    which the colours of the last are interpolated. Returned as it is where that cannot be: progressive files, no JPEG.
    """
    for marker, place in _segments(data):
        if marker in SEQUENTIAL and len(data) > place + 10:
            height, components = int.from_bytes(data[place + 5 : place + 7], "big"), data[place + 9]
            sampling = data[place + 11 : place + 10 + 3 * components : 3]  # of each: across and down, 4 bits each
            block = 8 * max((each & 15 for each in sampling), default=1)
            kept = (-(-rows // block) + 1) * block
            if kept < height:
                return data[: place + 5] + kept.to_bytes(2, "big") + data[place + 7 :]
            break
    return data


def _segments(file: bytes | memoryview) -> Iterator[tuple[int, int]]:
    """Marker and place of each segment of a JPEG up to its first scan; an EXIF thumbnail's own are passed over."""
    place, marker = 2 if file[:2] == SOI else len(file), 0
    while marker != SOS and place + 4 <= len(file) and file[place] == 0xFF:
        marker = file[place + 1]
        yield marker, place
        # A marker may be preceded by more bytes 0xFF; a segment's length counts its own two bytes.
        place += 1 if marker == 0xFF else 2 + int.from_bytes(file[place + 2 : place + 4], "big")


def decode_crop(encoded: bytes, box: tuple[int, int, int, int], flip: bool, size: int) -> np.ndarray:
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


def decode_image(encoded: bytes) -> np.ndarray:
    """An image file as it is stored: uint8 [3, H, W]. Raises what Pillow raises for a file that it cannot decode."""
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
