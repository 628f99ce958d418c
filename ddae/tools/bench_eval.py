"""Cost of evaluations on random data: a linear probe with many heads relative to one head, and k-NN search."""

import os
import time
from dataclasses import replace

import torch

from ddae.config.evaluation import probe_recipe
from ddae.config.pretrain import ModelConfig
from ddae.data.loader import Batch
from ddae.distributed.comm import device
from ddae.eval.dataset import Labels
from ddae.eval.knn import vote
from ddae.eval.linear_probe import LinearProbe
from ddae.models.vit import Encoder, initialise
from ddae.tools.bench_report import report_rates

BATCH, CLASSES = 64, 1000
BANK, QUERIES, WIDTH, K = 50_000, 5_000, 384, 20


def benchmark_evaluation(rounds: int, out: str) -> None:
    """Measure and report both."""
    report_rates(probe_rates(rounds), "one head", f"linear probe step, {os.cpu_count()} cores", out)
    print(f"k-NN: {QUERIES:,} queries, {BANK:,} images, k = {K}, width {WIDTH}: {knn_seconds():.1f} s")


def probe_rates(rounds: int) -> dict[str, list[float]]:
    """Return images/s of a step of the paper's linear probe of ViT-S/16 with one head and all, one value a round."""
    encoder = Encoder(ModelConfig(width=384, depth=12, heads=6))
    initialise(encoder, torch.Generator().manual_seed(0))
    encoder.requires_grad_(False).eval()
    numbers = torch.arange(BATCH)
    labels = Labels(numbers % CLASSES, [str(number) for number in range(CLASSES)])
    images = torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8, device=device())
    depth, tasks = encoder.shape.depth, {}
    for name, layers in {"one head": (depth,), "all heads": ()}.items():
        config = probe_recipe("paper")
        config = replace(config, probe=replace(config.probe, layers=layers, untrained=False)).resolved_for(depth)
        tasks[name] = task = LinearProbe(config, encoder, labels, None, 1)  # type: ignore[arg-type]  # no validation
        if name == "one head":
            task.names = [f"block {depth} cls"]
        task.build({})
    rates: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task.optimizable.backward(task.loss(Batch(images, numbers, numbers), 0))
            task.optimizable.step(0.1)
            if number:  # the first round warms up
                rates[name].append(BATCH / (time.perf_counter() - start))
    return rates


def knn_seconds() -> float:
    """Return the seconds in which QUERIES features vote among their K nearest of BANK features of dimension WIDTH."""
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(count, WIDTH, generator=generator) for count in (BANK, QUERIES))
    start = time.perf_counter()
    vote(bank, torch.arange(BANK) % CLASSES, queries, K)
    return time.perf_counter() - start
