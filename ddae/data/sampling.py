"""Which sample comes when, and how it is cropped and flipped: pure functions of (seed, epoch, sample).

A run's position is one integer, the number of samples seen. Position p lies in epoch p // E, where an epoch's E is all
N samples, each once (what is left of its last batch goes to the next epoch), or as many of them as whole batches take.
No rank or worker has a say in it. B positions at a time.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddae.data.rng import fold, permutation, uniform

WINDOW = 16  # shards that are shuffled together: reads stay within this many files
ATTEMPTS = 10  # random crops tried before a central one is taken
ASPECT = (3 / 4, 4 / 3)  # of a crop's width to its height
CENTRE = 0.875  # of the shorter side
CROP_STREAM, FLIP_STREAM = 1000, 1001  # of the sample's counter; masks use those below 1000


class Crops(NamedTuple):
    """Where each sample is cut and whether it is mirrored."""

    boxes: Tensor  # int64 [B, 4]: left, top, width, height in pixels
    flips: Tensor  # bool [B]


class EpochOrder:
    """The order of a data set whose shard s holds samples first[s] to first[s + 1] - 1.

    whole_batches_of: leave out what does not fill a batch of this size at an epoch's end; other samples each epoch.
    """

    def __init__(self, first: np.ndarray, seed: int, whole_batches_of: int = 1):
        self.first = torch.as_tensor(first)
        self.seed = seed
        self.num_samples = int(first[-1])
        self.epoch_samples = self.num_samples // whole_batches_of * whole_batches_of
        self.epoch_order = lru_cache(maxsize=2)(self._epoch_order)  # a batch may span two epochs

    def _epoch_order(self, epoch: int) -> Tensor:
        """All samples in the order of one epoch: shards permuted, then shuffled over windows of them."""
        shards = permutation(len(self.first) - 1, self.seed, epoch, -1)
        windows = []
        for number, window in enumerate(shards.split(WINDOW)):
            samples = torch.cat([torch.arange(int(self.first[s]), int(self.first[s + 1])) for s in window])
            windows.append(samples[permutation(len(samples), self.seed, epoch, number)])
        return torch.cat(windows)

    def samples(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B] positions -> epoch and sample of each."""
        epochs, places = positions // self.epoch_samples, positions % self.epoch_samples
        samples = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            samples[here] = self.epoch_order(epoch)[places[here]]
        return epochs, samples

    def shards_near(self, position: int) -> list[int]:
        """The shards that the window of a position reads, and those of the next one, perhaps of the next epoch."""
        epoch, place = divmod(position, self.epoch_samples)
        shards = permutation(len(self.first) - 1, self.seed, epoch, -1)
        ends = (self.first[shards + 1] - self.first[shards]).cumsum(0)
        start = int(torch.searchsorted(ends, place, right=True)) // WINDOW * WINDOW
        near = shards[start : start + 2 * WINDOW].tolist()
        if start + WINDOW >= len(shards):
            near += permutation(len(shards), self.seed, epoch + 1, -1)[:WINDOW].tolist()
        return list(dict.fromkeys(near))

    def seeds(self, epochs: Tensor, samples: Tensor) -> Tensor:
        """The counter of everything random about each sample in its epoch: int64 [B]."""
        return fold(self.seed, epochs, samples)


def random_crops(seeds: Tensor, width: Tensor, height: Tensor, scale: tuple[float, float]) -> Crops:
    """RandomResizedCrop's boxes and fair flips: a box of random area and aspect that fits, else a central one.

    seeds, width and height int64 [B]; scale: the share of the area that a box covers.
    """
    draws = uniform(seeds, ATTEMPTS * 4, CROP_STREAM).view(-1, ATTEMPTS, 4)
    area = (width * height)[:, None] * (scale[0] + (scale[1] - scale[0]) * draws[..., 0])
    low, high = np.log(ASPECT)
    aspect = (low + (high - low) * draws[..., 1]).exp()
    wide, tall = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (wide >= 1) & (tall >= 1) & (wide <= width[:, None]) & (tall <= height[:, None])
    left = (draws[..., 2] * (width[:, None] - wide + 1)).long()
    top = (draws[..., 3] * (height[:, None] - tall + 1)).long()
    chosen = fits.to(torch.uint8).argmax(1, keepdim=True)  # the first that fits
    boxes = torch.stack([left, top, wide, tall], -1).gather(1, chosen[..., None].expand(-1, -1, 4))[:, 0]
    boxes = torch.where(fits.any(1, keepdim=True), boxes, _central(width, height))
    return Crops(boxes, uniform(seeds, 1, FLIP_STREAM)[:, 0] < 0.5)


def clamped_crops(seeds: Tensor, width: Tensor, height: Tensor, scale: tuple[float, float]) -> Crops:
    """Boxes of random area and aspect, drawn once and clamped to the image (MAE, for linear probes), and fair flips."""
    draws = uniform(seeds, 4, CROP_STREAM)
    area = (width * height) * (scale[0] + (scale[1] - scale[0]) * draws[:, 0])
    low, high = np.log(ASPECT)
    aspect = (low + (high - low) * draws[:, 1]).exp()
    wide = torch.minimum((area * aspect).sqrt().round().long().clamp(min=1), width)
    tall = torch.minimum((area / aspect).sqrt().round().long().clamp(min=1), height)
    left, top = (draws[:, 2] * (width - wide + 1)).long(), (draws[:, 3] * (height - tall + 1)).long()
    return Crops(torch.stack([left, top, wide, tall], -1), uniform(seeds, 1, FLIP_STREAM)[:, 0] < 0.5)


def central_crops(seeds: Tensor, width: Tensor, height: Tensor, scale: tuple[float, float]) -> Crops:
    """The middle square, 7/8 of the shorter side (what 224 is of 256), never flipped: as evaluations see images."""
    side = (CENTRE * torch.minimum(width, height)).round().long().clamp(min=1)
    boxes = torch.stack([(width - side) // 2, (height - side) // 2, side, side], -1)
    return Crops(boxes, torch.zeros_like(side, dtype=torch.bool))


CropFn = Callable[[Tensor, Tensor, Tensor], Crops]  # seeds, widths and heights, int64 [B]
CUTS = {"random": random_crops, "once": clamped_crops, "centre": central_crops}


def crop_policy(kind: str, scale: tuple[float, float]) -> CropFn:
    """Crops of a kind that config knows by name."""
    return partial(CUTS[kind], scale=scale)


def _central(width: Tensor, height: Tensor) -> Tensor:
    """The largest central box whose aspect is allowed."""
    wide = torch.minimum(width, (height * ASPECT[1]).round().long()).clamp(min=1)
    tall = torch.minimum(height, (width / ASPECT[0]).round().long()).clamp(min=1)
    return torch.stack([(width - wide) // 2, (height - tall) // 2, wide, tall], -1)
