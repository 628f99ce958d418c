"""Features of a frozen encoder, and what they say of themselves without any label.

B images, N patches, D width.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddae.distributed.comm import device, rank, sum_over_ranks, world_size
from ddae.eval.dataset import ExampleReader, Examples, batches_of_rank
from ddae.models.patches import normalise
from ddae.models.vit import Encoder


class Features(NamedTuple):
    """Of a whole split, on the CPU."""

    by_name: dict[str, Tensor]  # "block 12 cls" -> float32 [B, D]
    labels: Tensor  # int64 [B]


def quarters(depth: int) -> list[int]:
    """The last block of each quarter, counted from 1."""
    return sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3, 4)})


def pooled(encoder: Encoder, pixels: Tensor, layers: Sequence[int]) -> dict[str, Tensor]:
    """[B, 3, S, S] -> {"block 12 cls": [B, D], ...}: both poolings of the tokens after each block (counted from 1).

    The last block's go through the encoder's final norm, as those that a downstream model would read; others are as
    they are.
    """
    found = {}
    for layer, tokens in zip(layers, encoder.features(pixels, layers), strict=True):
        tokens = encoder.norm(tokens) if layer == encoder.shape.depth else tokens
        found |= {f"block {layer} cls": tokens[:, 0], f"block {layer} mean": tokens[:, 1:].mean(1)}
    return found


BATCH = 128  # images of a rank at a time
RAW = "pixels"  # the one feature of raw pixels


@torch.inference_mode()
def extract(
    encoders: Sequence[Encoder], examples: Iterable[Examples], layers: Sequence[int], autocast: bool = False
) -> list[Features]:
    """Features of each encoder, in one pass over the images.

    They are both poolings of the tokens after each block of `layers` (counted from 1). autocast: products in
    bf16.
    """
    named: list[dict[str, list[Tensor]]] = [defaultdict(list) for _ in encoders]
    labels = []
    for batch in examples:
        for parts, encoder in zip(named, encoders, strict=True):
            pixels = normalise(batch.images, encoder.normalisation, torch.float32)
            with torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=autocast):
                found = pooled(encoder, pixels, layers)
            for name, values in found.items():
                parts[name].append(values.float().cpu())
        labels.append(batch.labels.cpu())
    classes = torch.cat(labels)
    return [Features({name: torch.cat(parts) for name, parts in each.items()}, classes) for each in named]


@torch.no_grad()
def table_of(
    reader: ExampleReader, workers: int, make: Callable[[Tensor], dict[str, Tensor]], poll: Callable[[], None]
) -> dict[str, Tensor]:
    """What `make` gives for each image of a reader, by name: float32 [N, ..] on the CPU, whole on every rank.

    Each image is read once, by one of the ranks. make: uint8 [B, 3, S, S] -> {name: [B, ..]}. look_around is called at
    every batch.
    """
    tables, place = {}, rank()
    for examples in batches_of_rank(reader, BATCH, workers, device()):
        poll()
        counted = place + torch.arange(len(examples.labels), device=device()) * world_size() < len(reader)
        for name, values in make(examples.images).items():
            table = tables.setdefault(name, torch.zeros(len(reader), *values.shape[1:], device=device()))
            places = place + torch.arange(int(counted.sum()), device=device()) * world_size()
            table[places] = values[counted].float()
        place += len(examples.labels) * world_size()
    return {name: sum_over_ranks(table).cpu() for name, table in tables.items()}


def effective_rank(features: Tensor) -> float:
    """How many directions the features [B, D] use: the exponential of the entropy of their singular values' shares
    (RankMe, Garrido et al. 2023). 1 where they have collapsed to one, at most min(B, D)."""
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum() + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


def spread(features: Tensor) -> float:
    """Deviation of a feature over the images, after each image's features are scaled to length sqrt(D): 1 where
    images differ in every direction alike, 0 where all images look the same."""
    unit = torch.nn.functional.normalize(features, dim=1) * features.shape[1] ** 0.5
    return float(unit.std(0).mean())
