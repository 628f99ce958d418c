"""Labelled validation and training images for downstream tasks: the central crop of each sample, once, in order.

B: batch size, N: number of samples, S: image side in pixels.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddae.config.base import ImageSize, ShardsConfig, height_width
from ddae.config.evaluation import Evaluation
from ddae.config.tokenizer import TokenizerConfig
from ddae.data.cache import Cache, open_cache
from ddae.data.decode import decode_crop
from ddae.data.loader import Loader, ignore_signals
from ddae.data.memory import require_shared_memory
from ddae.data.sampling import aspect_of, central_crops
from ddae.data.shards import Shards, open_shards
from ddae.distributed.comm import is_main, rank, world_size
from ddae.distributed.cores import num_workers
from ddae.errors import UserError

logger = logging.getLogger(__name__)
PREFETCH = 2  # samples, or batches, that each worker process keeps ready


class ExampleBatch(NamedTuple):
    """A batch of images with their classes."""

    images: Tensor  # uint8 [B, 3, S, S]
    labels: Tensor  # int64 [B]; -1 for padding
    indices: Tensor  # int64 [B]: positions in the reader


class SplitReader(Dataset):
    """Map-style data set of a split's samples. Subclasses define decode()."""

    shards: Shards
    samples: Tensor | range  # of the shards
    sample_bytes: int  # of what decode() returns

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        """Return what decode() returns. Raise UserError if the sample cannot be decoded."""
        sample = int(self.samples[index])
        try:
            return self.decode(index, sample)
        except UserError:
            raise
        except Exception as error:  # decoders raise many kinds of errors for a damaged file
            raise UserError(
                f"{self.shards.sample_name(sample)} cannot be decoded ({error}). "
                "Exclude it with data_prep/check_shards.py --full --mark_bad."
            ) from None

    def decode(self, index: int, sample: int) -> Any:
        """Return the sample at this position."""
        raise NotImplementedError


class ExampleReader(SplitReader):
    """A split's images, uint8 [3, H, W], and classes, int."""

    def __init__(
        self,
        source: str | tuple[str, ...],
        split: str,
        size: ImageSize,
        cache: Cache | None = None,
        labelled: bool = True,
        max_images: int = 0,
        samples: Tensor | None = None,
    ):
        """Open the shards and read the classes.

        source: as data.train. max_images: number of samples to use, spread evenly over the
        split; 0: all. samples: int64 [N], use these alone. Raise UserError if the shards have no classes and `labelled`
        is set; otherwise `labels` is empty and every class is 0.
        """
        self.shards, self.size = open_shards(source, cache or open_cache(ShardsConfig()), split), size
        self.sample_bytes = 3 * math.prod(height_width(size))
        count = min(max_images or len(self.shards), len(self.shards))
        self.samples = torch.arange(count) * len(self.shards) // count if samples is None else samples
        self.labels = torch.empty(0, dtype=torch.int64)
        try:
            self.labels = torch.from_numpy(self.shards.labels(self.samples.numpy()))
        except UserError:
            if labelled:
                raise
        width, height = (
            torch.from_numpy(each[self.samples.numpy()].astype(np.int64))
            for each in (self.shards.width, self.shards.height)
        )
        self.boxes = central_crops(torch.zeros(0), width, height, (1.0, 1.0), aspect_of(size)).boxes

    def decode(self, index: int, sample: int) -> tuple[np.ndarray, int]:
        image = decode_crop(self.shards.read(sample), tuple(self.boxes[index].tolist()), False, self.size)
        return image, int(self.labels[index]) if len(self.labels) else 0


def val_location(train: str | tuple[str, ...], val: str = "") -> str:
    """Return where the validation shards are: `val` if it is given, else the folder of the training shards.

    Of several folders, the first one. Raise UserError if `val` is empty and `train` is a pattern of tar files.
    """
    if not isinstance(train, str):
        train = train[0]
    if not val and train.endswith(".tar"):
        raise UserError(
            f"data.train is {train}, a list of shards; without --val a folder with splits train and val is expected. "
            "Pass that folder as --data.train, or the validation shards as --val."
        )
    return val or train


def validation_reader(config: Evaluation | TokenizerConfig, size: ImageSize, labelled: bool = True) -> ExampleReader:
    """Open the validation shards of an experiment. labelled: see ExampleReader."""
    source = val_location(config.data.train, config.val)
    return ExampleReader(source, "val", size, open_cache(config.data), labelled)


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


def batches(
    reader: ExampleReader,
    batch_size: int,
    workers: int | None,
    device: torch.device,
    indices: Sequence[int] | None = None,
) -> Iterator[ExampleBatch]:
    """Yield all samples in order, or those at the indices, on the device; the last batch may be smaller.

    Indices from len(reader) on count from the first sample again.
    """
    indices = range(len(reader)) if indices is None else indices
    parts = [list(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size)]
    loaded = load_samples(reader, parts, workers, pin_memory=device.type == "cuda")
    for (images, labels), part in zip(loaded, parts, strict=True):
        yield ExampleBatch(*(each.to(device, non_blocking=True) for each in (images, labels, torch.tensor(part))))


def rank_share(count: int) -> range:
    """Return this rank's indices of `count` samples: rank, rank + world size, and so on; equally many on every rank.

    Indices from `count` on are padding.
    """
    return range(rank(), count + -count % world_size(), world_size())


def batches_of_rank(
    reader: ExampleReader, batch_size: int, workers: int | None, device: torch.device
) -> Iterator[ExampleBatch]:
    """Yield this rank's samples, see rank_share(); the same number of batches on every rank. Padding has label -1."""
    for batch in batches(reader, batch_size, workers, device, rank_share(len(reader))):
        yield batch._replace(labels=batch.labels.masked_fill(batch.indices >= len(reader), -1))


def load_samples(
    reader: SplitReader, indices: Sequence[int] | Sequence[list[int]], workers: int | None, pin_memory: bool = False
) -> Iterator[Any]:
    """Yield the samples of a data set at these indices, in order, read by num_workers(workers) processes.

    indices: for each list of indices, images uint8 [B, 3, S, S] and labels int64 [B] are yielded. Indices from
    len(reader) on count from the first sample again. Raise UserError if the data set raises one, in whichever process.
    """
    workers = num_workers(workers)
    if workers and len(indices):
        samples = 1 if isinstance(indices[0], int) else len(indices[0])  # that travel together; the last may be fewer
        require_shared_memory(workers * PREFETCH * samples * reader.sample_bytes, workers)
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": pin_memory, "worker_init_fn": ignore_signals}
    options |= {"prefetch_factor": PREFETCH} if workers else {}
    stream = iter(DataLoader(_Samples(reader), batch_size=None, sampler=indices, **options))
    try:
        for sample in stream:
            if isinstance(sample, UserError):
                if not is_main():  # commands print UserErrors on rank 0 alone, which may not raise this one
                    logger.error("%s", sample)
                raise sample
            yield sample
    finally:
        if workers:  # an error's traceback may keep the iterator alive, and interpreter exit would wait for its workers
            stream._shutdown_workers()  # type: ignore[attr-defined]


class _Samples(Dataset):
    """Samples of a reader, and lists of them as tensors.

    A UserError is returned: raised in a worker process, it would arrive with a traceback in its text.
    """

    def __init__(self, reader: SplitReader):
        self.reader = reader

    def __getitem__(self, key: int | list[int]) -> Any:
        try:
            if isinstance(key, int):
                return self.reader[key % len(self.reader)]
            images, labels = zip(*(self.reader[index % len(self.reader)] for index in key), strict=True)
        except UserError as error:
            return error
        return torch.from_numpy(np.stack(images)), torch.tensor(labels)
