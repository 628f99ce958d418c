"""How fast data comes: each way to load or to decode in a process of its own, all ways in turn, several rounds.

What counts is the ratio of two rates of one run: machines differ, and the same machine from hour to hour.
"""

import csv
import io
import json
import multiprocessing
import os
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
from ddae.sharding.sources import Index, index

SIZE, BATCH = 224, 64  # pixels a side; images a batch
WARM_UP = 4  # batches


def loader_rates(data: str, workers: int, rounds: int, seconds: float, simd: str) -> dict[str, list[float]]:
    """Images/s of each loader, round by round. `simd`: folder that pillow-simd was installed into, if any.

    torchvision's is the baseline: ImageFolder, RandomResizedCrop and flip on Pillow, DataLoader.
    """
    with tempfile.TemporaryDirectory() as folder:
        unpack(data, Path(folder))
        ways = {
            "torchvision": (["torchvision", folder], {}),
            "pillow": (["pillow", data], {}),
            "dali": (["dali", data], {}),
            "read only": (["read", data], {}),
        }
        if simd:
            path = os.pathsep.join(filter(None, (simd, os.environ.get("PYTHONPATH"))))
            ways["pillow, simd"] = (["pillow", data], {"PYTHONPATH": path})
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, (words, environment) in ways.items():
                command = [sys.executable, "-m", "ddae.tools.bench_data", *words, str(workers), str(seconds)]
                done = subprocess.run(
                    command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True
                )
                answer = json.loads(done.stdout.splitlines()[-1])
                assert ("post" in answer["pillow"]) == (name == "pillow, simd"), (
                    f"{name} ran on Pillow {answer['pillow']}"
                )
                rates[name].append(answer["rate"])
                print(f"{name:14s} {answer['rate']:8.0f} images/s", flush=True)
    return rates


def unpack(data: str, folder: Path) -> None:
    """The images of shards as files in class folders, as ImageFolder reads them."""
    shards = open_shards(data, open_cache(ShardsConfig()))
    for sample in range(len(shards)):
        path = folder / f"class_{sample % 10}" / f"{sample:06d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(shards.read(sample))


def measure(way: str, where: str, workers: int, seconds: float) -> float:
    """Images/s of one loader in this process, after a warm-up."""
    match way:
        case "torchvision":
            batches = torchvision_batches(where, workers)
        case "read":
            batches = read_batches(where, workers)
        case _:
            batches = own_batches(way, where, workers)
    for _ in range(WARM_UP):
        next(batches)
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        images += len(next(batches))
    rate = images / (time.perf_counter() - start)
    batches.close()
    return rate


def own_batches(backend: str, where: str, workers: int) -> Generator[torch.Tensor, None, None]:
    """This project's loader."""
    config = ShardsConfig(train=where, batch_size=BATCH, workers=workers, backend=backend)  # type: ignore[arg-type]
    loader = Loader(config, SIZE, 0, RankBatch(BATCH, BATCH, 0, 1), device())
    loader.select_backend()
    try:
        for batch in loader.batches(0):
            if batch.images.is_cuda:
                torch.cuda.synchronize()
            yield batch.images
    finally:
        loader.close()


def read_batches(where: str, workers: int) -> Generator[torch.Tensor, None, None]:
    """Reader threads alone: files and crops, nothing decoded."""
    config = ShardsConfig(train=where, batch_size=4 * BATCH, workers=workers, backend="dali")
    loader = Loader(config, SIZE, 0, RankBatch(4 * BATCH, 4 * BATCH, 0, 1), torch.device("cpu"))
    for micro in loader.read_files(0):
        yield micro.lengths


def torchvision_batches(where: str, workers: int) -> Generator[torch.Tensor, None, None]:
    """What is written today where nothing faster is at hand."""
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    crop = transforms.RandomResizedCrop(SIZE, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    steps = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    images = ImageFolder(where, steps)
    sampler = RandomSampler(images, replacement=True, num_samples=10**9)
    for batch, _ in DataLoader(
        images, BATCH, sampler=sampler, num_workers=workers, prefetch_factor=4 if workers else None
    ):
        yield batch


def pixel_differences(data: str) -> tuple[float, float]:
    """Mean and largest over images of the mean absolute difference between Pillow's crops and those of DALI's whole
    graph, of 255."""
    from ddae.data.dali import DaliDecoder

    config = ShardsConfig()
    shards = open_shards(data, open_cache(config))
    reader = Reader(
        shards, EpochOrder(shards.first, 0), RankBatch(1, 1, 0, 1), SIZE, crop_policy(config.crop, config.crop_scale)
    )
    files, drawn = first_files(reader, 512)
    decoder = DaliDecoder(SIZE, len(files), 2, torch.device("cpu"), resizes=True)
    theirs = decoder.decode(files, drawn.crops.boxes, drawn.crops.flips)
    ours, _, _ = reader.fill(drawn, reader.decode)
    each = [float(np.abs(a.astype(int) - b.numpy().astype(int)).mean()) for a, b in zip(ours, theirs, strict=True)]
    return statistics.mean(each), max(each)


def sharding_rates(archive: str, workers: int, rounds: int) -> dict[str, list[float]]:
    """Images/s of the sharder, of decoding alone by as many processes, which makes every pixel, and of the sharder's
    own look at each image alone, which reads every coded block."""
    images = index("train", archive, None, None)
    rates: dict[str, list[float]] = {"decoding alone": [], "inspection alone": [], "sharding": []}
    for image in range(len(images)):
        images.read(image)  # for all ways to find the archive in memory
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            ways = (
                partial(look_at_all, images, _decode),
                partial(look_at_all, images, inspect),
                partial(shard, [images], Path(folder) / "shards", Settings()),
            )
            for name, work in zip(rates, ways, strict=True):
                start = time.perf_counter()
                work(workers)
                rates[name].append(len(images) / (time.perf_counter() - start))
                print(f"{name:14s} {rates[name][-1]:8.0f} images/s", flush=True)
    return rates


def look_at_all(images: Index, look: Callable[[bytes], object], workers: int) -> None:
    """Read each image in worker processes, 64 a task, and look at it."""
    global _look_at
    _look_at = lambda image: look(images.read(image))  # noqa: E731
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        starts = range(0, len(images), BATCH)
        list(pool.map(_look_at_some, starts, [min(start + BATCH, len(images)) for start in starts]))


_look_at: Callable[[int], object]  # of the workers, which inherit it


def _look_at_some(start: int, end: int) -> None:
    for image in range(start, end):
        _look_at(image)


def _decode(data: bytes) -> None:
    Image.open(io.BytesIO(data)).load()


def ratios(rates: dict[str, list[float]], baseline: str) -> dict[str, float]:
    """Median over rounds of each way's rate over the baseline's in the same round."""
    return {
        name: statistics.median(a / b for a, b in zip(each, rates[baseline], strict=True))
        for name, each in rates.items()
    }


def show(rates: dict[str, list[float]], baseline: str, about: str, out: str) -> None:
    """Print a table; with `out`, append a row a way to OUT.csv and draw OUT.png."""
    against = ratios(rates, baseline)
    print(f"\n{about}: median of {len(rates[baseline])} rounds in turn")
    rows = []
    for name, each in rates.items():
        low, middle, high = min(each), statistics.median(each), max(each)
        print(f"{name:16s} {middle:8.0f} images/s ({low:.0f} to {high:.0f})   {against[name]:.2f} x {baseline}")
        rows.append(
            [about, name, len(each), f"{low:.0f}", f"{middle:.0f}", f"{high:.0f}", f"{against[name]:.2f}", baseline]
        )
    if not out:
        return
    path = Path(out).with_suffix(".csv")
    fresh = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(["about", "way", "rounds", "lowest", "median", "highest", "ratio", "over"])
        writer.writerows(rows)
    drawn = [name for name in rates if name != "read only"][::-1]  # which would dwarf those that decode
    figure, axis = plt.subplots(figsize=(6.4, 0.5 * len(drawn) + 1))
    bars = axis.barh(drawn, [against[name] for name in drawn], color="#0b6e99", height=0.6)
    axis.bar_label(bars, [f" {against[name]:.2f} x" for name in drawn], fontsize=9)
    axis.axvline(1, color="#444444", linewidth=0.8)
    axis.set_xlabel(f"images/s over those of {baseline}", fontsize=9)
    axis.set_title(about, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(Path(out).with_suffix(".png"), dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    way, where, workers, seconds = sys.argv[1:]
    torch.set_num_threads(1)
    print(
        json.dumps({"rate": measure(way, where, int(workers), float(seconds)), "pillow": PIL.__version__}), flush=True
    )
