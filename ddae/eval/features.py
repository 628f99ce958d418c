"""Features of a frozen encoder, and label-free statistics of them.

B: batch size, N: number of images, D: encoder width, S: image side in pixels.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddae.distributed.comm import device, sum_over_ranks
from ddae.errors import UserError
from ddae.eval.dataset import ExampleBatch, ExampleReader, batches_of_rank
from ddae.models.patches import normalise
from ddae.models.vit import Encoder

BATCH_SIZE = 128  # images of a rank at a time
RAW_PIXELS = "pixels"  # name of the raw-pixel feature


class Features(NamedTuple):
    """Features of a whole split, on the CPU."""

    by_name: dict[str, Tensor]  # "block 12 cls" -> float32 [N, D]
    labels: Tensor  # int64 [N]


def quarter_blocks(depth: int) -> list[int]:
    """Return the last block of each quarter of the encoder, counted from 1."""
    return sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3, 4)})


def pooled_features(encoder: Encoder, pixels: Tensor, layers: Sequence[int]) -> dict[str, Tensor]:
    """Return the cls token and the mean of the patch tokens after each block of `layers` (counted from 1).

    pixels [B, 3, S, S] -> {"block 12 cls": [B, D], "block 12 mean": [B, D], ...}. The encoder's final norm is applied
    to the last block's tokens, which a downstream model would use; earlier blocks' tokens are not normalised.
    """
    features = {}
    for layer, tokens in zip(layers, encoder.features(pixels, layers), strict=True):
        tokens = encoder.norm(tokens) if layer == encoder.shape.depth else tokens
        # A view of the cls tokens would keep all tokens in memory.
        features |= {f"block {layer} cls": tokens[:, 0].clone(), f"block {layer} mean": tokens[:, 1:].mean(1)}
    return features


@torch.inference_mode()
def extract_features(
    encoders: Sequence[Encoder], examples: Iterable[ExampleBatch], layers: Sequence[int], autocast: bool = False
) -> list[Features]:
    """Return the pooled_features() of each encoder, computed in one pass over the images.

    layers: blocks, counted from 1. autocast: matrix products in bf16.
    """
    by_encoder: list[dict[str, list[Tensor]]] = [defaultdict(list) for _ in encoders]
    labels = []
    for batch in examples:
        for by_name, encoder in zip(by_encoder, encoders, strict=True):
            pixels = normalise(batch.images, encoder.normalisation, torch.float32)
            with torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=autocast):
                features = pooled_features(encoder, pixels, layers)
            require_finite_features(*features.values())
            for name, values in features.items():
                by_name[name].append(values.float().cpu())
        labels.append(batch.labels.cpu())
    whole = ({name: torch.cat(parts) for name, parts in by_name.items()} for by_name in by_encoder)
    return [Features(by_name, torch.cat(labels)) for by_name in whole]


def require_finite_features(*features: Tensor) -> None:
    """Raise UserError for features that are NaN or infinite."""
    if not all(bool(each.isfinite().all()) for each in features):
        raise UserError("the encoder's features are not finite, so that images cannot be ranked. Use another encoder.")


@torch.no_grad()
def map_images(
    reader: ExampleReader, workers: int | None, compute: Callable[[Tensor], dict[str, Tensor]], poll: Callable[[], None]
) -> dict[str, Tensor]:
    """Apply a function to all images of a reader, split over the ranks. Return the results on every rank, on the CPU.

    compute: uint8 [B, 3, S, S] -> {name: [B, ..]}; the result is {name: float32 [N, ..]}. poll() is called before each
    batch.
    """
    results: dict[str, Tensor] = {}
    for batch in batches_of_rank(reader, BATCH_SIZE, workers, device()):
        poll()
        valid = batch.labels >= 0
        for name, values in compute(batch.images).items():
            if name not in results:
                results[name] = torch.zeros(len(reader), *values.shape[1:], device=device())
            results[name][batch.indices[valid]] = values[valid].float()
    return {name: sum_over_ranks(values).cpu() for name, values in results.items()}
