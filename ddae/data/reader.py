"""Map-style datasets of micro-batches: read from the shards and, for the Pillow back end, decoded.

Micro-batch j of step s on rank r covers fixed positions of the run (sampling.py), so its content does not depend on the
back end, workers or restarts, and the ranks together see the same global batches whatever their number.
B: images of a micro-batch; H, W: pixels.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddae.config.base import ImageSize, height_width
from ddae.data.decode import decode_crop, is_truncated, resize
from ddae.data.masking import Mask
from ddae.data.memory import DecodedImages
from ddae.data.sampling import CropFn, Crops, EpochOrder
from ddae.data.shards import Shards
from ddae.errors import UserError

T = TypeVar("T")
Load = Callable[[int, int, list[int], bool], T]  # (row of the micro-batch, sample, box, flip) -> loaded value
MaskSampler = Callable[[Tensor], Mask]  # seeds int64 [B] -> masks
Augment = Callable[[np.ndarray, int], np.ndarray]  # uint8 [3, H, W], the sample's seed -> uint8 [3, H, W]
MAX_CONSECUTIVE_BAD = 100  # unreadable samples in a row after which the data set counts as broken


class RankBatch(NamedTuple):
    """This rank's share of every global batch."""

    batch_size: int  # images of a step, over all ranks and accumulation steps
    micro_batch: int  # images of a forward pass on one rank
    rank: int
    world_size: int

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches of a rank in one step."""
        return self.batch_size // (self.micro_batch * self.world_size)

    def positions(self, number: int) -> Tensor:
        """Return the positions in the run of this rank's micro-batch `number`, counted from 0: int64 [B]."""
        step, micro_step = divmod(number, self.grad_accum_steps)
        start = step * self.batch_size + (self.rank * self.grad_accum_steps + micro_step) * self.micro_batch
        return torch.arange(start, start + self.micro_batch)


class SamplePlan(NamedTuple):
    """Everything about a micro-batch that is decided before a file is read."""

    epochs: Tensor  # int64 [B]
    samples: Tensor  # int64 [B]: indices into the data set
    seeds: Tensor  # int64 [B]: crops and masks are drawn from them
    crops: Crops


class RawBatch(NamedTuple):
    """A micro-batch as a reader produces it."""

    images: Tensor  # uint8 [B, 3, H, W]; for DALI the encoded files, concatenated: uint8 [sum(lengths)]
    lengths: Tensor  # int64 [B]: of the encoded files, in bytes; zeros if a reader decoded them
    plan: SamplePlan
    bad: list[tuple[int, str]]  # samples that could not be used, with reasons; others replace them
    seconds: float  # time spent on it
    error: str = ""  # message of a UserError: worker processes cannot raise it unchanged
    mask: Mask | None = None  # if the loader was given a mask sampler

    def __reduce__(self):
        """Pickle all tensors but `images` by value: each one in /dev/shm costs the receiving process 0.3 ms."""
        return _from_arrays, (self.images, *(_convert(each, Tensor, Tensor.numpy) for each in self[1:]))


def _from_arrays(*fields: Any) -> RawBatch:
    """Return the micro-batch with tensors instead of NumPy arrays."""
    return RawBatch(*(_convert(each, np.ndarray, torch.from_numpy) for each in fields))


def _convert(value: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    """Apply `convert` to a value of this type, and to those within named tuples."""
    if isinstance(value, kind):
        return convert(value)
    return value._make(_convert(each, kind, convert) for each in value) if hasattr(value, "_make") else value


def add_masks(sample_masks: MaskSampler | None, batch: RawBatch) -> RawBatch:
    """Return the micro-batch with masks, if there is a mask sampler."""
    return batch if sample_masks is None else batch._replace(mask=sample_masks(batch.plan.seeds))


class Reader(Dataset):
    """Reads micro-batches by number, and decodes them if `decodes`."""

    def __init__(
        self,
        shards: Shards,
        order: EpochOrder,
        rank_batch: RankBatch,
        size: ImageSize,
        crop: CropFn,
        decodes: bool = True,
        augment: Augment | None = None,
        decoded: DecodedImages | None = None,
    ):
        """augment: applied to each decoded crop. decoded: the images of the shards, if they are in memory."""
        self.shards, self.order, self.rank_batch = shards, order, rank_batch
        self.size, self.crop, self.decodes, self.augment = size, crop, decodes, augment
        self.decoded = decoded

    def __getitem__(self, number: int) -> RawBatch:
        start = time.perf_counter()
        plan = self.plan(*self.order.samples(self.rank_batch.positions(number)))
        try:
            if self.decodes:
                images, bad = self.load_samples(plan, self.decode)
                if self.augment is not None:
                    images = [self.augment(*each) for each in zip(images, plan.seeds.tolist(), strict=True)]
                data, lengths = torch.from_numpy(np.stack(images)), torch.zeros(len(images), dtype=torch.int64)
            else:
                data, lengths, bad = self.read_encoded(plan)
        except UserError as error:
            return RawBatch(torch.empty(0), torch.empty(0), plan, [], 0.0, str(error))
        return RawBatch(data, lengths, plan, bad, time.perf_counter() - start)

    def read_encoded(self, plan: SamplePlan) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
        """Read the encoded files. Return them concatenated (uint8), their lengths (int64 [B]) and bad samples."""
        lengths = torch.from_numpy(self.shards.length[plan.samples.numpy()].astype(np.int64))
        data = torch.empty(int(lengths.sum()), dtype=torch.uint8)
        buffers = [memoryview(part.numpy()) for part in data.split(lengths.tolist())]  # type: ignore[arg-type]

        def read(row: int, sample: int, box: list[int], flip: bool) -> memoryview:
            length = int(self.shards.length[sample])
            buffer = buffers[row] if len(buffers[row]) == length else memoryview(bytearray(length))
            self.shards.read_into(buffer, sample)
            raise_if_truncated(buffer)
            return buffer

        files, bad = self.load_samples(plan, read)
        if bad:  # their replacements have other lengths
            lengths = torch.tensor([len(file) for file in files])
            data = torch.from_numpy(np.concatenate([np.frombuffer(file, np.uint8) for file in files]))
        return data, lengths, bad

    def plan(self, epochs: Tensor, samples: Tensor) -> SamplePlan:
        """Draw seeds and crops of these samples in these epochs, both int64 [B]."""
        seeds = self.order.seeds(epochs, samples)
        width, height = (
            torch.from_numpy(each[samples.numpy()].astype(np.int64)) for each in (self.shards.width, self.shards.height)
        )
        crops = self.crop(seeds, width, height)
        return SamplePlan(epochs, samples, seeds, crops)

    def load_samples(self, plan: SamplePlan, load: Load[T]) -> tuple[list[T], list[tuple[int, str]]]:
        """Call load(row, sample, box, flip) for each row; if it raises, replace the sample by the next of the data set.

        Return the loaded values and the bad samples with reasons. Replacements are written into the plan. Raise
        UserError after MAX_CONSECUTIVE_BAD bad samples in a row.
        """
        loaded, bad = [], []
        boxes, flips, samples = plan.crops.boxes.tolist(), plan.crops.flips.tolist(), plan.samples.tolist()
        for row, (sample, box, flip) in enumerate(zip(samples, boxes, flips, strict=True)):
            for _ in range(MAX_CONSECUTIVE_BAD):
                try:
                    loaded.append(load(row, sample, box, flip))
                    break
                except UserError:
                    raise
                except Exception as error:  # decoders raise many types for broken files
                    bad.append((sample, str(error) or type(error).__name__))
                sample = (sample + 1) % len(self.shards)
                new = self.plan(plan.epochs[row : row + 1], torch.tensor([sample]))
                box, flip = new.crops.boxes[0].tolist(), bool(new.crops.flips[0])
                for column, value in zip((*plan[:3], *plan.crops), (*new[:3], *new.crops), strict=True):
                    column[row] = value[0]
            else:
                last = f"{self.shards.sample_name(bad[-1][0])} ({bad[-1][1]})"
                problem = f"{MAX_CONSECUTIVE_BAD} samples in a row cannot be read, the last of them {last}"
                raise UserError(f"{problem}. Find the damage with data_prep/check_shards.py --full.")
        return loaded, bad

    def decode(self, row: int, sample: int, box: list[int], flip: bool) -> np.ndarray:
        """Return a sample's crop, decoded with Pillow: uint8 [3, H, W]."""
        pixels = None if self.decoded is None else self.decoded[sample]
        if pixels is not None:
            left, top, width, height = box
            return resize(pixels[top : top + height, left : left + width], flip, self.size)
        file = self.shards.read(sample)
        raise_if_truncated(file)
        return decode_crop(file, tuple(box), flip, self.size)  # type: ignore[arg-type]


def raise_if_truncated(file: bytes | memoryview) -> None:
    """Raise ValueError for a truncated JPEG, which some decoders accept and others reject."""
    if is_truncated(file):
        raise ValueError("the file is truncated")


class SyntheticReader(Reader):
    """Reader of noise images without shards, to measure everything but data loading."""

    def __init__(self, order: EpochOrder, rank_batch: RankBatch, size: ImageSize):
        self.order, self.rank_batch, self.size = order, rank_batch, size
        shape, generator = (rank_batch.micro_batch, 3, *height_width(size)), torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    def __getitem__(self, number: int) -> RawBatch:
        epochs, samples = self.order.samples(self.rank_batch.positions(number))
        zeros = torch.zeros(len(samples), dtype=torch.int64)
        # Allocated, not expanded: pin_memory() rejects a view with repeated elements.
        crops = Crops(torch.zeros(len(samples), 4, dtype=torch.int64), zeros.bool())
        plan = SamplePlan(epochs, samples, self.order.seeds(epochs, samples), crops)
        return RawBatch(self.images, zeros, plan, [], 0.0)
