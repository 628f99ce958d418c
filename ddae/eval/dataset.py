"""Labelled validation and training images for downstream tasks: the central crop of each sample, once, in order.

B: batch size, N: number of samples, S: image side in pixels.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddae.config.base import ShardsConfig
from ddae.data.cache import Cache, open_cache
from ddae.data.decode import decode_crop
from ddae.data.loader import Loader, ignore_signals
from ddae.data.sampling import central_crops
from ddae.data.shards import open_shards
from ddae.distributed.comm import is_main, rank, world_size
from ddae.errors import UserError

logger = logging.getLogger(__name__)


class ExampleBatch(NamedTuple):
    """A batch of images with their classes."""

    images: Tensor  # uint8 [B, 3, S, S]
    labels: Tensor  # int64 [B]; -1 for padding
    indices: Tensor  # int64 [B]: positions in the reader


class ExampleReader(Dataset):
    """Map-style data set of a split's images and classes."""

    def __init__(
        self,
        source: str,
        split: str,
        size: int,
        cache: Cache | None = None,
        labelled: bool = True,
        max_images: int = 0,
        samples: Tensor | None = None,
    ):
        """Open the shards and read the classes.

        source: as data.train. size: image side in pixels. max_images: number of samples to use, spread evenly over the
        split; 0: all. samples: int64 [N], use these alone. Raise UserError if the shards have no classes and `labelled`
        is set; otherwise `labels` is empty and every class is 0.
        """
        self.shards, self.size = open_shards(source, cache or open_cache(ShardsConfig()), split), size
        count = min(max_images or len(self.shards), len(self.shards))
        self.samples = torch.arange(count) * len(self.shards) // count if samples is None else samples
        self.labels = torch.empty(0, dtype=torch.int64)
        try:
            self.labels = torch.from_numpy(self.shards.labels(self.samples.numpy()))
        except UserError:
            if labelled:
                raise
        sides = torch.from_numpy(self.shards.width), torch.from_numpy(self.shards.height)
        self.boxes = central_crops(torch.zeros(0), *sides, (1.0, 1.0)).boxes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Return an image, uint8 [3, S, S], and its class. Raise UserError if it cannot be decoded."""
        sample = int(self.samples[index])
        try:
            image = decode_crop(self.shards.read(sample), tuple(self.boxes[sample].tolist()), False, self.size)
        except UserError:
            raise
        except Exception as error:  # decoders raise many kinds of errors for a damaged file
            raise UserError(
                f"{self.shards.sample_name(sample)} cannot be decoded ({error}). "
                "Exclude it with data_prep/check_shards.py --full --mark_bad."
            ) from None
        return image, int(self.labels[index]) if len(self.labels) else 0


def val_location(train: str, val: str = "") -> str:
    """Return where the validation shards are: `val` if it is given, else the folder of the training shards.

    Raise UserError if `val` is empty and `train` is a pattern of tar files.
    """
    if not val and train.endswith(".tar"):
        raise UserError(
            f"data.train is {train}, a list of shards; without --val a folder with splits train and val is expected. "
            "Pass that folder as --data.train, or the validation shards as --val."
        )
    return val or train


class Labels(NamedTuple):
    """The classes of a training split."""

    targets: Tensor  # int64 [N]: class of each sample
    names: list[str]  # of the classes

    @property
    def num_classes(self) -> int:
        return len(self.names)


def training_labels(loader: Loader, val: ExampleReader) -> Labels:
    """Return the classes of the loader's samples.

    Raise UserError if the training data have no classes, or the validation images have classes beyond them.
    """
    if loader.shards is None:
        raise UserError(
            f"data.backend is {loader.config.backend}, whose images have no classes. Name shards with classes."
        )
    targets, names = torch.from_numpy(loader.shards.labels()), [str(name) for name in loader.shards.classes]
    names += [str(number) for number in range(len(names), int(targets.max()) + 1)]
    if int(val.labels.max()) >= len(names):
        raise UserError(
            f"the validation images have class {int(val.labels.max())}, but {loader.config.train} has {len(names)} "
            "classes. Write the shards of both splits with the same list of classes."
        )
    return Labels(targets, names)


def batches(reader: ExampleReader, batch_size: int, workers: int, device: torch.device) -> Iterator[ExampleBatch]:
    """Yield all samples in order; the last batch may be smaller."""
    yield from _load_batches(reader, range(len(reader)), batch_size, workers, device)


def batches_of_rank(
    reader: ExampleReader, batch_size: int, workers: int, device: torch.device
) -> Iterator[ExampleBatch]:
    """Yield this rank's samples: rank, rank + world size, and so on; the same number of batches on every rank.

    Ranks that run out of samples are padded with the first samples of the split, whose label is -1.
    """
    share = range(rank(), len(reader) + -len(reader) % world_size(), world_size())
    padded = [index % len(reader) for index in share]
    for number, batch in enumerate(_load_batches(reader, padded, batch_size, workers, device)):
        is_padding = torch.tensor(share[number * batch_size : (number + 1) * batch_size], device=device) >= len(reader)
        yield batch._replace(labels=batch.labels.masked_fill(is_padding, -1))


def _load_batches(
    reader: ExampleReader, indices: Sequence[int], batch_size: int, workers: int, device: torch.device
) -> Iterator[ExampleBatch]:
    """Yield batches of the samples at these positions, on the device."""
    positions = torch.tensor(indices, dtype=torch.int64).split(batch_size)
    loaded = load_samples(reader, indices, workers, batch_size, device.type == "cuda")
    for (images, labels), of_batch in zip(loaded, positions, strict=False):  # one empty part if there are no samples
        yield ExampleBatch(*(each.to(device, non_blocking=True) for each in (images, labels, of_batch)))


def load_samples(
    reader: Dataset, indices: Sequence[int], workers: int, batch_size: int | None = None, pin_memory: bool = False
) -> Iterator[Any]:
    """Yield the samples of a map-style data set at these positions, in order, read by `workers` processes.

    batch_size: yield stacked images and labels; None: single samples. Raise UserError if the data set raises one, in
    whichever process.
    """
    loader = DataLoader(
        _UserErrorsAsSamples(reader),
        batch_size,
        sampler=indices,
        collate_fn=_collate if batch_size else None,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
    )
    stream = iter(loader)
    try:
        for sample in stream:
            if isinstance(sample, _ErrorMessage):
                if not is_main():  # commands print UserErrors on rank 0 alone, which may not raise this one
                    logger.error(sample.text)
                raise UserError(sample.text)
            yield sample
    finally:
        if workers:  # an error's traceback may keep the iterator alive, and interpreter exit would wait for its workers
            stream._shutdown_workers()  # type: ignore[attr-defined]


class _ErrorMessage(NamedTuple):
    """The message of a UserError. Raised in a worker process, the error would arrive with a traceback in its text."""

    text: str


class _UserErrorsAsSamples(Dataset):
    """A data set that returns the message of a UserError instead of raising it."""

    def __init__(self, reader: Dataset):
        self.reader = reader

    def __getitem__(self, index: int) -> Any:
        try:
            return self.reader[index]
        except UserError as error:
            return _ErrorMessage(str(error))


def _collate(samples: list[Any]) -> Any:
    """Return images uint8 [B, 3, S, S] and labels int64 [B], or the first error message."""
    for sample in samples:
        if isinstance(sample, _ErrorMessage):
            return sample
    images, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)
