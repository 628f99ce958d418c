"""What evaluations cost: a linear probe of many heads over that of one, and nearest neighbours. On noise: what is
measured does not depend on what images show.
"""

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

BATCH, CLASSES = 64, 1000
BANK, QUERIES, WIDTH, K = 50_000, 5_000, 384, 20


def probe_rates(rounds: int) -> dict[str, list[float]]:
    """Images/s of a step of the paper's linear probe of ViT-S/16, with one head and with all, round by round."""
    encoder = Encoder(ModelConfig(width=384, depth=12, heads=6))
    initialise(encoder, torch.Generator().manual_seed(0))
    encoder.requires_grad_(False).eval()
    numbers = torch.arange(BATCH)
    labels = Labels(numbers % CLASSES, [str(number) for number in range(CLASSES)])
    images = torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8, device=device())
    tasks = {}
    for name, layers in {"one head": (encoder.shape.depth,), "all heads": ()}.items():
        config = probe_recipe("paper")
        config = replace(config, probe=replace(config.probe, layers=layers, untrained=False)).resolved_for(
            encoder.shape.depth
        )
        tasks[name] = task = LinearProbe(config, encoder, labels, None, 1)  # type: ignore[arg-type]  # nothing is validated
        if name == "one head":
            task.names = [f"block {encoder.shape.depth} cls"]
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


def neighbour_seconds() -> float:
    """Seconds in which 5,000 images find their 20 nearest of 50,000 by features of width 384."""
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(count, WIDTH, generator=generator) for count in (BANK, QUERIES))
    start = time.perf_counter()
    vote(bank, torch.arange(BANK) % CLASSES, queries, K)
    return time.perf_counter() - start
