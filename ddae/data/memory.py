"""Decoded images in memory: a small data set is decoded once, not in every epoch."""

import logging
import math
import mmap
import os
import shutil
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from ddae.data.decode import decode_image, is_truncated
from ddae.data.shards import Shards
from ddae.errors import UserError

MAX_MEMORY_FRACTION = 0.5  # of the memory that is available, for the images of all ranks of a machine
CGROUP_FILES = (  # limit and use of a container's memory, in bytes: cgroup v2 and v1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
SHARED_MEMORY = "/dev/shm"
logger = logging.getLogger(__name__)


def _ranks_of_machine() -> int:
    """Return the number of ranks on this machine as torchrun or DeepSpeed states it, 1 if neither does."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def require_shared_memory(needed: int, workers: int) -> None:
    """Raise UserError if the batches of a rank's worker processes do not fit into shared memory.

    needed: bytes of the batches that they keep ready. Containers have 64 MB by default, and workers would hang.
    """
    needed *= _ranks_of_machine()
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return
    if needed > free:
        sizes = f"{needed / 1e6:.0f} MB for what {workers} workers keep ready, and has {free / 1e6:.0f} MB"
        size = max(8, math.ceil(needed / 1e9))
        fix = f"Start the container with --shm-size={size}g, or pass fewer --data.workers or a smaller batch."
        raise UserError(f"{SHARED_MEMORY} needs {sizes}. {fix}")


class SharedBuffers:
    """Buffers that forked processes share and use again and again: a worker process writes one, its parent reads it.

    A new tensor in /dev/shm for each batch would be slower to receive: it is mapped, and its pages are freed. These
    buffers are outside /dev/shm, whose size containers limit.
    """

    def __init__(self, count: int, size: int):
        """Allocate `count` buffers of `size` bytes. Their pages take no memory before they are first written."""
        self._memory = np.frombuffer(mmap.mmap(-1, count * size), np.uint8).reshape(count, size)
        self._free = deque(range(count))

    def take(self) -> int | None:
        """Return the number of a free buffer, which is then in use; None if there is none."""
        return self._free.popleft() if self._free else None

    def release(self, number: int) -> None:
        """Make a buffer free again."""
        self._free.append(number)

    def write(self, number: int, data: np.ndarray) -> bool:
        """Copy uint8 [n] into a buffer. Return whether it fits."""
        if data.size > self._memory.shape[1]:
            return False
        self._memory[number, : data.size] = data
        return True

    def read(self, number: int, length: int) -> np.ndarray:
        """Return the first bytes of a buffer without copying. It is free again when nothing refers to the array."""
        data = self._memory[number, :length]
        weakref.finalize(data, self.release, number)
        return data


class DecodedImages:
    """The images of a data set as pixels, in one buffer that forked worker processes share."""

    def __init__(self, shards: Shards, threads: int):
        """Decode all images with so many threads. Those that cannot be decoded are left out."""
        self._ends = np.cumsum(_pixel_bytes(shards))
        self._pixels = np.empty(int(self._ends[-1]), np.uint8)
        self._width, self._height = shards.width, shards.height
        with ThreadPoolExecutor(threads) as pool:
            decoded = pool.map(lambda sample: self._decode(shards, sample), range(len(shards)), chunksize=64)
            self._decoded = np.fromiter(decoded, bool, len(shards))

    def __getitem__(self, sample: int) -> np.ndarray | None:
        """Return the pixels of a sample, uint8 [H, W, 3]; None if it was left out."""
        return self._view(sample) if self._decoded[sample] else None

    def _view(self, sample: int) -> np.ndarray:
        shape = int(self._height[sample]), int(self._width[sample]), 3
        end = int(self._ends[sample])
        return self._pixels[end - shape[0] * shape[1] * 3 : end].reshape(shape)

    def _decode(self, shards: Shards, sample: int) -> bool:
        """Decode a sample into the buffer. Return whether that was possible."""
        try:
            file = shards.read(sample)
            pixels = decode_image(file).transpose(1, 2, 0)
        except UserError:
            raise
        except Exception:  # decoders raise many types; the reader raises the same error and replaces the sample
            return False
        if is_truncated(file) or pixels.shape != self._view(sample).shape:
            return False
        self._view(sample)[:] = pixels
        return True


def _pixel_bytes(shards: Shards) -> np.ndarray:
    """Return the bytes of each decoded image: int64 [N]."""
    return 3 * shards.width.astype(np.int64) * shards.height


def decode_all(shards: Shards, threads: int) -> DecodedImages | None:
    """Return the images of a data set in memory; None, with a warning, if they would take too much of it."""
    needed = int(_pixel_bytes(shards).sum())
    limit = MAX_MEMORY_FRACTION * available_memory() / _ranks_of_machine()
    if needed > limit:
        logger.warning(
            "data.in_memory is set, but the decoded images of a rank take %.1f GiB, and at most %.1f GiB may be used "
            "for them. They are decoded in every epoch instead.",
            *(needed / 2**30, limit / 2**30),
        )
        return None
    logger.info("decoding %d images into %.1f GiB of memory", len(shards), needed / 2**30)
    return DecodedImages(shards, threads)


def available_memory() -> int:
    """Return the bytes of memory that this process may still use, within its container's limit."""
    available = psutil.virtual_memory().available
    for limit_file, use_file in CGROUP_FILES:
        try:
            limit, use = (int(Path(each).read_text()) for each in (limit_file, use_file))
        except (OSError, ValueError):  # another version, or no limit ("max")
            continue
        available = min(available, max(0, limit - use))
    return available
