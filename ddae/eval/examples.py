"""Images with their classes, as an evaluation reads them: the central crop of every sample, once, in order.

S pixels a side, B images of a batch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddae.config import DataConfig
from ddae.data import pillow
from ddae.data.loader import cache_of
from ddae.data.shards import open_shards
from ddae.errors import UserError

CROP = 0.875  # of the shorter side: what a crop of 224 is of 256


class Examples(NamedTuple):
    """One batch."""

    images: Tensor  # uint8 [B, 3, S, S]
    labels: Tensor  # int64 [B]


class ExampleReader(Dataset):
    """The samples of a split, each with its class. UserError where the shards have no classes."""

    def __init__(self, where: str, split: str, size: int, crop: float = CROP):
        self.shards = open_shards(where, cache_of(DataConfig()), split)
        self.labels = torch.from_numpy(self.shards.labels())
        self.size, self.crop = size, crop

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, sample: int) -> tuple[np.ndarray, int]:
        width, height = int(self.shards.width[sample]), int(self.shards.height[sample])
        side = max(1, round(self.crop * min(width, height)))
        box = ((width - side) // 2, (height - side) // 2, side, side)
        try:
            image = pillow.decode(self.shards.read(sample), box, False, self.size)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.shards.name_of(sample)} cannot be decoded ({error}): mark it bad") from None
        return image, int(self.labels[sample])


def batches(reader: ExampleReader, batch: int, workers: int, device: torch.device) -> Iterator[Examples]:
    """All samples in order, the last batch shorter."""
    loader = DataLoader(reader, batch, num_workers=workers, pin_memory=device.type == "cuda", collate_fn=_collate)
    for images, labels in loader:
        yield Examples(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))


def _collate(samples: list[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)
