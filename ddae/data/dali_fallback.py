"""Fallback for DALI batches with an undecodable image: decode image by image and replace the bad ones.

DALI fails a whole batch if one image cannot be decoded, and its pipeline is unusable afterwards.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddae.data.reader import RawBatch, Reader
from ddae.errors import one_line


class FallbackDecoder:
    """Decodes micro-batches with DALI; if one fails, decodes it image by image with replacements for bad samples."""

    def __init__(self, reader: Reader, new_decoder: Callable[[int], Any]):
        """new_decoder(batch_size) makes a DaliDecoder."""
        self.reader, self.new_decoder = reader, new_decoder
        self.batch_decoder = new_decoder(reader.rank_batch.micro_batch)
        self.single_decoder: Any = None

    def decode(self, batch: RawBatch) -> RawBatch:
        """Return the micro-batch with images uint8 [B, 3, S, S] instead of encoded files."""
        if batch.error:
            return batch
        start = time.perf_counter()
        files = [file.numpy() for file in batch.images.split(batch.lengths.tolist())]
        plan, bad = batch.plan, batch.bad
        try:
            images = self.batch_decoder.decode(files, plan.crops.boxes, plan.crops.flips)
        except RuntimeError as error:
            _raise_if_device_error(error)
            self.batch_decoder = self.new_decoder(self.reader.rank_batch.micro_batch)
            singles, more_bad = self.reader.load_samples(plan, self._decode_one)
            images, bad = torch.cat(singles), bad + more_bad
        return RawBatch(images, batch.lengths, plan, bad, time.perf_counter() - start)

    def _decode_one(self, row: int, sample: int, box: list[int], flip: bool) -> Tensor:
        self.reader.decode(row, sample, box, flip)  # fails first on most bad files, which spares a new DALI pipeline
        file = np.frombuffer(self.reader.shards.read(sample), np.uint8)
        self.single_decoder = self.single_decoder or self.new_decoder(1)
        try:
            return self.single_decoder.decode([file], torch.tensor([box]), torch.tensor([flip]))
        except RuntimeError as error:
            _raise_if_device_error(error)
            self.single_decoder = None
            lines = [line for line in str(error).splitlines() if not line.startswith("Stacktrace")]
            raise ValueError(f"DALI cannot decode it: {one_line(' '.join(lines))}") from None


def _raise_if_device_error(error: RuntimeError) -> None:
    """Raise `error` if the device is out of memory or broken, which does not make the image bad."""
    message = str(error).lower()
    device_error = isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError))
    if device_error or "cuda" in message or "out of memory" in message:
        raise error
