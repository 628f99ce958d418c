"""Throughput of image loaders and of sharding, in images/s.

Each loader is measured in its own process. Candidates are interleaved over several rounds so that machine noise
cancels; compare ratios within one run, not rates of different machines or times.
"""

import csv
import io
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import PIL
import torch
from PIL import Image

from ddae.config.base import ShardsConfig
from ddae.data.backend import first_files
from ddae.data.cache import open_cache
from ddae.data.loader import Loader
from ddae.data.reader import RankBatch, Reader
from ddae.data.sampling import EpochOrder, crop_policy
from ddae.data.shards import open_shards
from ddae.distributed.comm import device
from ddae.sharding.inspection import inspect
from ddae.sharding.sharder import Settings, shard
from ddae.sharding.sources import Index, build_index

SIZE, BATCH = 224, 64  # pixels a side; images a batch
WARMUP_BATCHES = 4
READ_ONLY = "read only"  # files and crop boxes without decoding


def benchmark_loaders(data: str, workers: int, rounds: int, seconds: float, simd: str, out: str) -> None:
    """Measure the loaders on shards `data` and report their rates; then compare the pixels of Pillow and DALI."""
    rates = loader_rates(data, workers, rounds, seconds, simd)
    report(rates, "torchvision", _title(workers), out)
    mean, largest = pixel_differences(data)
    print(f"Pillow's and DALI's crops differ by {mean:.2f} of 255 on average, by {largest:.2f} in the worst image")


def benchmark_sharding(data: str, workers: int, rounds: int, out: str) -> None:
    """Measure sharding of the archive `data` and report its rates."""
    report(sharding_rates(data, workers, rounds), "decoding alone", _title(workers), out)


def _title(workers: int) -> str:
    return f"{workers} workers, {os.cpu_count()} cores, {platform.machine()}"


def loader_rates(data: str, workers: int, rounds: int, seconds: float, simd: str) -> dict[str, list[float]]:
    """Return images/s of each loader, one value a round.

    The baseline is torchvision's pipeline: ImageFolder, RandomResizedCrop and flip on Pillow, DataLoader.
    simd: folder that pillow-simd was installed into, "" to leave it out.
    """
    with tempfile.TemporaryDirectory() as folder:
        extract_images(data, Path(folder))
        loaders = {
            "torchvision": (["torchvision", folder], {}),
            "pillow": (["pillow", data], {}),
            "dali": (["dali", data], {}),
            READ_ONLY: (["read", data], {}),
        }
        if simd:
            path = os.pathsep.join(filter(None, (simd, os.environ.get("PYTHONPATH"))))
            loaders["pillow, simd"] = (["pillow", data], {"PYTHONPATH": path})
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(rounds):
            for name, (args, environment) in loaders.items():
                command = [sys.executable, "-m", "ddae.tools.bench_data", *args, str(workers), str(seconds)]
                process = subprocess.run(
                    command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True
                )
                result = json.loads(process.stdout.splitlines()[-1])
                assert ("post" in result["pillow"]) == (name == "pillow, simd"), (
                    f"{name} ran on Pillow {result['pillow']}"
                )
                rates[name].append(result["rate"])
                _print_rate(name, result["rate"])
    return rates


def extract_images(data: str, folder: Path) -> None:
    """Write the images of shards as files in class folders, the layout of torchvision's ImageFolder."""
    shards = open_shards(data, open_cache(ShardsConfig()))
    for sample in range(len(shards)):
        path = folder / f"class_{sample % 10}" / f"{sample:06d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(shards.read(sample))


def measure_rate(loader: str, data: str, workers: int, seconds: float) -> float:
    """Return images/s of one loader in this process, after a warm-up."""
    match loader:
        case "torchvision":
            batches = torchvision_batches(data, workers)
        case "read":
            batches = undecoded_batches(data, workers)
        case _:
            batches = ddae_batches(loader, data, workers)
    for _ in range(WARMUP_BATCHES):
        next(batches)
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        images += len(next(batches))
    rate = images / (time.perf_counter() - start)
    batches.close()
    return rate


def ddae_batches(backend: str, data: str, workers: int) -> Generator[torch.Tensor, None, None]:
    """Yield batches of this project's loader: uint8 [B, 3, S, S]."""
    config = ShardsConfig(train=data, batch_size=BATCH, workers=workers, backend=backend)  # type: ignore[arg-type]
    loader = Loader(config, SIZE, 0, RankBatch(BATCH, BATCH, 0, 1), device())
    loader.select_backend()
    try:
        for batch in loader.batches(0):
            if batch.images.is_cuda:
                torch.cuda.synchronize()
            yield batch.images
    finally:
        loader.close()


def undecoded_batches(data: str, workers: int) -> Generator[torch.Tensor, None, None]:
    """Yield the file lengths of batches that the reader threads have read but not decoded: int64 [B]."""
    config = ShardsConfig(train=data, batch_size=4 * BATCH, workers=workers, backend="dali")
    loader = Loader(config, SIZE, 0, RankBatch(4 * BATCH, 4 * BATCH, 0, 1), torch.device("cpu"))
    for micro in loader.read_files(0):
        yield micro.lengths


def torchvision_batches(data: str, workers: int) -> Generator[torch.Tensor, None, None]:
    """Yield batches of torchvision's standard training pipeline: float32 [B, 3, S, S]."""
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    crop = transforms.RandomResizedCrop(SIZE, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    augment = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    images = ImageFolder(data, augment)
    sampler = RandomSampler(images, replacement=True, num_samples=10**9)
    for batch, _ in DataLoader(
        images, BATCH, sampler=sampler, num_workers=workers, prefetch_factor=4 if workers else None
    ):
        yield batch


def pixel_differences(data: str) -> tuple[float, float]:
    """Compare the crops of Pillow with those of DALI's complete graph on up to 512 images.

    Return mean and maximum over images of the mean absolute difference, on the scale 0 to 255.
    """
    from ddae.data.dali import DaliDecoder

    config = ShardsConfig()
    shards = open_shards(data, open_cache(config))
    reader = Reader(
        shards,
        EpochOrder(shards.shard_starts, 0),
        RankBatch(1, 1, 0, 1),
        SIZE,
        crop_policy(config.crop, config.crop_scale),
    )
    files, plan = first_files(reader, 512)
    decoder = DaliDecoder(SIZE, len(files), 2, torch.device("cpu"), resize_in_dali=True)
    from_dali = decoder.decode(files, plan.crops.boxes, plan.crops.flips)
    from_pillow, _, _ = reader.load_samples(plan, reader.decode)
    differences = [
        float(np.abs(pillow.astype(int) - dali.numpy().astype(int)).mean())
        for pillow, dali in zip(from_pillow, from_dali, strict=True)
    ]
    return statistics.mean(differences), max(differences)


def sharding_rates(archive: str, workers: int, rounds: int) -> dict[str, list[float]]:
    """Return images/s of the sharder and of two lower bounds with as many processes, one value a round.

    The bounds: decoding every pixel, and the sharder's inspection, which reads every coded block.
    """
    images = build_index("train", archive, None, None)
    rates: dict[str, list[float]] = {"decoding alone": [], "inspection alone": [], "sharding": []}
    for image in range(len(images)):
        images.read(image)  # load the archive into the page cache, for all candidates alike
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            candidates = (
                partial(process_all, images, _decode),
                partial(process_all, images, inspect),
                partial(shard, [images], Path(folder) / "shards", Settings()),
            )
            for name, run in zip(rates, candidates, strict=True):
                start = time.perf_counter()
                run(workers)
                rates[name].append(len(images) / (time.perf_counter() - start))
                _print_rate(name, rates[name][-1])
    return rates


def _print_rate(name: str, rate: float) -> None:
    print(f"{name:16s} {rate:8.0f} images/s", flush=True)


def process_all(images: Index, process: Callable[[bytes], object], workers: int) -> None:
    """Read each image in worker processes, 64 a task, and process its bytes."""
    global _process_image
    _process_image = lambda image: process(images.read(image))  # noqa: E731
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        starts = range(0, len(images), BATCH)
        list(pool.map(_process_range, starts, [min(start + BATCH, len(images)) for start in starts]))


_process_image: Callable[[int], object]  # inherited by the forked workers


def _process_range(start: int, end: int) -> None:
    for image in range(start, end):
        _process_image(image)


def _decode(data: bytes) -> None:
    Image.open(io.BytesIO(data)).load()


def median_ratios(rates: dict[str, list[float]], baseline: str) -> dict[str, float]:
    """Return the median over rounds of each rate divided by the baseline's rate in the same round."""
    return {
        name: statistics.median(rate / base for rate, base in zip(by_round, rates[baseline], strict=True))
        for name, by_round in rates.items()
    }


def report(rates: dict[str, list[float]], baseline: str, title: str, out: str) -> None:
    """Print a table; if `out` is not empty, append its rows to OUT.csv and draw OUT.png."""
    ratios = median_ratios(rates, baseline)
    print(f"\n{title}: median of {len(rates[baseline])} interleaved rounds")
    rows = []
    for name, by_round in rates.items():
        low, median, high = min(by_round), statistics.median(by_round), max(by_round)
        print(f"{name:16s} {median:8.0f} images/s ({low:.0f} to {high:.0f})   {ratios[name]:.2f} x {baseline}")
        numbers = [f"{low:.0f}", f"{median:.0f}", f"{high:.0f}", f"{ratios[name]:.2f}"]
        rows.append([title, name, len(by_round), *numbers, baseline])
    if not out:
        return
    path = Path(out).with_suffix(".csv")
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(["about", "way", "rounds", "lowest", "median", "highest", "ratio", "over"])
        writer.writerows(rows)
    names = [name for name in rates if name != READ_ONLY][::-1]  # its bar would dwarf those of the decoders
    figure, axis = plt.subplots(figsize=(6.4, 0.5 * len(names) + 1))
    bars = axis.barh(names, [ratios[name] for name in names], color="#0b6e99", height=0.6)
    axis.bar_label(bars, [f" {ratios[name]:.2f} x" for name in names], fontsize=9)
    axis.axvline(1, color="#444444", linewidth=0.8)
    axis.set_xlabel(f"images/s relative to {baseline}", fontsize=9)
    axis.set_title(title, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(Path(out).with_suffix(".png"), dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    loader, data, workers, seconds = sys.argv[1:]
    torch.set_num_threads(1)
    rate = measure_rate(loader, data, int(workers), float(seconds))
    print(json.dumps({"rate": rate, "pillow": PIL.__version__}), flush=True)
