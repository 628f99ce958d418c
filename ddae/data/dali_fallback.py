"""DALI's decoder for micro-batches that may hold a bad image, which to DALI is the end."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddae.data.reader import RawBatch, Reader


class RescuingDecoder:
    """Decodes micro-batches; where one fails, its images are decoded one by one, others in place of the bad ones."""

    def __init__(self, reader: Reader, new_decoder: Callable[[int], Any]):
        """new_decoder(batch) makes a DaliDecoder for batches of this size."""
        self.reader, self.new_decoder = reader, new_decoder
        self.whole = new_decoder(reader.part.micro_batch)
        self.single: Any = None

    def decode(self, micro: RawBatch) -> RawBatch:
        """The micro-batch with images uint8 [B, 3, S, S] in place of files."""
        if micro.mistake:
            return micro
        start = time.perf_counter()
        files = [file.numpy() for file in micro.images.split(micro.lengths.tolist())]
        drawn, bad = micro.drawn, micro.bad
        try:
            images = self.whole.decode(files, drawn.crops.boxes, drawn.crops.flips)
        except RuntimeError as error:
            _raise_if_of_the_device(error)
            self.whole = self.new_decoder(self.reader.part.micro_batch)
            singles, drawn, more = self.reader.fill(drawn, self._decode_one)
            images, bad = torch.cat(singles), bad + more
        return RawBatch(images, micro.lengths, drawn, bad, time.perf_counter() - start)

    def _decode_one(self, row: int, sample: int, box: list[int], flip: bool) -> Tensor:
        self.reader.decode(row, sample, box, flip)  # what Pillow cannot decode either need not end DALI's decoder
        file = np.frombuffer(self.reader.shards.read(sample), np.uint8)
        self.single = self.single or self.new_decoder(1)
        try:
            return self.single.decode([file], torch.tensor([box]), torch.tensor([flip]))
        except RuntimeError as error:
            _raise_if_of_the_device(error)
            self.single = None
            lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Stacktrace")]
            raise ValueError(f"DALI cannot decode it: {' '.join(lines)[:200]}") from None


def _raise_if_of_the_device(error: RuntimeError) -> None:
    """A device without memory, or broken, says nothing about an image."""
    words = str(error).lower()
    if (
        isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError))
        or "cuda" in words
        or "out of memory" in words
    ):
        raise error
