"""What can be told and done about a JPEG file without decoding it."""

SOI, EOI, SOS = b"\xff\xd8", b"\xff\xd9", b"\xff\xda"  # begin of image, end of image, start of scan
SEQUENTIAL = (0xC0, 0xC1)  # frames whose rows are coded from top to bottom, once
TAIL = 1024  # bytes; the end of the image is nearly always among the last of the file


def is_cut(file: bytes | memoryview) -> bool:
    """Whether a file that begins as a JPEG does lacks its end."""
    if file[:2] != SOI or EOI in bytes(file[-TAIL:]):
        return False
    data = bytes(file)
    return data.rfind(EOI) <= data.rfind(SOS)  # an EXIF thumbnail has an end of its own, before the scan


def first_rows(data: bytes, rows: int) -> bytes:
    """The file with its height lowered, so that a decoder stops after the first `rows` rows, or a few more.

    Those rows are what the whole file gives, to the bit: the file's own rows of blocks are kept, and one row more, from
    which the colours of the last are interpolated. Returned as it is where that cannot be: progressive files, no JPEG.
    """
    place = 2 if data.startswith(SOI) else len(data)
    while place + 11 < len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in SEQUENTIAL:
            height = int.from_bytes(data[place + 5 : place + 7], "big")
            components = data[place + 9]
            block = 8 * max(data[place + 11 + 3 * i] & 15 for i in range(components))
            kept = (-(-rows // block) + 1) * block
            if kept >= height:
                return data
            return data[: place + 5] + kept.to_bytes(2, "big") + data[place + 7 :]
        if marker == SOS[1] or (0xC2 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return data
        place += 2 + length
    return data
