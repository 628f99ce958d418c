"""Memory of the sharder's main process, in bytes an image."""

import io
import tarfile
import tracemalloc
from array import array

import pytest
from image_archives import encode
from PIL import Image

from ddae.data.shard_writer import import_webdataset
from ddae.sharding.index import Strings
from ddae.sharding.sharder import Settings, shard
from ddae.sharding.sources import build_index

TINY = {form: encode(Image.new("RGB", (16, 16), (90, 40, 10)), form) for form in ("JPEG", "PNG")}


def write_archive(path, form, label_files, count):
    """Write different images of equal length: each may be a duplicate. Classes: label files or folders."""
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            name = f"image_{number:08d}" if label_files else f"class_{number % 10}/image_{number:08d}"
            add(archive, f"{name}.{form.lower()}", TINY[form] + b"%08d" % number)
            if label_files:
                add(archive, f"{name}.cls", b"%d" % (number % 10))


def add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def peak_memory(folder, form, label_files, count):
    """Return the most bytes that were allocated at a time while the images were sharded."""
    write_archive(folder / f"{count}.tar", form, label_files, count)
    tracemalloc.start()
    try:
        shard([build_index("train", str(folder / f"{count}.tar"))], folder / str(count), Settings(max_count=125), 2)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("form, label_files", [("JPEG", True), ("PNG", False)])  # PNGs are converted and reported
def test_main_process_needs_less_than_100_bytes_an_image(form, label_files, tmp_path):
    import_webdataset()
    peak_memory(tmp_path, form, label_files, 10)  # caches
    few, many = (peak_memory(tmp_path, form, label_files, count) for count in (2000, 6000))  # shards of 125
    assert (many - few) / 4000 <= 100


def test_strings_may_exceed_the_range_of_their_ends():
    strings, names = Strings(), [f"image_{number}".encode() for number in range(60)]
    strings._ends = array("B")  # up to 255 bytes, as array("I") is up to 4 GiB
    for name in names:
        strings.append(name)
    assert (list(strings), strings._ends.typecode) == (names, "Q")
