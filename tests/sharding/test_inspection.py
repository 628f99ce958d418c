import io
import struct
import subprocess
import time

import numpy as np
import pytest
from conftest import picture
from image_archives import (
    EXPECTED,
    bomb,
    decode,
    encode,
    irregular_images,
    photo,
    png16,
    rotated,
    unusual_plain_jpegs,
    with_thumbnail,
)
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from ddae.data.decode import is_truncated
from ddae.sharding.inspection import IMAGE_ENDINGS, inspect

IRREGULAR, PLAIN = irregular_images(), unusual_plain_jpegs()


@pytest.mark.parametrize("kind", [kind for kind in EXPECTED if not kind.startswith("duplicate")])
def test_irregular_images_are_classified_and_converted(kind):
    inspected = inspect(IRREGULAR[kind])
    assert list(inspected.kinds) == EXPECTED[kind][0]
    assert (inspected.jpeg is None) == (EXPECTED[kind][1] == "left_out")
    if inspected.jpeg is not None:
        with Image.open(io.BytesIO(inspected.jpeg)) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (inspected.width, inspected.height))
        assert inspect(inspected.jpeg).kinds == ()


@pytest.mark.parametrize("name", PLAIN)
def test_plain_jpegs_keep_their_bytes(name):
    inspected = inspect(PLAIN[name])
    assert inspected.kinds == ()
    assert inspected.jpeg == PLAIN[name]
    with Image.open(io.BytesIO(PLAIN[name])) as image:
        assert (inspected.width, inspected.height) == image.size


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied(orientation):
    data = rotated(3, orientation)
    inspected = inspect(data)
    with Image.open(io.BytesIO(data)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image), np.int32)
    assert inspected.kinds == ("exif_rotated",)
    assert upright.shape[:2] == (inspected.height, inspected.width)
    assert np.abs(decode(inspected.jpeg) - upright).mean() < 3
    with Image.open(io.BytesIO(inspected.jpeg)) as image:
        assert image.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_images_are_scaled_not_clipped(channels):
    inspected = inspect(png16(0, channels))
    ramp = np.linspace(0, 255, 96 * 80 * channels).reshape(80, 96, channels)
    assert np.abs(decode(inspected.jpeg) - ramp).mean() < 2


def test_dark_16_bit_image_stays_dark():
    dark = Image.fromarray(np.ones((40, 40), np.uint16))
    assert decode(inspect(encode(dark, "PNG")).jpeg).max() < 3


def test_cmyk_keeps_its_colours():
    assert np.abs(decode(inspect(IRREGULAR["cmyk"]).jpeg) - decode(encode(picture(902)))).mean() < 12


@pytest.mark.parametrize("save", [{}, {"progressive": True}, {"subsampling": 0}])
def test_truncation_is_detected_at_any_length(save):
    data = photo(5, **save)
    for length in np.random.default_rng(1).integers(1, len(data), 40).tolist():
        assert inspect(data[:length]) == (("truncated",), None, 0, 0), length


@pytest.mark.parametrize("missing", [1, 2])
def test_missing_end_marker_is_detected(missing):
    """For some files Pillow decodes all pixels without reading the end marker."""
    for number in (1, 4, 55, 80, 91, 97):
        for save in ({}, {"progressive": True}, {"subsampling": 0}):
            assert inspect(photo(number, **save)[:-missing]) == (("truncated",), None, 0, 0), (number, save)


def test_truncation_is_detected_with_an_exif_thumbnail():
    data = with_thumbnail(4)
    start = data.index(b"\xff\xd9") + 2  # after the end marker of the thumbnail
    for length in np.linspace(start, len(data) - 2, 12).astype(int).tolist():
        assert inspect(data[:length]) == (("truncated",), None, 0, 0), length


def test_random_damage_raises_nothing():
    rng = np.random.default_rng(0)
    for data in (photo(6), IRREGULAR["png"], IRREGULAR["webp"], IRREGULAR["cmyk"], with_thumbnail(6)):
        for _ in range(30):
            broken = bytearray(data)
            for position in rng.integers(0, min(len(data), 700), 4):
                broken[position] = rng.integers(256)
            inspected = inspect(bytes(broken))
            assert inspected.jpeg is not None or inspected.kinds


def decodes(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).load()
    except Exception:
        return False
    return True


@pytest.mark.parametrize("save", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 2}])
def test_no_damage_that_makes_a_complete_decoding_fail_is_missed(save):
    """Although inspect() computes few pixels. It also finds damage that Pillow does not report."""
    rng, outcomes = np.random.default_rng(2), set()
    for number in range(300):
        broken = bytearray(photo(number % 20, **save))
        for position in rng.integers(2, len(broken) - 2, rng.integers(1, 20)):
            broken[position] = rng.integers(256)
        decodable = decodes(bytes(broken)) and not is_truncated(bytes(broken))
        usable = inspect(bytes(broken)).jpeg is not None
        assert decodable or not usable
        outcomes.add((decodable, usable))
    assert outcomes == {(False, False), (True, False), (True, True)}


def variants(number: int) -> dict[str, bytes]:
    """Return an image as JPEGs of different structure."""
    image, options = picture(number), {"quality": 85}
    two, buffer = image.resize((40, 30)), io.BytesIO()
    image.save(buffer, "MPO", save_all=True, append_images=[two], **options)
    return {
        "baseline": encode(image, **options),
        "4:4:4": encode(image, subsampling=0, **options),
        "progressive": encode(image, progressive=True, **options),
        "restart rows": encode(image, restart_marker_rows=1, **options),
        "restart blocks": encode(image, restart_marker_blocks=3, **options),
        "greyscale": encode(image.convert("L"), **options),
        "CMYK": encode(image.convert("CMYK"), **options),
        "multi-picture": buffer.getvalue(),
    }


@pytest.mark.parametrize("structure", variants(0))
@pytest.mark.parametrize("part", [0.3, 0.5, 0.9, 0.97])
def test_missing_rows_before_an_end_marker_are_detected(structure, part):
    """libjpeg fills them in, with a warning that Pillow does not pass on."""
    for number in range(5):
        data = variants(number)[structure]
        if structure == "multi-picture":  # the first picture of the file
            data = data[: data.index(b"\xff\xd9") + 2]
        start = data.rindex(b"\xff\xda") + 14  # of the last scan
        cut = data[: start + round(part * (len(data) - start))].rstrip(b"\xff") + b"\xff\xd9"
        Image.open(io.BytesIO(cut)).load()  # Pillow reports nothing
        assert inspect(cut) == (("truncated",), None, 0, 0)


@pytest.mark.parametrize("structure", variants(0))
def test_good_jpegs_give_no_alarm(structure):
    for number in range(40):
        kinds = inspect(variants(number)[structure]).kinds
        assert kinds == {"greyscale": ("greyscale",), "CMYK": ("cmyk",)}.get(structure, ())


def test_a_broken_restart_interval_is_damage():
    data = bytearray(encode(picture(3), restart_marker_blocks=2))
    interval = data.index(b"\xff\xd2") + 2
    del data[interval + 3 : data.index(b"\xff\xd3")]
    assert inspect(bytes(data)).kinds[0] in ("truncated", "damaged")
    assert inspect(bytes(data)).jpeg is None


STRAY = {
    "after the header": lambda data, scan: data[:20] + b"\0\x13\x37" + data[20:],
    "before the scan": lambda data, scan: data[:scan] + b"stray" + data[scan:],
    "after the scan": lambda data, scan: data[:-2] + b"\0" * 50 + data[-2:],
}


@pytest.mark.parametrize("place", STRAY)
def test_bytes_between_segments_are_removed(place):
    """Pillow reads such a file; other decoders may not."""
    data = encode(picture(4))
    broken = STRAY[place](data, data.index(b"\xff\xda"))
    assert np.array_equal(decode(broken), decode(data))
    inspected = inspect(broken)
    assert inspected.kinds == ("malformed",)
    assert np.abs(decode(inspected.jpeg) - decode(data)).mean() < 3
    assert inspect(inspected.jpeg).kinds == ()


def test_fill_bytes_and_data_after_the_end_are_no_alarm():
    data = encode(picture(4))
    scan = data.index(b"\xff\xda")
    for unusual in (data[:scan] + b"\xff\xff" + data[scan:], data + b"\0" * 100, data + b"trailer"):
        assert inspect(unusual) == ((), unusual, *picture(4).size)


def broken_metadata() -> dict[str, tuple[bytes, str]]:
    """Return images whose pixels are intact and whose metadata is not, with the kind that is expected."""
    exif, gif, png = Image.Exif(), io.BytesIO(), io.BytesIO()
    exif[0x0112] = 6
    exif[0x9286] = "x" * 50
    with_exif = bytearray(encode(picture(5), exif=exif))
    start = with_exif.index(b"Exif") + 10
    with_exif[start : start + 4] = b"\xff\xff\xff\x7f"
    picture(5).convert("P").save(gif, "GIF", comment=b"x" * 70_000)
    info = PngInfo()
    info.add_text("comment", "x" * 100_000, zip=True)
    picture(5).save(png, "PNG", pnginfo=info)
    return {
        "EXIF with a wrong offset": (bytes(with_exif), ""),
        "EXIF cut off": (encode(picture(5), exif=b"Exif\0\0MM\0*\0"), ""),
        "EXIF of noise": (encode(picture(5), exif=b"Exif\0\0" + np.random.default_rng(3).bytes(300)), ""),
        "GIF with a long comment": (gif.getvalue(), "gif"),
        "PNG with a long text": (png.getvalue(), "png"),
        "JPEG with a long comment": (encode(picture(5), comment=b"x" * 65_000), ""),
        "grey JPEG with a long comment": (encode(picture(5).convert("L"), comment=b"x" * 65_000), "greyscale"),
    }


@pytest.mark.parametrize("case", broken_metadata())
def test_broken_metadata_does_not_lose_an_image(case):
    data, kind = broken_metadata()[case]
    inspected = inspect(data)
    assert inspected.jpeg is not None
    assert [each for each in inspected.kinds if each != "exif_rotated"] == ([kind] if kind else [])


@pytest.mark.parametrize("orientation", [2, 6])
def test_a_rotated_image_with_broken_exif_is_rotated(orientation):
    """Pillow's exif_transpose() fails for it, because it writes the tags again."""
    entries = struct.pack("<HHHIIHHII", 2, 0x0112, 3, 1, orientation, 0x8769, 4, 1, 70_000)  # an offset behind the end
    inspected = inspect(encode(picture(6), exif=b"Exif\0\0II*\0" + struct.pack("<I", 8) + entries + bytes(4)))
    assert inspected.kinds == ("exif_rotated",)
    assert (inspected.width < inspected.height) == ((orientation == 6) == (picture(6).width > picture(6).height))


@pytest.mark.skipif(".avif" not in IMAGE_ENDINGS, reason="this Pillow cannot read AVIF")
def test_avif_is_converted():
    inspected = inspect(encode(picture(7), "AVIF"))
    assert inspected.kinds == ("avif",)
    assert np.abs(decode(inspected.jpeg) - decode(encode(picture(7)))).mean() < 12


def test_rotated_tiff_is_reported():
    rotated, buffer = Image.Exif(), io.BytesIO()
    rotated[0x0112] = 6
    picture(3).resize((40, 30)).save(buffer, "TIFF", exif=rotated)
    inspected = inspect(buffer.getvalue())
    assert set(inspected.kinds) == {"tiff", "exif_rotated"}
    assert (inspected.width, inspected.height) == (30, 40)


def test_decompression_bomb_is_not_decoded():
    start = time.monotonic()
    assert inspect(IRREGULAR["bomb"]) == (("bomb",), None, 0, 0)
    assert inspect(bomb(8193, 8192)) == (("bomb",), None, 0, 0)
    assert time.monotonic() - start < 2


def test_no_external_program_is_run(monkeypatch):
    """Pillow would pass Encapsulated PostScript to Ghostscript, whatever the name of the file."""
    called = []
    for name in ("check_call", "run", "Popen", "check_output"):
        monkeypatch.setattr(subprocess, name, lambda *args, **kwargs: called.append(args))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    inspected = inspect(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n")
    assert inspected.jpeg is None
    assert called == []


@pytest.mark.parametrize("size", [(100, 61), (61, 100), (64, 64), (2000, 90)])
def test_shorter_side_is_resized(size):
    inspected = inspect(encode(picture(1).resize(size)), resize_shorter=32)
    assert inspected.kinds == ()
    assert min(inspected.width, inspected.height) == 32
    assert abs(inspected.width - size[0] * 32 / min(size)) <= 1
    assert abs(inspected.height - size[1] * 32 / min(size)) <= 1
    assert decode(inspected.jpeg).shape[:2] == (inspected.height, inspected.width)


def test_smaller_image_is_not_resized():
    for size in (32, 10):
        data = encode(picture(1).resize((size, 90)))
        assert inspect(data, resize_shorter=32).jpeg == data


def test_rotated_image_is_upright_and_resized():
    data = rotated(8, 6)
    inspected = inspect(data, resize_shorter=32)
    with Image.open(io.BytesIO(data)) as image:
        width, height = ImageOps.exif_transpose(image).size
    assert inspected.kinds == ("exif_rotated",)
    assert (width > height) == (inspected.width > inspected.height)
    assert min(inspected.width, inspected.height) == 32


def test_quality_applies_to_converted_images_only():
    low, high = (inspect(IRREGULAR["png"], quality=quality).jpeg for quality in (20, 95))
    assert len(low) < len(high)
    assert inspect(photo(1), quality=20).jpeg == photo(1)
