"""A few images to look at, whole and unmirrored."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddae.config.base import ShardsConfig
from ddae.data.cache import open_cache
from ddae.data.decode import decode_crop
from ddae.data.reader import IN_A_ROW
from ddae.data.shards import Shards, open_shards
from ddae.errors import UserError


class Preview(NamedTuple):
    """Images to look at."""

    images: Tensor  # uint8 [B, 3, S, S]
    held_out: bool  # from validation shards


def preview_images(config: ShardsConfig, size: int, count: int) -> Preview:
    """Images spread evenly over the validation shards beside the training ones; over those if there are none.

    The synthetic back end has no images, and gives zero of them.
    """
    if config.backend == "synthetic":
        return Preview(torch.empty(0, 3, size, size, dtype=torch.uint8), held_out=False)
    folder = Path(config.train)
    split = "val" if folder.is_dir() and any(folder.glob("val-*.tar")) else "train"
    shards = open_shards(config.train, open_cache(config), split)
    places = np.linspace(0, len(shards) - 1, min(count, len(shards))).astype(int).tolist()
    images = [image for place in places if (image := _central(shards, place, size)) is not None]
    if not images:
        raise UserError(f"data.train {config.train!r}: no image can be decoded: run data_prep/check_shards.py --full")
    return Preview(torch.from_numpy(np.stack(images)), held_out=split == "val")


def _central(shards: Shards, sample: int, size: int) -> np.ndarray | None:
    """The largest central square of the first image from `sample` on that can be decoded; None where none can."""
    for each in range(sample, min(sample + IN_A_ROW, len(shards))):
        width, height = int(shards.width[each]), int(shards.height[each])
        side = min(width, height)
        try:
            return decode_crop(shards.read(each), ((width - side) // 2, (height - side) // 2, side, side), False, size)
        except Exception:  # training names what cannot be decoded
            continue
    return None
