"""A few images for the figures of a run's report."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddae.config.base import ImageSize, ShardsConfig, height_width
from ddae.data.cache import open_cache
from ddae.data.decode import decode_crop
from ddae.data.reader import MAX_CONSECUTIVE_BAD
from ddae.data.sampling import aspect_of
from ddae.data.shards import Shards, open_shards
from ddae.errors import UserError


class Preview(NamedTuple):
    """Images for figures."""

    images: Tensor  # uint8 [B, 3, H, W]
    held_out: bool  # from validation shards


def preview_images(config: ShardsConfig, size: ImageSize, count: int) -> Preview:
    """Load images spread evenly over the validation shards beside the training shards; if there are none, over these.

    Images are the largest central boxes of the size's aspect, resized, not flipped. The synthetic back end has none:
    return B = 0. Raise UserError if no image can be decoded.
    """
    if config.backend == "synthetic":
        return Preview(torch.empty(0, 3, *height_width(size), dtype=torch.uint8), held_out=False)
    folder = Path(config.sources[0])
    split = "val" if folder.is_dir() and any(folder.glob("val-*.tar")) else "train"
    shards = open_shards(config.sources[0] if split == "val" else config.sources, open_cache(config), split)
    samples = np.linspace(0, len(shards) - 1, min(count, len(shards))).astype(int).tolist()
    images = [image for sample in samples if (image := _central_image(shards, sample, size)) is not None]
    if not images:
        fix = "Find the damage with data_prep/check_shards.py --full."
        raise UserError(f"data.train is {config.train!r}, of which no image can be decoded. {fix}")
    return Preview(torch.from_numpy(np.stack(images)), held_out=split == "val")


def _central_image(shards: Shards, first: int, size: ImageSize) -> np.ndarray | None:
    """Decode the largest central box of the first decodable image from sample `first` on: uint8 [3, H, W]."""
    rows, columns = aspect_of(size)
    for sample in range(first, min(first + MAX_CONSECUTIVE_BAD, len(shards))):
        width, height = int(shards.width[sample]), int(shards.height[sample])
        unit = min(width / columns, height / rows)
        wide, tall = max(1, int(unit * columns)), max(1, int(unit * rows))
        box = ((width - wide) // 2, (height - tall) // 2, wide, tall)
        try:
            return decode_crop(shards.read(sample), box, False, size)
        except Exception:  # training reports undecodable samples
            continue
    return None
