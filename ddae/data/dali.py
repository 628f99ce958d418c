"""Batch decoding with NVIDIA DALI, on the GPU if there is one. The only module that imports DALI.

DALI receives the bytes, crop box and flip of each image; all random numbers are drawn before (sampling.py).
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# (DALI adds its operators at import time; its stubs do not list them.)

import gc
import multiprocessing
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.tensors import TensorCPU
from torch import Tensor

from ddae.config.base import ImageSize, height_width
from ddae.data.decode import resize

PROBE_TIMEOUT_S = 120.0  # after which the probe process counts as hung
RESIZE = "resize"  # prefix of the names of the threads that resize
MAX_PROBE_DIFFERENCE = 2.0  # largest mean difference, of 255, between region and whole-image decoding on a GPU

# A forked process lacks the threads of its parent's pipelines, and finalising such a pipeline there (garbage in a
# reference cycle) is a segmentation fault. gc.freeze() excludes objects that exist at the fork from collection.
os.register_at_fork(after_in_child=gc.freeze)


@pipeline_def
def crop_graph(size: ImageSize | None, device: str, region: bool, hw_decoder_load: float):
    """Build the graph from (bytes, top-left corner, shape, flip) to uint8 [3, H, W] on `device` ("cpu", "gpu").

    region: decode the box alone; otherwise decode the whole image, then crop. size None: the box without resizing,
    uint8 [h, w, 3]. hw_decoder_load: share of JPEGs for the GPU's hardware decoder.
    """
    # no_copy: submit() says how long the files are kept.
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=device == "cpu")
    corner = fn.external_source(name="corner", dtype=types.INT32, ndim=1)
    shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
    box = {"axis_names": "HW", "normalized_anchor": False, "normalized_shape": False}
    # Boxes refer to the stored image, without EXIF orientation.
    decoder = {"device": "cpu", "output_type": types.RGB, "adjust_orientation": False}
    if device == "gpu":  # fancy upsampling interpolates chroma as the CPU's decoder does
        decoder |= {"device": "mixed", "hw_decoder_load": hw_decoder_load, "jpeg_fancy_upsampling": True}
    if region:
        images = fn.decoders.image_slice(encoded, corner, shape, **box, **decoder)
    else:
        images = fn.slice(fn.decoders.image(encoded, **decoder), corner, shape, **box)
    if size is None:
        return images
    flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
    images = fn.resize(images, size=list(height_width(size)), interp_type=types.INTERP_CUBIC, antialias=True)
    return fn.transpose(fn.flip(images, horizontal=flip), perm=[2, 0, 1])


class DaliDecoder:
    """Decodes and resizes batches of a fixed size, `queue` of them ahead, in threads without Python's lock.

    submit() as many batches as the queue holds, then alternate result() and submit().

    threads: CPU threads; region and hw_decoder_load: see crop_graph().
    resize_in_dali: resize in DALI's graph, which a GPU always does; otherwise torch resizes in `threads` threads.
    """

    def __init__(
        self,
        size: ImageSize,
        batch_size: int,
        threads: int,
        device: torch.device,
        region: bool = True,
        hw_decoder_load: float = 0,
        resize_in_dali: bool = False,
        queue: int = 1,
    ):
        self.size, self.device, on_gpu = size, device, device.type == "cuda"
        self.resize_in_dali = resize_in_dali or on_gpu
        self.num_threads, self.threads = threads, ThreadPoolExecutor(threads, RESIZE)  # starts its threads on first use
        # A separate stream: synchronising the trainer's stream would wait for the steps queued on it.
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        graph_size, graph_device = size if self.resize_in_dali else None, "gpu" if on_gpu else "cpu"
        options = {"batch_size": batch_size, "num_threads": threads, "device_id": device.index if on_gpu else None}
        options["prefetch_queue_depth"] = queue
        if on_gpu:  # the queue is not measured there yet
            options |= {"exec_async": False, "exec_pipelined": False}
        self.pipeline = crop_graph(graph_size, graph_device, region, hw_decoder_load, **options)
        self.pipeline.build()
        self.queue, self._submitted = queue, 0
        self._queued: deque[tuple[list[TensorCPU], Tensor]] = deque()  # files and flips of each batch

    def decode(self, encoded: list[np.ndarray], boxes: Tensor, flips: Tensor) -> Tensor:
        """Return result() of this batch alone, for a queue of 1."""
        self.submit(encoded, boxes, flips)
        return self.result()

    def submit(self, encoded: list[np.ndarray], boxes: Tensor, flips: Tensor) -> None:
        """Queue a batch: files (uint8 arrays), boxes int64 [B, 4] (left, top, width, height), flips bool [B]."""
        # Kept until the result is there: otherwise DALI's threads would drop the last reference to each file, for which
        # they would have to wait for Python's lock.
        files = [TensorCPU(file) for file in encoded]
        self.pipeline.feed_input("encoded", files)
        for name, columns in (("corner", [1, 0]), ("shape", [3, 2])):  # vertical, horizontal
            self.pipeline.feed_input(name, np.ascontiguousarray(boxes.numpy()[:, columns], np.int32))
        if self.resize_in_dali:
            self.pipeline.feed_input("flip", flips.int().numpy())
        self._queued.append((files, flips))
        self._submitted += 1
        if self._submitted >= self.queue:  # the first call starts as many batches as the queue holds
            self.pipeline.schedule_run()

    def result(self) -> Tensor:
        """Wait for the oldest batch of the queue. Return uint8 [B, 3, H, W].

        Raise RuntimeError if an image cannot be decoded, or if the queue has never been full; the decoder is unusable
        afterwards.
        """
        if self._submitted < self.queue:
            raise RuntimeError(f"{self._submitted} batches were submitted to a queue of {self.queue}")
        (images,) = self.pipeline.share_outputs()
        _, flips = self._queued.popleft()
        batch = self._copy(images) if self.resize_in_dali else self._resize(images, flips.tolist())
        self.pipeline.release_outputs()
        return batch

    def _resize(self, images: Any, flips: list[bool]) -> Tensor:
        batch = torch.empty(len(images), 3, *height_width(self.size), dtype=torch.uint8)
        rows = iter(range(len(images)))  # that the threads share

        def resize_rows() -> None:
            for row in rows:
                batch[row] = torch.from_numpy(resize(np.asarray(images[row]), flips[row], self.size))

        for future in [self.threads.submit(resize_rows) for _ in range(self.num_threads)]:
            future.result()
        return batch

    def _copy(self, images: Any) -> Tensor:
        if self.device.type != "cuda":
            return torch.from_numpy(np.array(images.as_tensor()))
        from nvidia.dali.plugin.pytorch import feed_ndarray

        assert self.stream is not None
        with torch.cuda.stream(self.stream):
            shape = len(images), 3, *height_width(self.size)
            batch = torch.empty(shape, dtype=torch.uint8, device=self.device)
            feed_ndarray(images.as_tensor(), batch, cuda_stream=self.stream)
        self.stream.synchronize()
        return batch


def region_decoding_works(
    files: list[np.ndarray], boxes: Tensor, size: ImageSize, device: torch.device, load: float
) -> bool:
    """Return whether region decoding gives the pixels of whole-image decoding. Runs in a process, which may crash.

    load: as hw_decoder_load of DaliDecoder.

    nvImageCodec 0.9 was reported to crash on ordinary JPEGs on A100 and H100 (NVIDIA/nvImageCodec #55).
    """
    arguments = (files, boxes, size, device, load)
    child = multiprocessing.get_context("spawn").Process(target=_probe_region_decoding, args=arguments, daemon=True)
    child.start()
    child.join(PROBE_TIMEOUT_S)
    child.kill()  # no effect if it has ended
    child.join()
    return child.exitcode == 0


def _probe_region_decoding(files: list[np.ndarray], boxes: Tensor, size: ImageSize, device: torch.device, load: float):
    flips = torch.zeros(len(boxes), dtype=torch.bool)
    by_region, whole = (
        DaliDecoder(size, len(boxes), 2, device, region, load).decode(files, boxes, flips).float()
        for region in (True, False)
    )
    difference = (by_region - whole).abs().flatten(1).mean(1).max()
    raise SystemExit(0 if difference <= MAX_PROBE_DIFFERENCE else 1)
