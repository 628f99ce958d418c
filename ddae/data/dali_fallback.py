"""Fallback for DALI batches with an undecodable image: decode image by image and replace the bad ones.

DALI fails a whole batch if one image cannot be decoded, and its pipeline is unusable afterwards.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddae.data.reader import MaskSampler, RawBatch, Reader, add_masks
from ddae.errors import one_line

DALI_QUEUE = 2  # micro-batches in DALI's queue: one is decoded while the previous one is resized or copied


class FallbackDecoder:
    """Decodes micro-batches with DALI; if one fails, decodes it image by image with replacements for bad samples."""

    def __init__(
        self,
        reader: Reader,
        new_decoder: Callable[[int, int], Any],
        sample_masks: MaskSampler | None = None,
        queue: int = DALI_QUEUE,
    ):
        """new_decoder(batch_size, queue) makes a DaliDecoder. sample_masks: for replacements, with other seeds."""
        self.reader, self.new_decoder, self.sample_masks, self.queue = reader, new_decoder, sample_masks, queue
        self.batch_decoder = self._new_batch_decoder()
        self.single_decoder: Any = None
        self._queued: deque[RawBatch] = deque()

    def decode_next(self, files: Iterator[RawBatch]) -> RawBatch:
        """Return the next micro-batch of encoded files, with images uint8 [B, 3, S, S] instead of them.

        Those after it are taken from `files` as far as DALI's queue holds them, up to the first with an error.
        """
        while len(self._queued) < self.queue and not (self._queued and self._queued[-1].error):
            batch = next(files)
            if not batch.error:
                self._submit(batch)
            self._queued.append(batch)
        batch = self._queued.popleft()
        if batch.error:
            return batch
        start = time.perf_counter()
        try:
            batch = batch._replace(images=self.batch_decoder.result())
        except RuntimeError as error:
            _raise_if_device_error(error)
            self.batch_decoder = self._new_batch_decoder()
            for each in self._queued:
                if not each.error:
                    self._submit(each)
            singles, bad = self.reader.load_samples(batch.plan, self._decode_one)
            batch = batch._replace(images=torch.cat(singles), bad=batch.bad + bad)
            batch = add_masks(self.sample_masks, batch) if bad else batch
        return batch._replace(seconds=time.perf_counter() - start)

    def _new_batch_decoder(self) -> Any:
        return self.new_decoder(self.reader.rank_batch.micro_batch, self.queue)

    def _submit(self, batch: RawBatch) -> None:
        self.batch_decoder.submit(split_files(batch), batch.plan.crops.boxes, batch.plan.crops.flips)

    def _decode_one(self, row: int, sample: int, box: list[int], flip: bool) -> Tensor:
        self.reader.decode(row, sample, box, flip)  # fails first on most bad files, which spares a new DALI pipeline
        file = np.frombuffer(self.reader.shards.read(sample), np.uint8)
        self.single_decoder = self.single_decoder or self.new_decoder(1, 1)
        try:
            return self.single_decoder.decode([file], torch.tensor([box]), torch.tensor([flip]))
        except RuntimeError as error:
            _raise_if_device_error(error)
            self.single_decoder = None
            lines = [line for line in str(error).splitlines() if not line.startswith("Stacktrace")]
            raise ValueError(f"DALI cannot decode it: {one_line(' '.join(lines))}") from None


def split_files(batch: RawBatch) -> list[np.ndarray]:
    """Return the encoded files of a micro-batch, as views: uint8 arrays. Faster than split() of torch or NumPy."""
    data, ends = batch.images.numpy(), batch.lengths.cumsum(0).tolist()
    return [data[start:end] for start, end in pairwise([0, *ends])]


def _raise_if_device_error(error: RuntimeError) -> None:
    """Raise `error` if the device is out of memory or broken, which does not make the image bad."""
    message = str(error).lower()
    device_error = isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError))
    if device_error or "cuda" in message or "out of memory" in message:
        raise error
