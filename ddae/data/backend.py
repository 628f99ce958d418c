"""Selection of the decoding back end: the faster one on this machine, and whether its GPU can decode regions."""

import importlib.util
import logging
import os
import time
from typing import NamedTuple

import numpy as np
import torch

from ddae.config.base import ShardsConfig
from ddae.data.decode import decode_crop
from ddae.data.reader import Reader, SamplePlan
from ddae.distributed.cores import num_workers
from ddae.errors import UserError

logger = logging.getLogger(__name__)

NUM_TIMED_IMAGES = 64  # to compare the speed of the back ends
NUM_PROBE_IMAGES = 8  # to check a GPU's region decoding


class Decoding(NamedTuple):
    """How images are decoded. Both differ slightly in their pixels, so a resumed run keeps them."""

    backend: str
    regions: bool = True  # DALI: decode crop boxes alone; otherwise whole images, which are then cropped


def dali_installed() -> bool:
    """Return whether DALI can be imported."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def check_installed(backend: str) -> str:
    """Return `backend`. Raise UserError if it is dali and DALI is not installed."""
    if backend == "dali" and not dali_installed():
        fix = "Run make venv, or pass --data.backend pillow."
        raise UserError(f"data.backend is dali, but DALI is not installed. {fix}")
    return backend


def choose_backend(reader: Reader, config: ShardsConfig, device: torch.device, previous: str | None) -> tuple[str, str]:
    """Return the back end for data.backend auto, and the reason.

    previous: the back end that a resumed run used before. It is kept if installed, because back ends differ slightly in
    their pixels; otherwise the faster one is chosen.
    """
    if previous == "pillow" or (previous == "dali" and dali_installed()):
        return previous, "as before"
    if not dali_installed():
        return "pillow", "DALI is not installed"
    rates = measure(reader, config, device)
    return max(rates, key=lambda name: rates[name]), ", ".join(f"{n} {rate:.0f}/s" for n, rate in rates.items())


def measure(reader: Reader, config: ShardsConfig, device: torch.device) -> dict[str, float]:
    """Return images/s of each back end with data.workers processes or threads on the cores of this process."""
    from ddae.data.dali import DaliDecoder

    files, plan = first_files(reader, NUM_TIMED_IMAGES)
    cores = min(max(1, num_workers(config.workers)), len(os.sched_getaffinity(0)))
    decoder = DaliDecoder(reader.size, len(files), cores, device, hw_decoder_load=config.hw_decoder_load)
    seconds: dict[str, list[float]] = {"pillow": [], "dali": []}
    for _ in range(3):
        start = time.perf_counter()
        for file, box in zip(files, plan.crops.boxes.tolist(), strict=True):
            decode_crop(file.tobytes(), tuple(box), False, reader.size)
        pillow_end = time.perf_counter()
        decoder.decode(files, plan.crops.boxes, plan.crops.flips)
        seconds["pillow"].append((pillow_end - start) / cores)  # one process measured; they scale with the cores
        seconds["dali"].append(time.perf_counter() - pillow_end)
    return {name: len(files) / min(times) for name, times in seconds.items()}


def can_decode_regions(reader: Reader, config: ShardsConfig, device: torch.device) -> bool:
    """Return whether DALI can decode crop boxes alone on this device; log a warning if it cannot."""
    if device.type != "cuda":
        return True
    from ddae.data.dali import region_decoding_works

    files, plan = first_files(reader, NUM_PROBE_IMAGES)
    if region_decoding_works(files, plan.crops.boxes, reader.size, device, config.hw_decoder_load):
        return True
    logger.warning("DALI cannot decode regions of JPEGs on this GPU; decoding whole images instead")
    return False


def first_files(reader: Reader, count: int) -> tuple[list[np.ndarray], SamplePlan]:
    """Return files (uint8 arrays) and crops of the first samples in the run's order.

    Samples that Pillow cannot decode are replaced.
    """
    plan = reader.plan(*reader.order.samples(torch.arange(min(count, len(reader.shards)))))
    reader.load_samples(plan, reader.decode)
    return [np.frombuffer(reader.shards.read(sample), np.uint8) for sample in plan.samples.tolist()], plan
