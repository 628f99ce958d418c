"""Baselines of an accuracy: chance, k-NN on raw pixels, and the same architecture with untrained weights.

C: number of classes, N: number of images, S: image side in pixels.
"""

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddae import atomic
from ddae.data.rng import permutation
from ddae.export.encoder import INITIAL, load_encoder
from ddae.models.vit import Encoder, initialise

logger = logging.getLogger(__name__)

BOOTSTRAP_SAMPLES = 10_000
SIGNIFICANT = 2.0  # standard errors; a smaller difference is reported as no difference
MAX_SELECTION_IMAGES = 10_000  # training images held out to select a feature; at most a tenth of them
RAW_SIDE = 32  # largest side of the images, in pixels, for k-NN on raw pixels
UNTRAINED_WEIGHTS = "untrained weights"  # name of the baseline
FORMAT = 1  # of a cached result


class FeatureAccuracy(NamedTuple):
    """The accuracy of one encoder with the feature that was selected on a part of the training split."""

    feature: str
    accuracy: float  # on the validation split, in per cent
    correct: Tensor  # bool [N]: for each validation image


class Comparison(NamedTuple):
    """An accuracy and its baselines, in per cent on the same validation images; the fields are keys of results.json."""

    accuracy: float
    untrained: float | None  # None: not measured
    raw_pixels: float  # k-NN
    chance: float
    gain: float | None  # over untrained weights, in points
    standard_error: float | None  # of the gain, in points

    def results(self, metric: str, baseline: str = UNTRAINED_WEIGHTS) -> dict[str, Any]:
        """Return the entries of results.json: the fields, and `verdict`, the first line of every report.

        metric: name of the accuracy in the verdict. baseline: baseline_name().
        """
        return self._asdict() | {"baseline": baseline, "verdict": verdict(self, metric, baseline)}


def compare(correct: Tensor, untrained: Tensor | None, raw_pixels: float, chance: float) -> Comparison:
    """Compare an encoder with untrained weights: for each validation image whether it is correct, bool [N] each."""
    accuracy = 100 * float(correct.float().mean())
    if untrained is None:
        return Comparison(accuracy, None, raw_pixels, chance, None, None)
    baseline = 100 * float(untrained.float().mean())
    error = paired_standard_error(correct, untrained)
    return Comparison(accuracy, baseline, raw_pixels, chance, accuracy - baseline, error)


def paired_standard_error(correct: Tensor, baseline: Tensor) -> float:
    """Return the bootstrap standard error, in points, of the difference of two accuracies on the same images.

    correct, baseline: bool [N]. An image contributes +1, 0 or -1 to the difference, so resampling images is sampling
    from a multinomial. One image is added to either side (Bonett and Price 2012); otherwise a few images that all agree
    would have a standard error of 0.
    """
    difference = correct.int() - baseline.int()
    counts = np.array([int((difference == value).sum()) for value in (1, -1, 0)]) + np.array([1, 1, 0])
    samples = np.random.default_rng(0).multinomial(len(difference), counts / counts.sum(), BOOTSTRAP_SAMPLES)
    return float(100 * (samples[:, 0] - samples[:, 1]).std() / len(difference))


def verdict(comparison: Comparison, metric: str, name: str = UNTRAINED_WEIGHTS) -> str:
    """Return a sentence with the accuracy, its baselines, and whether it differs significantly from untrained weights.

    metric: name of the accuracy; name: of the baseline.
    """
    accuracy, baseline, raw_pixels, by_chance, gain, error = comparison
    others = f"raw pixels {raw_pixels:.1f} %, chance {by_chance:.1f} %"
    if gain is None or error is None:
        return f"{metric} {accuracy:.1f} %; {name} not measured, {others}"
    untrained = f"{name} {baseline:.1f} %"
    if abs(gain) <= SIGNIFICANT * error:
        difference = f"(difference {gain:+.1f} ± {error:.1f} points)"
        return f"no difference from {name}: {metric} {accuracy:.1f} %, {untrained} {difference}, {others}"
    difference = f"{abs(gain):.1f} ± {error:.1f} points {'above' if gain > 0 else 'BELOW'} {name}"
    return f"{metric} {accuracy:.1f} %, {difference}; {untrained}, {others}"


def verdict_of(results: dict[str, Any]) -> str:
    """Return the verdict in results.json."""
    missing = "These results of an earlier version have no baselines. Delete them, or choose another --run_dir."
    return results.get("verdict", missing)


def by_label(results: dict[str, Any]) -> dict[str, float]:
    """Return the baselines in results.json that were measured, by their labels in figures."""
    labels = {"untrained": results.get("baseline", UNTRAINED_WEIGHTS), "raw_pixels": "raw pixels", "chance": "chance"}
    return {label: results[key] for key, label in labels.items() if results.get(key) is not None}


def chance(train: Tensor, val: Tensor) -> float:
    """Return the accuracy, in per cent, of always predicting the most frequent training class; int64 [N] each."""
    return 100 * float((val == train.bincount().argmax()).float().mean())


def untrained_encoder(like: Encoder, seed: int = 0) -> Encoder:
    """Return a frozen encoder of the same architecture and normalisation, initialised from the seed.

    Of a run that started from given weights: the encoder of these weights, whatever the seed.
    """
    if like.initial_path is not None:
        return load_encoder(like.initial_path, like.shape.image_size, like.normalisation)
    encoder = Encoder(like.shape)
    initialise(encoder, torch.Generator().manual_seed(seed), like.shape.init)
    encoder.normalisation = like.normalisation
    return encoder.eval().requires_grad_(False)


def baseline_name(encoder: Encoder | Path) -> str:
    """Return what untrained_encoder() is, for results. encoder: one, or the folder of a run."""
    given = (encoder / INITIAL).is_dir() if isinstance(encoder, Path) else encoder.initial_path is not None
    return "initial weights" if given else UNTRAINED_WEIGHTS


def selection_mask(count: int) -> Tensor:
    """Return which of `count` training images are held out to select a feature: bool [N]."""
    mask = torch.zeros(count, dtype=torch.bool)
    mask[permutation(count, count)[: min(MAX_SELECTION_IMAGES, count // 10)]] = True
    return mask


def pixel_features(images: Tensor) -> Tensor:
    """Average images down to at most RAW_SIDE pixels a side: uint8 [B, 3, H, W] -> float32 [B, 3 * h * w].

    Subtract the mean image of the bank before computing cosine similarities.
    """
    height, width = images.shape[-2:]
    return F.adaptive_avg_pool2d(images.float(), (min(RAW_SIDE, height), min(RAW_SIDE, width))).flatten(1)


def to_grey(images: Tensor) -> Tensor:
    """Convert images to grey with mean 128 and standard deviation 64 each: uint8 [B, 3, H, W], same shape.

    Colour, brightness and contrast then carry no information about the class.
    """
    luma = torch.tensor([0.299, 0.587, 0.114], device=images.device)
    grey = torch.einsum("bchw,c->bhw", images.float(), luma)[:, None]
    centred = grey - grey.mean((2, 3), keepdim=True)
    std = centred.square().mean((2, 3), keepdim=True).sqrt()
    return (64 * centred / (std + 1e-3) + 128).clamp(0, 255).round().to(torch.uint8).expand_as(images)


def load_cached(folder: str | Path, encoder: Encoder, protocol: dict[str, Any]) -> FeatureAccuracy | None:
    """Return the cached result of this untrained encoder under this protocol; None if there is none.

    protocol: all else that the result depends on, including the seed and the data sets' fingerprints.
    """
    try:
        entry = json.loads(_cache_file(folder, encoder, protocol).read_text())
        correct = torch.tensor([digit == "1" for digit in entry["right"]])
        return FeatureAccuracy(entry["feature"], entry["accuracy"], correct)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store_cached(folder: str | Path, encoder: Encoder, protocol: dict[str, Any], result: FeatureAccuracy) -> None:
    """Store a result for load_cached(). If the folder is not writable, log a warning instead."""
    file = _cache_file(folder, encoder, protocol)
    correct = "".join(map(str, result.correct.int().tolist()))
    entry = {"feature": result.feature, "accuracy": result.accuracy, "right": correct, "of": protocol}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_json(file, entry, indent=None)
    except OSError as error:
        outcome = "The untrained encoder will be evaluated again next time."
        logger.warning("%s cannot be written (%s). %s", file, error.strerror, outcome)


def _cache_file(folder: str | Path, encoder: Encoder, protocol: dict[str, Any]) -> Path:
    """Return the file whose name is a hash of format, architecture, initial weights and protocol."""
    key = {"format": FORMAT, "encoder": asdict(encoder.shape), "normalisation": encoder.normalisation, **protocol}
    weights = hashlib.sha256()  # another version may initialise the same seed differently
    for values in encoder.state_dict().values():
        weights.update(values.cpu().numpy().tobytes())
    key["weights"] = weights.hexdigest()
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return Path(folder) / "baselines" / f"{name}.json"
