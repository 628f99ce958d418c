"""JPEG parsing, decoding and encoding with Pillow (or pillow-simd, which has the same import name), and resizing."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from ddae.config.base import ImageSize, height_width

SOI, EOI = b"\xff\xd8", b"\xff\xd9"  # JPEG markers: start and end of image
SOS = 0xDA  # start of scan: entropy-coded data follows, which cannot contain EOI
STANDALONE = (0x01, *range(0xD0, 0xD9))  # markers without a segment
SEQUENTIAL_FRAMES = (0xC0, 0xC1)  # frame headers of files that code each row of blocks once, from top to bottom
TAIL_BYTES = 1024  # where EOI is searched first: it is nearly always among the last bytes of the file


def resize(crop: np.ndarray, flip: bool, size: ImageSize) -> np.ndarray:
    """Resize with antialiased bicubic interpolation, as torchvision does, and flip horizontally if `flip`.

    uint8 [h, w, 3] -> uint8 [3, H, W]; H and W are those of `size`.
    """
    import torch  # here: sharding uses this module and needs no torch
    from torch.nn import functional as F

    planes = torch.from_numpy(crop).permute(2, 0, 1)[None]  # channels-last strides, which torch resizes faster
    resized = F.interpolate(planes, height_width(size), mode="bicubic", antialias=True)[0]
    return (resized.flip(-1) if flip else resized).numpy()


def is_truncated(file: bytes | memoryview) -> bool:
    """Return whether a JPEG file has no end marker. False for files of other formats."""
    if file[:2] != SOI:
        return False
    scan = next((offset for marker, offset in _segments(file) if marker == SOS), None)
    if scan is None:
        return True
    return EOI not in bytes(file[max(scan, len(file) - TAIL_BYTES) :]) and EOI not in bytes(file[scan:])


def first_rows(data: bytes, rows: int) -> bytes:
    """Return the JPEG with a smaller height in its header, so that a decoder stops soon after the first `rows` rows.

    These rows decode bit-identically to those of the whole file: the header keeps their rows of blocks and one more,
    from which chroma is interpolated. Other files (progressive JPEGs, other formats) are returned unchanged.
    """
    for marker, offset in _segments(data):
        if marker in SEQUENTIAL_FRAMES and len(data) > offset + 10:
            height, num_components = int.from_bytes(data[offset + 5 : offset + 7], "big"), data[offset + 9]
            # Sampling factors of each component: horizontal and vertical, 4 bits each.
            sampling_factors = data[offset + 11 : offset + 10 + 3 * num_components : 3]
            block_rows = 8 * max((factors & 15 for factors in sampling_factors), default=1)
            if not block_rows:  # a damaged header
                break
            new_height = (-(-rows // block_rows) + 1) * block_rows
            if new_height < height:
                return data[: offset + 5] + new_height.to_bytes(2, "big") + data[offset + 7 :]
            break
    return data


def has_stray_bytes(file: bytes | memoryview) -> bool:
    """Return whether bytes between a JPEG's segments belong to none. libjpeg skips them; other decoders may not."""
    end = 2
    for _, offset in _segments(file):
        if offset != end:
            return True
        end = offset + _segment_length(file, offset)
    return False


def _segments(file: bytes | memoryview) -> Iterator[tuple[int, int]]:
    """Yield marker and offset of each segment up to the first scan. Those of an EXIF thumbnail are not included.

    Bytes that belong to no segment are skipped, as in libjpeg.
    """
    offset, marker = 2 if file[:2] == SOI else len(file), 0
    while marker != SOS:
        while offset + 4 <= len(file) and (file[offset] != 0xFF or file[offset + 1] == 0):
            offset += 1
        if offset + 4 > len(file):
            return
        marker = file[offset + 1]
        yield marker, offset
        offset += _segment_length(file, offset)


def _segment_length(file: bytes | memoryview, offset: int) -> int:
    """Return the bytes of a segment with its marker. A marker may be preceded by fill bytes 0xFF."""
    marker = file[offset + 1]
    if marker == 0xFF:
        return 1
    return 2 if marker in STANDALONE else 2 + int.from_bytes(file[offset + 2 : offset + 4], "big")


def decode_crop(encoded: bytes, box: tuple[int, int, int, int], flip: bool, size: ImageSize) -> np.ndarray:
    """Decode a box (left, top, width, height) of an image file and resize() it: uint8 [3, H, W].

    Rows below the box are not decoded. Raise ValueError for a box outside the image, and whatever Pillow raises for a
    file that it cannot decode.
    """
    left, top, width, height = box
    with Image.open(io.BytesIO(first_rows(encoded, top + height))) as image:
        if left + width > image.width or top + height > image.height:
            raise ValueError(f"it has {image.width} x {image.height} pixels, fewer than its manifest states")
        crop = image.crop((left, top, left + width, top + height))
    crop = crop if crop.mode == "RGB" else crop.convert("RGB")  # convert() would copy an RGB image
    return resize(np.array(crop), flip, size)


def encode_image(image: Image.Image, quality: int = 95, file_format: str = "JPEG") -> bytes:
    """Return the image as a file. quality: of a JPEG, 1 to 100."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, quality=quality, comment="")  # that of a GIF may be longer than a JPEG's can be
    return buffer.getvalue()


def decode_image(encoded: bytes) -> np.ndarray:
    """Decode a whole image file, ignoring EXIF orientation: uint8 [3, H, W]. Raise whatever Pillow raises."""
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
