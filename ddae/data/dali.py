"""Decoding with NVIDIA DALI: whole batches, on the GPU where there is one. The only import of DALI.

The graph receives bytes, box and flip of each image and decodes the box alone; what is random was drawn before.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# (DALI fills its modules when it is imported, which its stubs do not know)

from collections.abc import Iterator

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

AHEAD = 2  # batches that are decoded while earlier ones are used


@pipeline_def(prefetch_queue_depth=AHEAD)
def crop_graph(size: int, device: str):
    """encoded, top-left corner, shape and flip of each image -> uint8 [3, size, size] on `device`."""
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    corner = fn.external_source(name="corner", dtype=types.INT32, ndim=1)
    shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
    flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
    images = fn.decoders.image_slice(
        encoded,
        corner,
        shape,
        device="mixed" if device == "gpu" else "cpu",
        axis_names="HW",
        normalized_anchor=False,
        normalized_shape=False,
        output_type=types.RGB,
        adjust_orientation=False,  # boxes are of the image as it is stored, which is how Pillow reads it
    )
    images = fn.resize(images, size=[size, size], interp_type=types.INTERP_CUBIC, antialias=True)
    return fn.transpose(fn.flip(images, horizontal=flip), perm=[2, 0, 1])


class DaliDecoder:
    """Decodes batches in the order they are given; AHEAD of them are under way at a time."""

    def __init__(self, size: int, batch: int, threads: int, device: torch.device):
        self.size, self.device = size, device
        on_gpu = device.type == "cuda"
        self.pipeline = crop_graph(
            size,
            "gpu" if on_gpu else "cpu",
            batch_size=batch,
            num_threads=threads,
            device_id=device.index if on_gpu else None,
        )
        self.pipeline.build()
        self.fed = 0

    def start(self, encoded: list[np.ndarray], boxes: Tensor, flips: Tensor) -> None:
        """Begin to decode a batch: uint8 arrays of file bytes, int64 [B, 4] (left, top, width, height), bool [B]."""
        left, top, width, height = boxes.int().unbind(1)
        self.pipeline.feed_input("encoded", encoded)
        self.pipeline.feed_input("corner", torch.stack([top, left], 1).numpy())
        self.pipeline.feed_input("shape", torch.stack([height, width], 1).numpy())
        self.pipeline.feed_input("flip", flips.int().numpy())
        self.fed += 1
        if self.fed >= AHEAD:  # the first call runs all batches fed so far, each later one runs one
            self.pipeline.schedule_run()

    def finish(self) -> Tensor:
        """The oldest batch begun: uint8 [B, 3, S, S] on the decoder's device."""
        (images,) = self.pipeline.share_outputs()
        if self.device.type == "cuda":
            from nvidia.dali.plugin.pytorch import feed_ndarray

            batch = torch.empty(len(images), 3, self.size, self.size, dtype=torch.uint8, device=self.device)
            feed_ndarray(images.as_tensor(), batch, cuda_stream=torch.cuda.current_stream(self.device))
        else:
            batch = torch.from_numpy(np.array(images.as_tensor()))
        self.pipeline.release_outputs()
        return batch


def decode_all(decoder: DaliDecoder, batches: Iterator[tuple[list[np.ndarray], Tensor, Tensor]]) -> Iterator[Tensor]:
    """Decode an endless stream of batches, keeping the decoder busy ahead of its user."""
    for _ in range(AHEAD):
        decoder.start(*next(batches))
    while True:
        images = decoder.finish()
        decoder.start(*next(batches))
        yield images
