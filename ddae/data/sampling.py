"""Sample order, crop boxes and flips: pure functions of (seed, epoch, sample).

A run's position is one integer, the number of samples seen. Position p belongs to epoch p // E. An epoch's E samples
are all N samples once each (its incomplete last batch is completed from the next epoch), or with drop_remainder_of as
many of them as fill whole batches. The order does not depend on ranks or workers. B: number of positions.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from math import gcd
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddae.config.base import ImageSize, height_width
from ddae.data.rng import fold, permutation, uniform

SHUFFLE_WINDOW = 16  # shards whose samples are shuffled together; bounds the number of files that are read at a time
MAX_ATTEMPTS = 10  # random boxes tried before the central one is taken
ASPECT_RANGE = (3 / 4, 4 / 3)  # width over height of a crop, over that of the encoder's images
CENTRE_FRACTION = 0.875  # size of central_crops over that of the largest box of the same aspect
SQUARE = (1, 1)  # aspect of the encoder's images: height and width, without a common divisor
CROP_STREAM, FLIP_STREAM = 1000, 1001  # random streams of a sample's seed; masks use those below 1000


class Crops(NamedTuple):
    """Crop box and horizontal flip of each sample."""

    boxes: Tensor  # int64 [B, 4]: left, top, width, height in pixels
    flips: Tensor  # bool [B]


class EpochOrder:
    """The order of a data set whose shard s holds samples shard_starts[s] to shard_starts[s + 1] - 1.

    drop_remainder_of: global batch size; samples that do not fill a batch at the end of an epoch are dropped, different
    ones in each epoch. 1: none. repeats: how often an epoch contains each shard, int64 [S]; default: once.
    """

    def __init__(
        self, shard_starts: np.ndarray, seed: int, drop_remainder_of: int = 1, repeats: np.ndarray | None = None
    ):
        self.shard_starts = torch.as_tensor(shard_starts)
        self.seed = seed
        num_shards = len(self.shard_starts) - 1
        self.repeats = torch.ones(num_shards, dtype=torch.int64) if repeats is None else torch.as_tensor(repeats)
        self._units = torch.arange(num_shards).repeat_interleave(self.repeats)  # shards, as often as an epoch has them
        first = (self.repeats.cumsum(0) - self.repeats)[self._units]
        self._unit_repeat = torch.arange(len(self._units)) - first  # 0, 1, ... for the units of one shard
        self.num_samples = int(shard_starts[-1])
        self.epoch_total = int((self.shard_starts.diff() * self.repeats).sum())  # before the remainder is dropped
        self.epoch_samples = self.epoch_total // drop_remainder_of * drop_remainder_of
        self._windows_of = lru_cache(maxsize=2)(self._windows)  # a batch may span two epochs
        self._window_of = lru_cache(maxsize=4)(self._window)

    def _windows(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the units in the order of an epoch, and the positions in it at which windows of them start.

        The last start is the number of samples.
        """
        units = permutation(len(self._units), self.seed, epoch, -1)
        ends = self.shard_starts.diff()[self._units[units]].cumsum(0)
        last = torch.arange(len(units)) % SHUFFLE_WINDOW == SHUFFLE_WINDOW - 1
        last[-1] = True
        return units, torch.cat([torch.zeros(1, dtype=torch.int64), ends[last]])

    def _window(self, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        """Return the samples of one window in the order of an epoch, and the passes over their shards so far."""
        units = self._windows_of(epoch)[0][number * SHUFFLE_WINDOW : (number + 1) * SHUFFLE_WINDOW]
        shards = self._units[units]
        ranges = [torch.arange(int(self.shard_starts[s]), int(self.shard_starts[s + 1])) for s in shards]
        samples = torch.cat(ranges)
        passes = (epoch * self.repeats[shards] + self._unit_repeat[units]).repeat_interleave(
            torch.tensor([len(each) for each in ranges])
        )
        order = permutation(len(samples), self.seed, epoch, number)
        return samples[order], passes[order]

    def samples(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return how often each position's shard has been passed before, and the sample: two int64 [B].

        Without repeats the first is the epoch. Crops and masks are drawn from both.
        """
        epochs, offsets = positions // self.epoch_samples, positions % self.epoch_samples
        passes, samples = torch.empty_like(positions), torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            starts = self._windows_of(epoch)[1]
            windows = torch.searchsorted(starts, offsets, right=True) - 1
            for window in windows[epochs == epoch].unique().tolist():
                chosen = (epochs == epoch) & (windows == window)
                of_window, its_passes = self._window_of(epoch, window)
                places = offsets[chosen] - starts[window]
                samples[chosen], passes[chosen] = of_window[places], its_passes[places]
        return passes, samples

    def shards_near(self, position: int) -> list[int]:
        """Return the shards of the position's shuffle window and of the next one, which may be in the next epoch."""
        epoch, offset = divmod(position, self.epoch_samples)
        units, starts = self._windows_of(epoch)
        start = (int(torch.searchsorted(starts, offset, right=True)) - 1) * SHUFFLE_WINDOW
        near = units[start : start + 2 * SHUFFLE_WINDOW]
        if start + SHUFFLE_WINDOW >= len(units):
            near = torch.cat([near, self._windows_of(epoch + 1)[0][:SHUFFLE_WINDOW]])
        return list(dict.fromkeys(self._units[near].tolist()))

    def seeds(self, epochs: Tensor, samples: Tensor) -> Tensor:
        """Return the seed of each sample in its epoch, from which its crop and mask are drawn: int64 [B]."""
        return fold(self.seed, epochs, samples)


def random_crops(
    seeds: Tensor, width: Tensor, height: Tensor, scale: tuple[float, float], aspect: tuple[int, int] = SQUARE
) -> Crops:
    """Sample the boxes of torchvision's RandomResizedCrop, and flips with probability 0.5.

    seeds, width and height: int64 [B]; scale: range of the box's area over the image's; aspect: of the encoder's
    images, which the boxes have up to ASPECT_RANGE. If no box of MAX_ATTEMPTS fits, the largest central one of an
    allowed aspect is taken.
    """
    draws = uniform(seeds, MAX_ATTEMPTS * 4, CROP_STREAM).view(-1, MAX_ATTEMPTS, 4)
    boxes = _random_boxes(draws, width[:, None], height[:, None], scale, aspect)
    wide, tall = boxes[..., 2], boxes[..., 3]
    fits = (wide >= 1) & (tall >= 1) & (wide <= width[:, None]) & (tall <= height[:, None])
    first_fit = fits.to(torch.uint8).argmax(1, keepdim=True)
    boxes = boxes.gather(1, first_fit[..., None].expand(-1, -1, 4))[:, 0]
    boxes = torch.where(fits.any(1, keepdim=True), boxes, _largest_central_boxes(width, height, aspect))
    return Crops(boxes, uniform(seeds, 1, FLIP_STREAM)[:, 0] < 0.5)


def clamped_crops(
    seeds: Tensor, width: Tensor, height: Tensor, scale: tuple[float, float], aspect: tuple[int, int] = SQUARE
) -> Crops:
    """Sample boxes as random_crops() does, but once each and clamped to the image (MAE's linear probe); same flips."""
    boxes = _random_boxes(uniform(seeds, 4, CROP_STREAM), width, height, scale, aspect, clamp=True)
    return Crops(boxes, uniform(seeds, 1, FLIP_STREAM)[:, 0] < 0.5)


def central_crops(
    seeds: Tensor, width: Tensor, height: Tensor, scale: tuple[float, float], aspect: tuple[int, int] = SQUARE
) -> Crops:
    """Return the central box of 7/8 of the largest one of this aspect, not flipped: the crop of evaluations.

    For a square it is 7/8 of the shorter side, 224 of 256.
    """
    rows, columns = aspect
    largest = CENTRE_FRACTION * torch.minimum(width * rows, height * columns)  # width x rows of the box
    wide, tall = ((largest / each).round().long().clamp(min=1) for each in (rows, columns))
    boxes = torch.stack([(width - wide) // 2, (height - tall) // 2, wide, tall], -1)
    return Crops(boxes, torch.zeros_like(wide, dtype=torch.bool))


CropFn = Callable[[Tensor, Tensor, Tensor], Crops]  # seeds, widths, heights: int64 [B]
CROP_FNS = {"random": random_crops, "clamped": clamped_crops, "centre": central_crops}  # by data.crop


def crop_policy(kind: str, scale: tuple[float, float], size: ImageSize = 1) -> CropFn:
    """Return the crop function for data.crop, data.crop_scale and the encoder's image size."""
    return partial(CROP_FNS[kind], scale=scale, aspect=aspect_of(size))


def aspect_of(size: ImageSize) -> tuple[int, int]:
    """Return height and width without a common divisor."""
    height, width = height_width(size)
    divisor = gcd(height, width)
    return height // divisor, width // divisor


def _random_boxes(
    draws: Tensor,
    width: Tensor,
    height: Tensor,
    scale: tuple[float, float],
    aspect: tuple[int, int],
    clamp: bool = False,
) -> Tensor:
    """Return boxes of a random area, aspect and position, clamped to the image or not: [..., 4] -> int64 [..., 4].

    draws: uniform in [0, 1).
    """
    area = width * height * (scale[0] + (scale[1] - scale[0]) * draws[..., 0])
    low, high = np.log(_aspect_range(aspect))
    wide_over_tall = (low + (high - low) * draws[..., 1]).exp()
    wide, tall = (area * wide_over_tall).sqrt().round().long(), (area / wide_over_tall).sqrt().round().long()
    if clamp:
        wide, tall = torch.minimum(wide.clamp(min=1), width), torch.minimum(tall.clamp(min=1), height)
    left, top = (draws[..., 2] * (width - wide + 1)).long(), (draws[..., 3] * (height - tall + 1)).long()
    return torch.stack([left, top, wide, tall], -1)


def _aspect_range(aspect: tuple[int, int]) -> tuple[float, float]:
    """Return the smallest and largest width over height of a crop for images of an aspect."""
    rows, columns = aspect
    return ASPECT_RANGE[0] * columns / rows, ASPECT_RANGE[1] * columns / rows


def _largest_central_boxes(width: Tensor, height: Tensor, aspect: tuple[int, int]) -> Tensor:
    """Return the largest central box of an allowed aspect: int64 [B, 4]."""
    low, high = _aspect_range(aspect)
    wide = torch.minimum(width, (height * high).round().long()).clamp(min=1)
    tall = torch.minimum(height, (width / low).round().long()).clamp(min=1)
    return torch.stack([(width - wide) // 2, (height - tall) // 2, wide, tall], -1)
