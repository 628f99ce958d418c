"""An endless stream of micro-batches that any step can be resumed at.

Micro-batch j of step s on rank r holds fixed positions of the run (sampling.py), so the stream depends on no back end,
worker or restart, and the ranks together see the same global batches however many they are. Reader processes read and,
for Pillow, decode; DALI decodes in the training process. B images of a micro-batch, S pixels a side.
"""

import atexit
import importlib.util
import itertools
import signal
from collections import deque
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddae.config import DataConfig
from ddae.data import pillow
from ddae.data.sampling import Order, random_crops
from ddae.data.shards import Shards, find_shards, open_shards
from ddae.errors import UserError

SYNTHETIC_SAMPLES = 65536  # size of the data set that the synthetic back end stands for


class Batch(NamedTuple):
    """One micro-batch."""

    images: Tensor  # uint8 [B, 3, S, S]
    seeds: Tensor  # int64 [B]: counters of the samples in their epochs; masks are drawn from them
    samples: Tensor  # int64 [B]: numbers of the samples in the data set


class Encoded(NamedTuple):
    """A micro-batch before it is decoded: all files end to end."""

    bytes: Tensor  # uint8 [sum of lengths]
    lengths: Tensor  # int64 [B]
    boxes: Tensor  # int64 [B, 4]
    flips: Tensor  # bool [B]


class Part(NamedTuple):
    """Which positions of the run this rank reads."""

    batch_size: int  # global
    micro_batch: int  # of one rank
    rank: int
    ranks: int

    @property
    def accumulation(self) -> int:
        return self.batch_size // (self.micro_batch * self.ranks)

    def positions(self, number: int) -> Tensor:
        """Positions of this rank's micro-batch `number`, counted from the run's beginning: int64 [B]."""
        step, micro = divmod(number, self.accumulation)
        start = step * self.batch_size + (self.rank * self.accumulation + micro) * self.micro_batch
        return torch.arange(start, start + self.micro_batch)


class Reader(Dataset):
    """Micro-batch by number, read from the shards: decoded by Pillow, or still encoded for DALI."""

    def __init__(
        self, shards: Shards, order: Order, part: Part, size: int, crop_scale: tuple[float, float], decodes: bool
    ):
        self.shards, self.order, self.part = shards, order, part
        self.size, self.crop_scale, self.decodes = size, crop_scale, decodes

    def __getitem__(self, number: int) -> tuple[Encoded | Tensor, Tensor, Tensor]:
        epochs, samples = self.order.samples(self.part.positions(number))
        seeds = self.order.seeds(epochs, samples)
        width, height = (torch.as_tensor(side)[samples] for side in (self.shards.width, self.shards.height))
        crops = random_crops(seeds, width, height, self.crop_scale)
        files = [self.shards.read(sample) for sample in samples.tolist()]
        if self.decodes:
            boxes = zip(files, crops.boxes.tolist(), crops.flips.tolist(), strict=True)
            images = [pillow.decode(file, tuple(box), flip, self.size) for file, box, flip in boxes]
            return torch.from_numpy(np.stack(images)), seeds, samples
        lengths = torch.tensor([len(file) for file in files])
        flat = torch.from_numpy(np.frombuffer(b"".join(files), np.uint8).copy())
        return Encoded(flat, lengths, crops.boxes, crops.flips), seeds, samples


class SyntheticReader(Dataset):
    """Noise images, for measuring everything but the data."""

    def __init__(self, order: Order, part: Part, size: int):
        self.order, self.part, self.size = order, part, size
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (part.micro_batch, 3, size, size), dtype=torch.uint8, generator=generator)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        epochs, samples = self.order.samples(self.part.positions(number))
        return self.images, self.order.seeds(epochs, samples), samples


class Loader:
    """The data set of a run and its stream of micro-batches."""

    def __init__(self, config: DataConfig, size: int, seed: int, part: Part, device: torch.device):
        self.backend = choose_backend(config.backend)
        self.config, self.part, self.device, self.size = config, part, device, size
        if self.backend == "synthetic":
            first, self.fingerprint = np.array([0, SYNTHETIC_SAMPLES]), "synthetic"
            self.reader: Dataset = SyntheticReader(Order(first, seed), part, size)
        else:
            shards = open_shards(find_shards(config.train))
            first, self.fingerprint = shards.first, shards.fingerprint
            order = Order(first, seed)
            self.reader = Reader(shards, order, part, size, config.crop_scale, decodes=self.backend == "pillow")
        self.num_samples = int(first[-1])

        self._stream: Generator[Batch, None, None] | None = None
        atexit.register(self.close)  # before multiprocessing's own hook, which waits for workers deaf to SIGTERM

    def batches(self, step: int) -> Iterator[Batch]:
        """Micro-batches without end from the first of `step` on; `part.accumulation` of them make a step."""
        self.close()
        self._stream = self._batches(step)
        return self._stream

    def close(self) -> None:
        """End the stream and its reader processes."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _batches(self, step: int) -> Generator[Batch, None, None]:
        stream = self._read(step * self.part.accumulation)
        if self.backend == "dali":
            stream = self._decode(stream)
        for images, seeds, samples in stream:
            yield Batch(images.to(self.device, non_blocking=True), seeds, samples)

    def _read(self, first: int) -> Iterator:
        workers = 0 if self.backend == "synthetic" else self.config.workers
        return iter(
            DataLoader(
                self.reader,
                batch_size=None,
                sampler=itertools.count(first),  # type: ignore[arg-type]
                num_workers=workers,
                prefetch_factor=4 if workers else None,
                pin_memory=self.device.type == "cuda" and self.backend != "dali",
                worker_init_fn=_leave_signals_to_the_parent,
            )
        )

    def _decode(self, stream: Iterator) -> Iterator:
        from ddae.data.dali import DaliDecoder, decode_all

        waiting: deque = deque()

        def encoded_batches() -> Iterator:
            for encoded, *rest in stream:
                waiting.append(rest)
                files = [file.numpy() for file in encoded.bytes.split(encoded.lengths.tolist())]
                yield files, encoded.boxes, encoded.flips

        decoder = DaliDecoder(self.size, self.part.micro_batch, max(1, self.config.workers), self.device)
        for images in decode_all(decoder, encoded_batches()):
            yield images, *waiting.popleft()


def choose_backend(wanted: str) -> str:
    """The back end that decodes; "auto" takes DALI where it is installed, else Pillow."""
    installed = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if wanted == "auto":
        return "dali" if installed else "pillow"
    if wanted == "dali" and not installed:
        raise UserError("data.backend is 'dali', which is not installed: pip install -e '.[cu13]' or choose 'pillow'")
    return wanted


def _leave_signals_to_the_parent(worker: int) -> None:
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class Preview(NamedTuple):
    """Images to look at, whole and unmirrored."""

    images: Tensor  # uint8 [B, 3, S, S]
    held_out: bool  # from validation shards


def preview_images(config: DataConfig, size: int, count: int) -> Preview:
    """Images spread evenly over the validation shards beside the training ones; over those if there are none.

    The synthetic back end has no images, and gives zero of them.
    """
    if config.backend == "synthetic":
        return Preview(torch.empty(0, 3, size, size, dtype=torch.uint8), held_out=False)
    folder = Path(config.train)
    split = "val" if folder.is_dir() and any(folder.glob("val-*.tar")) else "train"
    shards = open_shards(find_shards(config.train, split))
    images = []
    for sample in np.linspace(0, len(shards) - 1, min(count, len(shards))).astype(int).tolist():
        width, height = int(shards.width[sample]), int(shards.height[sample])
        side = min(width, height)
        box = (width - side) // 2, (height - side) // 2, side, side
        images.append(pillow.decode(shards.read(sample), box, False, size))
    return Preview(torch.from_numpy(np.stack(images)), held_out=split == "val")
