"""A folder of images as data.train: sharded once into the cache, with a part set aside for validation."""

import os
from dataclasses import replace
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from filelock import FileLock
from PIL import Image

from ddae.config.base import Experiment, ImageSize, ShardsConfig, height_width
from ddae.data.cache import is_url
from ddae.data.manifest import MANIFEST
from ddae.errors import UserError, say
from ddae.sharding.archives import ARCHIVE_ENDINGS
from ddae.sharding.index import UNLABELLED, Index, hash64
from ddae.sharding.scan import LabelRule
from ddae.sharding.sharder import Settings, shard
from ddae.sharding.sources import build_index

T = TypeVar("T", bound=Experiment)
BURST = 20  # consecutive images of a folder that stay in one split
MIN_IMAGES = 100  # in a folder; fewer teach an encoder nothing
MIN_SHORTER = 512  # pixels; larger images are reduced to this shorter side, or to SIZE_FACTOR times model.image_size
SIZE_FACTOR = 2.3  # the smallest default crop, a fifth of the area, is not enlarged
SAMPLED = 200  # images whose size is read before sharding


class Photos(NamedTuple):
    """The images of a folder."""

    train: Index
    val: Index | None  # None: data.val_share is 0


def is_photo_folder(location: str | tuple[str, ...]) -> bool:
    """Return whether data.train is a folder of images, not of shards."""
    if not isinstance(location, str) or not location or is_url(location):
        return False
    folder = Path(location).expanduser()
    if folder.is_file() and not location.lower().endswith((*ARCHIVE_ENDINGS, ".idx")):
        raise UserError(f"data.train is {location}, a file. Pass the folder that contains the images.")
    if not folder.is_dir() or (folder / MANIFEST).exists():
        return False
    return not any(each.name.lower().endswith(ARCHIVE_ENDINGS) for each in folder.iterdir())


def scan_photos(data: ShardsConfig) -> Photos:
    """Find the images of the folder data.train, in any tree, and divide them into training and validation.

    A folder with train/ and val/ is divided as it is. Raise UserError if there are fewer than MIN_IMAGES, or if
    data.labels is folders and there are no class folders.
    """
    assert isinstance(data.train, str)
    return _scan(str(Path(data.train).expanduser()), data.labels, data.val_share)


@lru_cache(maxsize=1)
def _scan(folder: str, labels: str, val_share: float) -> Photos:
    rule = LabelRule(labels="none" if labels == "none" else "auto")
    try:
        index = build_index("train", folder, rule=rule)
    except UserError as error:
        raise UserError(str(error).replace(f"--train {folder}", folder, 1)) from None
    if labels == "folders" and (index.label == UNLABELLED).any():
        raise UserError(f"data.labels is folders, but {folder} contains no class folders. Pass --data.labels none.")
    if len(index) < MIN_IMAGES:
        fix = "Pass a folder with more images."
        raise UserError(f"{folder} contains {len(index)} images; expected at least {MIN_IMAGES}. {fix}")
    if "images of another split" in index.tally.left_out.counts:
        known = index.classes if labels == "folders" else None
        return Photos(index, build_index("val", folder, known, rule=rule))
    in_val = choose_validation(index, val_share)
    if not in_val.any():
        return Photos(index, None)
    return Photos(index.take(np.flatnonzero(~in_val)), index.take(np.flatnonzero(in_val), "val"))


def choose_validation(index: Index, share: float) -> np.ndarray:
    """Return which images of a folder are for validation: bool [N], about `share` of them.

    BURST consecutive images of a folder, by name, are chosen together, so that similar photos stay on one side. The
    choice depends on the names of folders and the images' places in them, not on other folders.
    """
    starts = np.flatnonzero(np.diff(index.folder_number, prepend=-1))
    first_of_folder = np.repeat(starts, np.diff(np.append(starts, len(index))))
    burst = (np.arange(len(index)) - first_of_folder) // BURST
    firsts = np.flatnonzero(np.diff(index.folder_number, prepend=-1) | np.diff(burst, prepend=-1))
    names = (f"{index.folders[index.folder_number[i]].path}/{burst[i]}" for i in firsts.tolist())
    order = np.argsort(np.array([hash64(name) for name in names], np.int64), kind="stable")
    sizes = np.diff(np.append(firsts, len(index)))
    wanted = int(np.searchsorted(np.cumsum(sizes[order]), share * len(index))) + 1 if share else 0
    chosen = np.zeros(len(firsts), bool)
    chosen[order[: min(wanted, len(firsts) - 1)]] = True
    return np.repeat(chosen, sizes)


def typical_side(index: Index) -> int:
    """Return the median shorter side, in pixels, of SAMPLED images, by their headers; 0 if none can be read."""
    sides = []
    for i in np.unique(np.linspace(0, len(index) - 1, SAMPLED).astype(int)).tolist():
        try:
            with Image.open(index.file(i) / index.name(i)) as image:
                sides.append(min(image.size))
        except Exception:  # Pillow raises many kinds of errors; the sharder reports such a file
            continue
    return int(np.median(sides)) if sides else 0


def with_shards(config: T, image_size: ImageSize) -> T:
    """Return the config with data.train replaced by the shards of the folder of images that it names.

    They are made unless the cache holds them. All ranks may call it; one on each machine makes them. Progress is
    printed. Raise UserError if no image is usable, or if the cache cannot be written; then nothing is left behind.
    """
    photos = scan_photos(config.data)
    splits = [each for each in photos if each is not None]
    shorter = max(MIN_SHORTER, ceil(SIZE_FACTOR * max(height_width(image_size)) / 16) * 16)
    identity = "".join(each.fingerprint() for each in splits) + str(shorter)
    cache = Path(config.data.cache)
    out = cache / f"photos-{hash64(identity) % 2**64:016x}"
    is_first = os.environ.get("RANK", "0") == "0"
    if not (out / MANIFEST).exists():
        lock = cache / f".{out.name}.lock"
        created = [folder for folder in (cache, *cache.absolute().parents) if not folder.exists()]
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                settings = Settings(resize_shorter=shorter)
                summary = shard(splits, out, settings, os.cpu_count() or 1)
        except PermissionError as error:
            fix = "Pass another folder as --data.cache."
            raise UserError(f"the cache {cache} cannot be written ({error.strerror}). {fix}") from None
        finally:
            lock.unlink(missing_ok=True)
            if not out.exists():
                for folder in created:
                    folder.rmdir()
        if is_first:
            say(summary)
    if is_first:
        counts = ", ".join(f"{len(each):,} for {each.split}" for each in splits)
        say(f"images of {config.data.train}: {counts}; shards: {out}")
    return replace(config, data=replace(config.data, train=str(out)))
