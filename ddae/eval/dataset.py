"""Images with their classes, as an evaluation reads them: the central crop of every sample, once, in order.

S pixels a side, B images of a batch.
"""

import sys
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


class Examples(NamedTuple):
    """One batch."""

    images: Tensor  # uint8 [B, 3, S, S]
    labels: Tensor  # int64 [B]


class ExampleReader(Dataset):
    """The samples of a split, each with its class.

    most: so many of them, evenly over the split; all where it is 0. samples: these alone, int64. UserError where the
    shards have no classes, unless they need not be labelled: `labels` is empty then, and every class is 0.
    """

    def __init__(
        self,
        where: str,
        split: str,
        size: int,
        cache: Cache | None = None,
        labelled: bool = True,
        most: int = 0,
        samples: Tensor | None = None,
    ):
        self.shards, self.size = open_shards(where, cache or open_cache(ShardsConfig()), split), size
        count = min(most or len(self.shards), len(self.shards))
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

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        sample = int(self.samples[number])
        try:
            image = decode_crop(self.shards.read(sample), tuple(self.boxes[sample].tolist()), False, self.size)
        except UserError:
            raise
        except Exception as error:  # decoders raise whatever a broken file leads them to
            raise UserError(f"{self.shards.sample_name(sample)} cannot be decoded ({error}): mark it bad") from None
        return image, int(self.labels[number]) if len(self.labels) else 0


def held_out(train: str, val: str = "") -> str:
    """Where validation images are: `val`, or the folder of the training shards; UserError where neither says it."""
    if not val and train.endswith(".tar"):
        raise UserError(
            f"data.train {train!r} names its shards one by one: name a folder, or those to validate on with --val"
        )
    return val or train


class Labels(NamedTuple):
    """The classes of a training split."""

    numbers: Tensor  # int64 [N], of every sample
    names: list[str]  # as many as there are classes

    @property
    def count(self) -> int:
        return len(self.names)


def labels_of(loader: Loader, val: ExampleReader) -> Labels:
    """The classes of the loader's samples; UserError where it has none, or `val` has classes beyond them."""
    where = loader.config.train
    if loader.shards is None:
        raise UserError(f"data.backend {loader.config.backend} makes images without classes: name shards that have")
    numbers, names = torch.from_numpy(loader.shards.labels()), [str(name) for name in loader.shards.classes]
    names += [str(number) for number in range(len(names), int(numbers.max()) + 1)]
    if int(val.labels.max()) >= len(names):
        raise UserError(
            f"the validation images have class {int(val.labels.max())}, and {where} has {len(names)} classes to train "
            "on: shard both splits with the same classes"
        )
    return Labels(numbers, names)


def batches(reader: ExampleReader, batch: int, workers: int, device: torch.device) -> Iterator[Examples]:
    """All samples in order, the last batch shorter."""
    yield from _load(reader, range(len(reader)), batch, workers, device)


def batches_of_rank(reader: ExampleReader, batch: int, workers: int, device: torch.device) -> Iterator[Examples]:
    """This rank's share, as many batches on each: where samples run out, the first ones with the label -1."""
    share = range(rank(), len(reader) + -len(reader) % world_size(), world_size())
    for number, examples in enumerate(_load(reader, [n % len(reader) for n in share], batch, workers, device)):
        over = torch.tensor(share[number * batch : (number + 1) * batch], device=device) >= len(reader)
        yield Examples(examples.images, examples.labels.masked_fill(over, -1))


def _load(
    reader: ExampleReader, samples: Sequence[int], batch: int, workers: int, device: torch.device
) -> Iterator[Examples]:
    for images, labels in read(reader, samples, workers, batch, device.type == "cuda"):
        yield Examples(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))


def read(
    reader: Dataset, samples: Sequence[int], workers: int, batch: int | None = None, pinned: bool = False
) -> Iterator[Any]:
    """What a reader makes of these samples, in order; in batches, its images and labels stacked. UserError where it
    raises one, whichever process reads."""
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": pinned, "worker_init_fn": ignore_signals}
    stream = iter(DataLoader(_Told(reader), batch, sampler=samples, collate_fn=_collate if batch else None, **options))
    try:
        for found in stream:
            if isinstance(found, _Mistake):
                if not is_main():  # which is the one that speaks, and knows nothing of it
                    print(f"ddae: rank {rank()}: {found.words}", file=sys.stderr, flush=True)
                raise UserError(found.words)
            yield found
    finally:
        if workers:  # an error's traceback may keep the stream, whose end would end them: exit would wait for ever
            stream._shutdown_workers()  # type: ignore[attr-defined]


class _Mistake(NamedTuple):
    """A UserError, which a reader process cannot raise as it is."""

    words: str


class _Told(Dataset):
    """Samples of a reader, or its mistakes."""

    def __init__(self, reader: Dataset):
        self.reader = reader

    def __getitem__(self, sample: int) -> Any:
        try:
            return self.reader[sample]
        except UserError as error:
            return _Mistake(str(error))


def _collate(samples: list[Any]) -> Any:
    if mistakes := [sample for sample in samples if isinstance(sample, _Mistake)]:
        return mistakes[0]
    images, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)
