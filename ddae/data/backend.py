"""Which back end decodes on this machine, and whether its GPU can decode regions. Measured, not guessed."""

import importlib.util
import logging
import os
import time

import numpy as np
import torch

from ddae.config.base import ShardsConfig
from ddae.data.decode import decode_crop
from ddae.data.reader import Reader, SamplePlan
from ddae.errors import UserError

logger = logging.getLogger(__name__)

MEASURED = 64  # images by which the faster back end is told
PROBED = 8  # images by which a GPU's decoder is tried


def dali_installed() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def check_installed(backend: str) -> str:
    """The back end's name; UserError where it is not installed."""
    if backend == "dali" and not dali_installed():
        raise UserError("data.backend is 'dali', which is not installed: pip install -e '.[cu13]' or choose 'pillow'")
    return backend


def choose(reader: Reader, config: ShardsConfig, device: torch.device, known: str | None) -> tuple[str, str]:
    """What "auto" stands for, and why, in words: the back end `known` from an earlier start of the run, which gave its
    pixels, else the faster one."""
    if known == "pillow" or (known == "dali" and dali_installed()):
        return known, "as before"
    if not dali_installed():
        return "pillow", "DALI is not installed"
    rates = measure(reader, config, device)
    return max(rates, key=lambda name: rates[name]), ", ".join(f"{n} {rate:.0f}/s" for n, rate in rates.items())


def measure(reader: Reader, config: ShardsConfig, device: torch.device) -> dict[str, float]:
    """Images/s of each back end, decoded by `workers` processes or threads on the cores that this process may use."""
    from ddae.data.dali import DaliDecoder

    files, drawn = first_files(reader, MEASURED)
    cores = min(max(1, config.workers), len(os.sched_getaffinity(0)))
    decoder = DaliDecoder(reader.size, len(files), cores, device, hw_decoder_load=config.hw_decoder_load)
    seconds: dict[str, list[float]] = {"pillow": [], "dali": []}
    for _ in range(3):
        start = time.perf_counter()
        for file, box in zip(files, drawn.crops.boxes.tolist(), strict=True):
            decode_crop(file.tobytes(), tuple(box), False, reader.size)
        middle = time.perf_counter()
        decoder.decode(files, drawn.crops.boxes, drawn.crops.flips)
        seconds["pillow"].append((middle - start) / cores)
        seconds["dali"].append(time.perf_counter() - middle)
    return {name: len(files) / min(times) for name, times in seconds.items()}


def can_decode_regions(reader: Reader, config: ShardsConfig, device: torch.device) -> bool:
    """Whether DALI may decode boxes alone on this device; says so where it may not."""
    if device.type != "cuda":
        return True
    from ddae.data.dali import region_works

    files, drawn = first_files(reader, PROBED)
    if region_works(files, drawn.crops.boxes, reader.size, device, config.hw_decoder_load):
        return True
    logger.warning("DALI cannot decode regions of JPEGs on this GPU; it decodes whole images")
    return False


def first_files(reader: Reader, count: int) -> tuple[list[np.ndarray], SamplePlan]:
    """The files and crops of the first samples in the run's order, but for those that Pillow cannot decode."""
    drawn = reader.draw(*reader.order.samples(torch.arange(min(count, len(reader.shards)))))
    _, drawn, _ = reader.fill(drawn, reader.decode)
    return [np.frombuffer(reader.shards.read(sample), np.uint8) for sample in drawn.samples.tolist()], drawn
