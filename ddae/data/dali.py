"""Decoding with NVIDIA DALI: whole batches, on the GPU where there is one. The only import of DALI.

The graph receives bytes, box and flip of each image and decodes the box alone; what is random was drawn before.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# (DALI fills its modules when it is imported, which its stubs do not know)

import itertools
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from ddae.data.decode import resize

PROBE_SECONDS = 120  # a child that has not decoded a few images by then hangs
PROBE_LEVELS = 2.0  # mean difference, of 255, that two ways to decode a GPU's images may have


@pipeline_def(exec_async=False, exec_pipelined=False, prefetch_queue_depth=1)
def crop_graph(size: int | None, device: str, region: bool, hw_decoder_load: float):
    """encoded, top-left corner, shape and flip of each image -> uint8 [3, size, size] on `device` ("cpu" or "gpu").

    region: decode the box alone; else the whole image, which is cut then. size None: the box as it is, [H, W, 3].
    """
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    corner = fn.external_source(name="corner", dtype=types.INT32, ndim=1)
    shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
    box = {"axis_names": "HW", "normalized_anchor": False, "normalized_shape": False}
    decoder = {"device": "cpu", "output_type": types.RGB, "adjust_orientation": False}  # boxes are of the stored image
    if device == "gpu":  # chroma is to be interpolated as on the CPU
        decoder |= {"device": "mixed", "hw_decoder_load": hw_decoder_load, "jpeg_fancy_upsampling": True}
    if region:
        images = fn.decoders.image_slice(encoded, corner, shape, **box, **decoder)
    else:
        images = fn.slice(fn.decoders.image(encoded, **decoder), corner, shape, **box)
    if size is None:
        return images
    flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
    images = fn.resize(images, size=[size, size], interp_type=types.INTERP_CUBIC, antialias=True)
    return fn.transpose(fn.flip(images, horizontal=flip), perm=[2, 0, 1])


class DaliDecoder:
    """Decodes batches of one size; RuntimeError for a batch with an image that cannot be, after which it is of no use.

    size: pixels a side; threads: of the CPU; region and hw_decoder_load: see crop_graph.
    resizes: whether DALI resizes, too, as it always does on a GPU; else its threads' number of ours do.
    """

    def __init__(
        self,
        size: int,
        batch: int,
        threads: int,
        device: torch.device,
        region: bool = True,
        hw_decoder_load: float = 0,
        resizes: bool = False,
    ):
        self.size, self.device = size, device
        on_gpu = device.type == "cuda"
        self.resizes = resizes or on_gpu
        self.threads = ThreadPoolExecutor(threads)  # starts them as they are needed
        # Its own stream: to wait for the trainer's is to wait for the steps that are queued there.
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        self.pipeline = crop_graph(
            size if self.resizes else None,
            "gpu" if on_gpu else "cpu",
            region,
            hw_decoder_load,
            batch_size=batch,
            num_threads=threads,
            device_id=device.index if on_gpu else None,
        )
        self.pipeline.build()

    def decode(self, encoded: list[np.ndarray], boxes: Tensor, flips: Tensor) -> Tensor:
        """uint8 arrays of file bytes, int64 [B, 4] (left, top, width, height), bool [B] -> uint8 [B, 3, S, S]."""
        left, top, width, height = boxes.int().unbind(1)
        self.pipeline.feed_input("encoded", encoded)
        self.pipeline.feed_input("corner", torch.stack([top, left], 1).numpy())
        self.pipeline.feed_input("shape", torch.stack([height, width], 1).numpy())
        if self.resizes:
            self.pipeline.feed_input("flip", flips.int().numpy())
        (images,) = self.pipeline.run()
        if not self.resizes:
            crops = [np.asarray(image) for image in images]  # DALI's own memory, until the next run
            resized = self.threads.map(resize, crops, flips.tolist(), itertools.repeat(self.size))
            return torch.from_numpy(np.stack(list(resized)))
        if self.device.type != "cuda":
            return torch.from_numpy(np.array(images.as_tensor()))
        from nvidia.dali.plugin.pytorch import feed_ndarray

        assert self.stream is not None
        with torch.cuda.stream(self.stream):
            batch = torch.empty(len(images), 3, self.size, self.size, dtype=torch.uint8, device=self.device)
            feed_ndarray(images.as_tensor(), batch, cuda_stream=self.stream)
        self.stream.synchronize()
        return batch


def region_works(encoded: list[np.ndarray], boxes: Tensor, size: int, device: torch.device, hw_load: float) -> bool:
    """Whether decoding the boxes alone gives what decoding whole images does; tried in a process that may crash.

    nvImageCodec 0.9 was reported to end the process on ordinary JPEGs on A100 and H100 (NVIDIA/nvImageCodec #55).
    """
    child = multiprocessing.get_context("spawn").Process(
        target=_try_region, args=(encoded, boxes, size, device, hw_load), daemon=True
    )
    child.start()
    child.join(PROBE_SECONDS)
    if child.is_alive():
        child.kill()
        child.join()
    return child.exitcode == 0


def _try_region(encoded: list[np.ndarray], boxes: Tensor, size: int, device: torch.device, hw_load: float) -> None:
    flips = torch.zeros(len(boxes), dtype=torch.bool)
    by_region, whole = (
        DaliDecoder(size, len(boxes), 2, device, region, hw_load).decode(encoded, boxes, flips).float()
        for region in (True, False)
    )
    difference = (by_region - whole).abs().flatten(1).mean(1).max()
    raise SystemExit(0 if difference <= PROBE_LEVELS else 1)
