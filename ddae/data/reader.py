"""Micro-batches by number: read from the shards, and for Pillow decoded.

Micro-batch j of step s on rank r holds fixed positions of the run (sampling.py), so what is in it depends on no back
end, worker or restart, and the ranks together see the same global batches however many they are.
B images of a micro-batch, S pixels a side.
"""

import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddae.data.decode import decode_crop, is_cut
from ddae.data.masking import Mask
from ddae.data.sampling import CropFn, Crops, EpochOrder
from ddae.data.shards import Shards
from ddae.errors import UserError

T = TypeVar("T")
MaskSampler = Callable[[Tensor], Mask]  # int64 [B], seeds -> their masks
Augment = Callable[[np.ndarray, int], np.ndarray]  # uint8 [3, S, S] and the sample's seed -> uint8 [3, S, S]
IN_A_ROW = 100  # samples that may be bad one after another before the data set is taken to be broken


class RankBatch(NamedTuple):
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


class SamplePlan(NamedTuple):
    """What is known of a micro-batch before any file is read."""

    epochs: Tensor  # int64 [B]
    samples: Tensor  # int64 [B]: numbers of the samples in the data set
    seeds: Tensor  # int64 [B]: counters of the samples in their epochs; crops and masks are drawn from them
    crops: Crops


class RawBatch(NamedTuple):
    """A micro-batch as a reader makes it."""

    images: Tensor  # uint8 [B, 3, S, S]; for DALI, whose turn is next: all files end to end, uint8 [sum of lengths]
    lengths: Tensor  # int64 [B]: of the files in bytes
    drawn: SamplePlan
    bad: list[tuple[int, str]]  # samples that could not be used, and why; others stand in for them
    seconds: float  # that it took
    mistake: str = ""  # of the user's, where there is no micro-batch: a process cannot raise it as it is
    mask: Mask | None = None  # drawn from the seeds, where it was asked for


class Reader(Dataset):
    """Micro-batch by number."""

    def __init__(
        self,
        shards: Shards,
        order: EpochOrder,
        part: RankBatch,
        size: int,
        crop: CropFn,
        decodes: bool = True,
        augment: Augment | None = None,
    ):
        self.shards, self.order, self.part = shards, order, part
        self.size, self.crop, self.decodes, self.augment = size, crop, decodes, augment
        self.width, self.height = torch.as_tensor(shards.width), torch.as_tensor(shards.height)

    def __getitem__(self, number: int) -> RawBatch:
        start = time.perf_counter()
        drawn = self.draw(*self.order.samples(self.part.positions(number)))
        try:
            if self.decodes:
                images, drawn, bad = self.fill(drawn, self.decode)
                if self.augment is not None:
                    images = [self.augment(*each) for each in zip(images, drawn.seeds.tolist(), strict=True)]
                data, lengths = torch.from_numpy(np.stack(images)), torch.zeros(len(images), dtype=torch.int64)
            else:
                data, lengths, drawn, bad = self.read_all(drawn)
        except UserError as error:
            return RawBatch(torch.empty(0), torch.empty(0), drawn, [], 0.0, str(error))
        return RawBatch(data, lengths, drawn, bad, time.perf_counter() - start)

    def read_all(self, drawn: SamplePlan) -> tuple[Tensor, Tensor, SamplePlan, list[tuple[int, str]]]:
        """Files end to end, and the length of each."""
        lengths = torch.as_tensor(self.shards.length[drawn.samples.numpy()])
        data = torch.empty(int(lengths.sum()), dtype=torch.uint8)
        places = [
            memoryview(place.numpy())  # type: ignore[arg-type]
            for place in data.split(lengths.tolist())
        ]

        def read(row: int, sample: int, box: list[int], flip: bool) -> memoryview:
            length = int(self.shards.length[sample])
            place = places[row] if len(places[row]) == length else memoryview(bytearray(length))
            self.shards.read_into(place, sample)
            check_whole(place)
            return place

        files, drawn, bad = self.fill(drawn, read)
        if bad:  # others in their place, of other lengths
            lengths = torch.tensor([len(file) for file in files])
            data = torch.from_numpy(np.concatenate([np.frombuffer(file, np.uint8) for file in files]))
        return data, lengths, drawn, bad

    def draw(self, epochs: Tensor, samples: Tensor) -> SamplePlan:
        """Seeds and crops of these samples in these epochs."""
        seeds = self.order.seeds(epochs, samples)
        crops = self.crop(seeds, self.width[samples], self.height[samples])
        return SamplePlan(epochs, samples, seeds, crops)

    def fill(
        self, drawn: SamplePlan, load: Callable[[int, int, list[int], bool], T]
    ) -> tuple[list[T], SamplePlan, list[tuple[int, str]]]:
        """load(row, sample, box, flip) of each row; where it fails, of the next sample that can be loaded.

        Returns what was loaded, what was drawn for it, and the samples that failed with their reasons.
        """
        loaded, bad = [], []
        boxes, flips, samples = drawn.crops.boxes.tolist(), drawn.crops.flips.tolist(), drawn.samples.tolist()
        for row, (sample, box, flip) in enumerate(zip(samples, boxes, flips, strict=True)):
            tries = 0
            while True:
                try:
                    loaded.append(load(row, sample, box, flip))
                    break
                except UserError:
                    raise
                except Exception as error:  # decoders raise whatever a broken file leads them to
                    bad.append((sample, str(error) or type(error).__name__))
                tries += 1
                if tries == IN_A_ROW:
                    raise UserError(
                        f"{IN_A_ROW} samples in a row cannot be read, the last is {self.shards.sample_name(sample)} "
                        f"({bad[-1][1]}): run data_prep/check_shards.py --full"
                    )
                sample = (sample + 1) % len(self.shards)
                other = self.draw(drawn.epochs[row : row + 1], torch.tensor([sample]))
                box, flip = other.crops.boxes[0].tolist(), bool(other.crops.flips[0])
                for ours, theirs in zip((*drawn[:3], *drawn.crops), (*other[:3], *other.crops), strict=True):
                    ours[row] = theirs[0]
        return loaded, drawn, bad

    def decode(self, row: int, sample: int, box: list[int], flip: bool) -> np.ndarray:
        """A sample's crop, by Pillow: uint8 [3, S, S]."""
        file = self.shards.read(sample)
        check_whole(file)
        return decode_crop(file, tuple(box), flip, self.size)  # type: ignore[arg-type]


def check_whole(file: bytes | memoryview) -> None:
    """ValueError where a JPEG's end is missing, which one decoder would forgive and another not."""
    if is_cut(file):
        raise ValueError("its end is missing")


class MaskingReader(Dataset):
    """Another reader's micro-batches, with masks."""

    def __init__(self, reader: Dataset, sample_masks: MaskSampler):
        self.reader, self.sample_masks = reader, sample_masks

    def __getitem__(self, number: int) -> RawBatch:
        micro = self.reader[number]
        return micro._replace(mask=self.sample_masks(micro.drawn.seeds))


class SyntheticReader(Dataset):
    """Noise images, for measuring everything but the data."""

    def __init__(self, order: EpochOrder, part: RankBatch, size: int):
        self.order, self.part, self.size = order, part, size
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (part.micro_batch, 3, size, size), dtype=torch.uint8, generator=generator)

    def __getitem__(self, number: int) -> RawBatch:
        epochs, samples = self.order.samples(self.part.positions(number))
        nothing = torch.zeros(len(samples), dtype=torch.int64)
        whole = Crops(torch.zeros(len(samples), 4, dtype=torch.int64), nothing.bool())  # can be pinned, unlike a view
        drawn = SamplePlan(epochs, samples, self.order.seeds(epochs, samples), whole)
        return RawBatch(self.images, nothing, drawn, [], 0.0)
