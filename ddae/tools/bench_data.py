"""Throughput of image loaders and of sharding, in images/s.

Each loader is measured in its own process. Candidates are interleaved over several rounds so that machine noise
cancels; compare ratios within one run, not rates of different machines or times.
"""

import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image

from ddae.config.base import ShardsConfig
from ddae.data.backend import first_files
from ddae.data.cache import open_cache
from ddae.data.dali_fallback import split_files
from ddae.data.loader import Loader, run_ahead
from ddae.data.masking import sample_mask
from ddae.data.reader import RankBatch, Reader
from ddae.data.sampling import EpochOrder, crop_policy
from ddae.data.shards import open_shards
from ddae.distributed.comm import device
from ddae.sharding.inspection import inspect
from ddae.sharding.sharder import Settings, shard
from ddae.sharding.sources import Index, build_index
from ddae.sharding.workers import count_images, run
from ddae.tools.bench_report import READ_ONLY, report_cpu_times, report_rates

SIZE, BATCH = 224, 64  # pixels a side; images a batch
WARMUP_BATCHES = 4
SIMD = "pillow, simd"
# Loaders that also sample masks, for their CPU time: threads of the training process read, or worker processes.
WITH_MASKS = ("dali, threads", "dali, processes", "pillow, processes")
SAMPLE_MASKS = partial(sample_mask, "bootmae_block", grid=(14, 14), num_masked=147)


class CpuTimes(NamedTuple):
    """CPU time of a training process's threads, in ms for BATCH images."""

    training: float  # the thread that takes the batches
    loading: float  # the other threads that run Python, except
    resizing: float  # those that resize on a CPU: nearly all of it is in torch, without the interpreter lock


def benchmark_loaders(data: str, workers: int, rounds: int, seconds: float, simd: str, out: str) -> None:
    """Measure the loaders on shards `data` and report their rates; then compare the pixels of Pillow and DALI."""
    report_rates(loader_rates(data, workers, rounds, seconds, simd), "torchvision", _title(workers), out)
    report_cpu_times(cpu_times(data, workers, rounds, seconds), WITH_MASKS[0], _title(workers), out)
    mean, largest = pixel_differences(data)
    print(f"Pillow's and DALI's crops differ by {mean:.2f} of 255 on average, by {largest:.2f} in the worst image")


def benchmark_sharding(data: str, workers: int, rounds: int, out: str) -> None:
    """Measure sharding of the archive `data` and report its rates."""
    report_rates(sharding_rates(data, workers, rounds), "decoding alone", _title(workers), out)


def _title(workers: int) -> str:
    return f"{workers} workers, {os.cpu_count()} cores, {platform.machine()}"


def loader_rates(data: str, workers: int, rounds: int, seconds: float, simd: str) -> dict[str, list[float]]:
    """Return images/s of each loader, one value a round.

    The baseline is torchvision's pipeline: ImageFolder, RandomResizedCrop and flip on Pillow, DataLoader.
    simd: folder that pillow-simd was installed into, "" to leave it out.
    """
    with tempfile.TemporaryDirectory() as folder:
        extract_images(data, Path(folder))
        loaders = {"torchvision": folder, "pillow": data, "dali": data, READ_ONLY: data}
        if simd:
            loaders[SIMD] = data
        simd_path = os.pathsep.join(filter(None, (simd, os.environ.get("PYTHONPATH"))))
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(rounds):
            for name, images in loaders.items():
                loader, environment = ("pillow", {"PYTHONPATH": simd_path}) if name == SIMD else (name, {})
                result = _measure_in_process(loader, images, workers, seconds, environment)
                assert ("post" in result["pillow"]) == (name == SIMD), f"{name} ran on Pillow {result['pillow']}"
                rates[name].append(result["rate"])
                _print_rate(name, result["rate"])
    return rates


def cpu_times(data: str, workers: int, rounds: int, seconds: float) -> dict[str, list[dict[str, float]]]:
    """Return the CPU times of the loaders WITH_MASKS, by name of a field of CpuTimes; one value a round."""
    times: dict[str, list[dict[str, float]]] = {name: [] for name in WITH_MASKS}
    for _ in range(rounds):
        for name in WITH_MASKS:
            times[name].append(_measure_in_process(name, data, workers, seconds)["cpu_ms"])
    return times


def _measure_in_process(
    loader: str, data: str, workers: int, seconds: float, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Return what measure() does, in a process of its own."""
    command = [sys.executable, "-m", "ddae.tools.bench_data", loader, data, str(workers), str(seconds)]
    output = subprocess.check_output(command, env=os.environ | (environment or {}), text=True)
    return json.loads(output.splitlines()[-1])


def extract_images(data: str, folder: Path) -> None:
    """Write the images of shards as files in class folders, the layout of torchvision's ImageFolder."""
    shards = open_shards(data, open_cache(ShardsConfig()))
    for sample in range(len(shards)):
        path = folder / f"class_{sample % 10}" / f"{sample:06d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(shards.read(sample))


def measure(loader: str, data: str, workers: int, seconds: float) -> tuple[float, CpuTimes]:
    """Return images/s and CPU times of one loader in this process, after a warm-up.

    loader: torchvision, READ_ONLY, one of WITH_MASKS, or a back end.
    """
    others = {"torchvision": torchvision_batches, READ_ONLY: undecoded_batches, WITH_MASKS[0]: threaded_batches}
    others |= {name: partial(ddae_batches, name.partition(",")[0], masks=True) for name in WITH_MASKS[1:]}
    batches = others.get(loader, partial(ddae_batches, loader))(data, workers)
    for _ in range(WARMUP_BATCHES):
        next(batches)
    start, cpu_start, images = time.perf_counter(), thread_seconds(), 0
    while time.perf_counter() - start < seconds:
        images += len(next(batches))
    rate = images / (time.perf_counter() - start)
    used: defaultdict[str, float] = defaultdict(float)
    for thread, seconds_now in thread_seconds().items():
        used[_kind_of(thread)] += (seconds_now - cpu_start.get(thread, 0.0)) * 1000 * BATCH / images
    batches.close()
    return rate, CpuTimes(*(used[name] for name in CpuTimes._fields))


def thread_seconds() -> dict[threading.Thread, float]:
    """Return the CPU seconds of each thread of this process that runs Python."""
    seconds = {}
    for thread in threading.enumerate():
        with suppress(OSError):  # it has ended meanwhile
            nanoseconds = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0]
            seconds[thread] = int(nanoseconds) / 1e9
    return seconds


def _kind_of(thread: threading.Thread) -> str:
    """Return the field of CpuTimes that a thread belongs to."""
    if thread is threading.main_thread():
        return "training"
    return "resizing" if thread.name.startswith("resize") else "loading"


def ddae_batches(backend: str, data: str, workers: int, masks: bool = False) -> Generator[torch.Tensor, None, None]:
    """Yield batches of this project's loader: uint8 [B, 3, S, S]. masks: also sample their masks."""
    config = ShardsConfig(train=data, batch_size=BATCH, workers=workers, backend=backend)  # type: ignore[arg-type]
    sample_masks = SAMPLE_MASKS if masks else None
    loader = Loader(config, SIZE, 0, RankBatch(BATCH, BATCH, 0, 1), device(), sample_masks=sample_masks)
    loader.select_backend()
    try:
        for batch in loader.batches(0):
            if batch.images.is_cuda:
                torch.cuda.synchronize()
            yield batch.images
    finally:
        loader.close()


def threaded_batches(data: str, workers: int) -> Generator[torch.Tensor, None, None]:
    """Yield batches as the loader of version 0.2 did: threads of this process read, decode and sample masks."""
    from ddae.data.dali import DaliDecoder

    config = ShardsConfig(train=data, batch_size=BATCH, workers=0, backend="dali")
    reader = Loader(config, SIZE, 0, RankBatch(BATCH, BATCH, 0, 1), device())._reader()
    decoder = DaliDecoder(SIZE, BATCH, workers, device(), hw_decoder_load=config.hw_decoder_load)
    with ThreadPoolExecutor(workers) as threads:
        tasks = map(partial(threads.submit, reader.__getitem__), count())
        files = deque(next(tasks) for _ in range(2 * workers))

        def decode() -> torch.Tensor:
            raw = files.popleft().result()
            files.append(next(tasks))
            SAMPLE_MASKS(raw.plan.seeds)
            return decoder.decode(split_files(raw), raw.plan.crops.boxes, raw.plan.crops.flips)

        yield from run_ahead(decode, 2)


def undecoded_batches(data: str, workers: int) -> Generator[torch.Tensor, None, None]:
    """Yield the file lengths of batches that were read but not decoded: int64 [B]."""
    config = ShardsConfig(train=data, batch_size=4 * BATCH, workers=workers, backend="dali")
    loader = Loader(config, SIZE, 0, RankBatch(4 * BATCH, 4 * BATCH, 0, 1), torch.device("cpu"))
    files = loader.raw_batches(0)
    try:
        for micro in files:
            yield micro.lengths
    finally:
        files.close()


def torchvision_batches(data: str, workers: int) -> Generator[torch.Tensor, None, None]:
    """Yield batches of torchvision's standard training pipeline: float32 [B, 3, S, S]."""
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    crop = transforms.RandomResizedCrop(SIZE, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    augment = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    images = ImageFolder(data, augment)
    sampler = RandomSampler(images, replacement=True, num_samples=10**9)
    prefetch = 4 if workers else None
    for batch, _ in DataLoader(images, BATCH, sampler=sampler, num_workers=workers, prefetch_factor=prefetch):
        yield batch


def pixel_differences(data: str) -> tuple[float, float]:
    """Compare the crops of Pillow with those of DALI's complete graph on up to 512 images.

    Return mean and maximum over images of the mean absolute difference, on the scale 0 to 255.
    """
    from ddae.data.dali import DaliDecoder

    config = ShardsConfig()
    shards = open_shards(data, open_cache(config))
    order, policy = EpochOrder(shards.shard_starts, 0), crop_policy(config.crop, config.crop_scale)
    reader = Reader(shards, order, RankBatch(1, 1, 0, 1), SIZE, policy)
    files, plan = first_files(reader, 512)
    decoder = DaliDecoder(SIZE, len(files), 2, torch.device("cpu"), resize_in_dali=True)
    from_dali = decoder.decode(files, plan.crops.boxes, plan.crops.flips)
    from_pillow, _ = reader.load_samples(plan, reader.decode)
    differences = np.abs(np.subtract(np.stack(from_pillow), from_dali.numpy(), dtype=np.int16)).mean((1, 2, 3))
    return float(differences.mean()), float(differences.max())


def sharding_rates(archive: str, workers: int, rounds: int) -> dict[str, list[float]]:
    """Return images/s of the sharder and of two lower bounds with as many processes, one value a round.

    The bounds: decoding every pixel, and the sharder's inspection, which reads every coded block.
    """
    images = build_index("train", archive, None, None)
    rates: defaultdict[str, list[float]] = defaultdict(list)
    for image in range(len(images)):
        images.read(image)  # load the archive into the page cache, for all candidates alike
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            candidates = {
                "decoding alone": partial(process_all, images, _decode),
                "inspection alone": partial(process_all, images, inspect),
                "sharding": partial(shard, [images], Path(folder) / "shards", Settings()),
            }
            for name, candidate in candidates.items():
                start = time.perf_counter()
                candidate(workers)
                rates[name].append(len(images) / (time.perf_counter() - start))
                _print_rate(name, rates[name][-1])
    return rates


def _print_rate(name: str, rate: float) -> None:
    print(f"{name:16s} {rate:8.0f} images/s", flush=True)


def process_all(images: Index, process: Callable[[bytes], object], workers: int) -> None:
    """Read each image in worker processes, 64 a task, and process its bytes."""

    def work(start: int) -> None:
        end = min(start + BATCH, len(images))
        for image in range(start, end):
            process(images.read(image))
        count_images(end - start)

    list(run(work, [(start,) for start in range(0, len(images), BATCH)], workers, len(images)))


def _decode(data: bytes) -> None:
    Image.open(io.BytesIO(data)).load()


if __name__ == "__main__":
    loader, data, workers, seconds = sys.argv[1:]
    torch.set_num_threads(1)
    rate, cpu_ms = measure(loader, data, int(workers), float(seconds))
    print(json.dumps({"rate": rate, "cpu_ms": cpu_ms._asdict(), "pillow": PIL.__version__}), flush=True)
