"""Small inputs for the sharder: plain and irregular images, archives as ImageNet's, folders, webdataset shards."""

import hashlib
import importlib.util
import io
import json
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import scipy.io
from conftest import picture
from PIL import Image, ImageCms

from ddae import errors
from ddae.data.manifest import read_index, read_manifest

Files = dict[str, bytes]  # path -> content
ROOT = Path(__file__).parents[2]
# Leaf synsets of the devkit as (ILSVRC2012_ID, WNID, words). As in the real devkit, ids are not in the order of WNIDs.
LEAVES = [
    (1, "n02119789", "kit fox, Vulpes macrotis"),
    (2, "n02100735", "English setter"),
    (3, "n01440764", "tench, Tinca tinca"),
    (4, "n03388549", "four-poster"),
    (5, "n02110185", "Siberian husky"),
]
INNER = [(6, "n00001740", "entity"), (7, "n02084071", "dog, domestic dog")]
WNIDS = sorted(wnid for _, wnid, _ in LEAVES)


def encode(image: Image.Image, form: str = "JPEG", **save) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **save)
    return buffer.getvalue()


def photo(number: int, **save) -> bytes:
    """Return a plain JPEG, a different one for each number."""
    return encode(picture(number), **{"quality": 90, **save})


def decode(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"), np.int32)


def rotated(number: int, orientation: int, **save) -> bytes:
    """Return a JPEG with this EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return photo(number, exif=exif, **save)


def with_thumbnail(number: int) -> bytes:
    """Return a JPEG with a complete thumbnail JPEG in its EXIF, as cameras write it."""
    thumbnail = encode(picture(number).resize((32, 24)))
    head = b"II*\0" + struct.pack("<IHI", 8, 0, 14)  # the first directory is empty, the second follows
    fields = [(0x0103, 3, 1, 6), (0x0201, 4, 1, 56), (0x0202, 4, 1, len(thumbnail))]
    second = struct.pack("<H", 3) + b"".join(struct.pack("<HHII", *field) for field in fields) + bytes(4)
    exif = b"Exif\0\0" + head + second
    return photo(number, exif=exif + thumbnail)


def png16(number: int, channels: int) -> bytes:
    """Return a 16-bit PNG of 1 or 3 channels: a ramp over the whole range."""
    ramp = np.linspace(0, 65535, 96 * 80 * channels).reshape(80, 96, channels).astype(np.uint16) ^ number
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in ramp)
    header = struct.pack(">IIBBBBB", 96, 80, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    return _png(header, zlib.compress(rows))


def bomb(width: int = 20000, height: int = 20000) -> bytes:
    """Return a small file of very many pixels: a PNG of one grey value."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    return _png(struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), rows)


def _png(header: bytes, rows: bytes) -> bytes:
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    with_checksums = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(with_checksums)


# The expected kinds and action of each image of irregular_images().
EXPECTED = {
    "cmyk": (["cmyk"], "converted"),
    "greyscale": (["greyscale"], "converted"),
    "png": (["png"], "converted"),
    "webp": (["webp"], "converted"),
    "png_16bit": (["png", "16bit", "greyscale"], "converted"),
    "png_16bit_rgb": (["png", "16bit"], "converted"),
    "exif_rotated": (["exif_rotated"], "converted"),
    "grey_and_rotated": (["greyscale", "exif_rotated"], "converted"),
    "cut_10": (["truncated"], "left_out"),
    "cut_50": (["truncated"], "left_out"),
    "cut_90": (["truncated"], "left_out"),
    "cut_99": (["truncated"], "left_out"),
    "cut_end": (["truncated"], "left_out"),
    "cut_progressive": (["truncated"], "left_out"),
    "empty": (["empty"], "left_out"),
    "garbage": (["unreadable"], "left_out"),
    "bomb": (["bomb"], "left_out"),
    "duplicate_key": (["duplicate_key"], "kept"),
    "duplicate": (["duplicate"], "kept"),
}


def irregular_images() -> Files:
    """Return kind -> an image of that kind. `duplicate` is photo(0); `duplicate_key` differs in its name only."""
    baseline, progressive = photo(900), photo(901, progressive=True)
    exif = Image.Exif()
    exif[0x0112] = 8
    return {
        "cmyk": encode(picture(902).convert("CMYK"), quality=90),
        "greyscale": encode(picture(903).convert("L"), quality=90),
        "png": encode(picture(904), "PNG"),
        "webp": encode(picture(905), "WEBP"),
        "png_16bit": png16(0, 1),
        "png_16bit_rgb": png16(1, 3),
        "exif_rotated": rotated(906, 6),
        "grey_and_rotated": encode(picture(907).convert("L"), quality=90, exif=exif),
        "cut_10": baseline[: len(baseline) // 10],
        "cut_50": baseline[: len(baseline) // 2],
        "cut_90": baseline[: len(baseline) * 9 // 10],
        "cut_99": baseline[: len(baseline) * 99 // 100],
        "cut_end": baseline[:-2],
        "cut_progressive": progressive[: len(progressive) * 9 // 10],
        "empty": b"",
        "garbage": np.random.default_rng(9).bytes(3000),
        "bomb": bomb(),
        "duplicate_key": photo(908),
        "duplicate": photo(0),
    }


def unusual_plain_jpegs() -> Files:
    """Return plain RGB JPEGs with unusual structure, which must not be reported."""
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return {
        "progressive": photo(950, progressive=True),
        "exif_upright": rotated(951, 1),
        "exif_zero": rotated(952, 0),
        "thumbnail": with_thumbnail(953),
        "trailing": photo(954) + b"\0 and more after the end",
        "trailing_start": photo(955) + photo(956)[:200],
        "444": photo(957, subsampling=0),
        "422": photo(958, subsampling=1),
        "420": photo(959, subsampling=2),
        "rgb_without_jfif": photo(960, keep_rgb=True),
        "tiny": encode(picture(961).resize((1, 1))),
        "narrow": encode(picture(962).resize((8, 3000))),
        "icc": photo(963, icc_profile=icc),
        "restarts": photo(964, restart_marker_blocks=1),
        "comment": photo(965, comment=b"\xff\xd8\xff\xda no marker"),
        "mpo": encode(picture(966), "MPO", save_all=True, append_images=[picture(967).resize(picture(966).size)]),
    }


def write_tar(path: Path, files: Files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(files))
    return path


def tar_of(files: Files, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def tar_with(path: Path, name: str, member_type: bytes, target: str = "") -> Path:
    """Write a tar of two photos with a member of another type between them."""
    with tarfile.open(path, "w") as archive:
        for each in ("first.jpg", name, "last.jpg"):
            member = tarfile.TarInfo(each)
            if each == name:
                member.type, member.linkname = member_type, target
            content = photo(1) if member.isfile() else b""
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def class_tars(classes: dict[str, Files]) -> Files:
    return {f"{name}.tar": tar_of(files) for name, files in classes.items()}


def write_folder(root: Path, files: Files) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def class_folders(classes: dict[str, Files]) -> Files:
    return {f"{group}/{name}": content for group, files in classes.items() for name, content in files.items()}


def imagenet(per_class: int = 4, start: int = 0, wnids=WNIDS) -> dict[str, Files]:
    """Return class -> its photos, named as in ImageNet. The classes are not in the order of their names."""
    classes = {}
    for number, wnid in enumerate(sorted(wnids, key=lambda wnid: wnid[::-1])):
        numbers = range(start + number * per_class, start + (number + 1) * per_class)
        classes[wnid] = {f"{wnid}_{each}.JPEG": photo(each) for each in numbers}
    return classes


def val_files(count: int, start: int = 500) -> Files:
    return {f"ILSVRC2012_val_{i + 1:08d}.JPEG": photo(start + i) for i in range(count)}


def write_devkit(path: Path, truth: list[int], leaves=LEAVES, packed: bool = True) -> Path:
    """Write a devkit with meta.mat in ILSVRC2012's structure and this ground truth, as .tar.gz or as folder."""
    inner = [(number, wnid, words, 2) for number, wnid, words in INNER]
    fields = "ILSVRC2012_ID WNID words gloss num_children children wordnet_height num_train_images".split()
    synsets = np.zeros((len(leaves) + len(inner), 1), [(field, object) for field in fields])
    for row, (number, wnid, words, children) in zip(
        synsets[:, 0], [*((*leaf, 0) for leaf in leaves), *inner], strict=True
    ):
        below = np.array([[1.0, 2.0]]) if children else np.zeros((1, 0))
        for field, value in zip(fields, (float(number), wnid, words, "a gloss", children, below, 3, 1300), strict=True):
            row[field] = value
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    files = {
        "ILSVRC2012_devkit_t12/readme.txt": b"Development kit",
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "".join(
            f"{number}\n" for number in truth
        ).encode(),
    }
    if packed:
        path.write_bytes(tar_of(files, "w:gz"))
        return path
    return write_folder(path, files)


def web_shards(folder: Path, samples: list[tuple[str, bytes, int]], form: str, split: str = "train") -> Path:
    """Write shards as timm does (KEY.jpg + KEY.cls) or as Hugging Face does (KEY.jpg + KEY.json)."""
    for number in range(0, len(samples), 7):
        files = {}
        for key, data, label in samples[number : number + 7]:
            if form == "cls":
                files |= {f"{key}.cls": str(label).encode(), f"{key}.jpg": data}
            else:
                files |= {f"{key}.jpg": data, f"{key}.json": json.dumps({"label": label, "width": 9}).encode()}
        write_tar(folder / f"imagenet-{split}-{number // 7:04d}.tar", files)
    return folder


def contents(folder: Path) -> Files:
    """Return path -> content of everything below a folder; the content of a folder is b"/"."""
    return {
        str(path.relative_to(folder)): b"/" if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def read_samples(folder: Path, split: str = "") -> dict[str, tuple[bytes, int | None]]:
    """Return "SHARD:KEY" -> image and label of all samples. Check that each index locates the images."""
    samples = {}
    for shard in read_manifest(folder)["shards"]:
        if not shard.startswith(split):
            continue
        with tarfile.open(folder / shard) as archive:
            files = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
        content = (folder / shard).read_bytes()
        keys, index = read_index((folder / shard).with_suffix(".idx"))
        for key, (offset, length) in zip(keys, index.tolist(), strict=True):
            assert content[offset : offset + length] == files[f"{key}.jpg"]
            label = files.get(f"{key}.cls")
            samples[f"{shard}:{key}"] = (files[f"{key}.jpg"], None if label is None else int(label))
    return samples


def labels_of(folder: Path, split: str = "") -> dict[str, int | None]:
    """Return SHA-256 -> label of each image."""
    return {hashlib.sha256(data).hexdigest(): label for data, label in read_samples(folder, split).values()}


def keys_of(folder: Path, split: str = "") -> set[str]:
    return {name.partition(":")[2] for name in read_samples(folder, split)}


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def run_script(name: str, *args: object) -> int:
    """Run a script of data_prep/ in this process. Return its exit code."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "data_prep" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    argv, sys.argv = sys.argv, [name, *map(str, args)]
    try:
        spec.loader.exec_module(module)
        errors.run_command(name, module.main)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = argv
    raise AssertionError("the script did not exit")


def shard_imagenet(*args: object) -> int:
    return run_script("shard_imagenet", "--workers", 1, *args)
