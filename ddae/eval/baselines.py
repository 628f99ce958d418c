"""What an accuracy is compared with: chance, nearest neighbours of raw pixels, and the same encoder untrained.

An accuracy alone says little: features of random weights, or the pixels themselves, may give the same. C classes,
N images, S pixels a side.
"""

import hashlib
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddae.data.rng import permutation
from ddae.models.vit import Encoder, initialise

logger = logging.getLogger(__name__)

RESAMPLES = 10_000  # of the bootstrap
ERRORS = 2.0  # standard errors within which two accuracies are reported as no difference
SELECTION = 10_000  # most training images that choose between features; at most every tenth one
RAW_SIDE = 32  # images are reduced to so many pixels a side, at most, for the neighbours of raw pixels
FORMAT = 1  # of a cached result


class Measured(NamedTuple):
    """The accuracy of one encoder, by the feature that was chosen on a part of the training split."""

    feature: str
    accuracy: float  # on the validation split, in per cent
    right: Tensor  # bool [N]: of each validation image


class Compared(NamedTuple):
    """An accuracy with what it is compared with, in per cent on the same validation images: entries of results.json."""

    accuracy: float
    untrained: float | None  # None where it was not measured
    raw_pixels: float  # by nearest neighbours
    chance: float
    gain: float | None  # over untrained weights, in points
    standard_error: float | None  # of the gain

    def results(self, what: str) -> dict[str, Any]:
        """Entries of results.json: the fields and `verdict`, the first line of every report of this accuracy."""
        return self._asdict() | {"verdict": verdict(self, what)}


def compare(right: Tensor, untrained: Tensor | None, raw_pixels: float, chance: float) -> Compared:
    """Compare which validation images are right, bool [N], with those of untrained weights."""
    accuracy = 100 * float(right.float().mean())
    if untrained is None:
        return Compared(accuracy, None, raw_pixels, chance, None, None)
    baseline = 100 * float(untrained.float().mean())
    return Compared(accuracy, baseline, raw_pixels, chance, accuracy - baseline, paired_error(right, untrained))


def paired_error(right: Tensor, baseline: Tensor) -> float:
    """Return the standard error, in points, of the difference of two accuracies on the same images, by bootstrap.

    An image contributes +1, 0 or -1 to the difference, so that resampling images is drawing from a multinomial. One
    image is added to either side (Bonett and Price 2012), or a few images that all agree would have no error.
    """
    difference = right.int() - baseline.int()
    counts = np.array([int((difference == value).sum()) for value in (1, -1, 0)]) + np.array([1, 1, 0])
    drawn = np.random.default_rng(0).multinomial(len(difference), counts / counts.sum(), RESAMPLES)
    return float(100 * (drawn[:, 0] - drawn[:, 1]).std() / len(difference))


def verdict(compared: Compared, what: str) -> str:
    """Return a sentence that has the accuracy beside its baselines, and says whether training made a difference."""
    accuracy, baseline, raw_pixels, by_chance, gain, error = compared
    others = f"raw pixels {raw_pixels:.1f} %, chance {by_chance:.1f} %"
    if gain is None or error is None:
        return f"{what} {accuracy:.1f} %; untrained weights not measured, {others}"
    untrained = f"untrained weights {baseline:.1f} %"
    if abs(gain) <= ERRORS * error:
        difference = f"(difference {gain:+.1f} ± {error:.1f} points)"
        return f"no difference from untrained weights: {what} {accuracy:.1f} %, {untrained} {difference}, {others}"
    word = "above" if gain > 0 else "BELOW"
    return (
        f"{what} {accuracy:.1f} %, {abs(gain):.1f} ± {error:.1f} points {word} untrained weights; {untrained}, {others}"
    )


def first_line(results: dict[str, Any]) -> str:
    """Return the sentence of results.json that compares the accuracy with its baselines."""
    missing = "these results are of an earlier version, without baselines: delete them, or choose another --run_dir"
    return results.get("verdict", missing)


def lines(results: dict[str, Any]) -> dict[str, float]:
    """Return the baselines of results.json by the names that figures use."""
    names = {"untrained": "untrained weights", "raw_pixels": "raw pixels", "chance": "chance"}
    return {word: results[name] for name, word in names.items() if results.get(name) is not None}


def chance(train: Tensor, val: Tensor) -> float:
    """Return the accuracy in per cent of always answering train's most frequent class; int64 [N] classes each."""
    return 100 * float((val == train.bincount().argmax()).float().mean())


def untrained_encoder(like: Encoder, seed: int = 0) -> Encoder:
    """Return an encoder of the same architecture and pixels with the initial weights of this seed, frozen."""
    encoder = Encoder(like.shape)
    initialise(encoder, torch.Generator().manual_seed(seed), like.shape.init)
    encoder.normalisation = like.normalisation
    return encoder.eval().requires_grad_(False)


def selection_part(count: int) -> Tensor:
    """Return which training images are held out to choose between features: bool [N]."""
    held = torch.zeros(count, dtype=torch.bool)
    held[permutation(count, count)[: min(SELECTION, count // 10)]] = True
    return held


def pixel_features(images: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] -> float32 [B, 3 * side * side]: averaged down to RAW_SIDE pixels a side, at most.

    The mean image of the bank is to be subtracted before cosines are taken.
    """
    side = min(RAW_SIDE, images.shape[-1])
    return F.adaptive_avg_pool2d(images.float(), side).flatten(1)


def grey(images: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] -> the same size in grey, each image of mean 128 and standard deviation 64, so that colour,
    brightness and contrast tell nothing."""
    luma = torch.tensor([0.299, 0.587, 0.114], device=images.device)
    shade = torch.einsum("bchw,c->bhw", images.float(), luma)[:, None]
    centred = shade - shade.mean((2, 3), keepdim=True)
    deviation = centred.square().mean((2, 3), keepdim=True).sqrt()
    return (64 * centred / (deviation + 1e-3) + 128).clamp(0, 255).round().to(torch.uint8).expand_as(images)


def recall(folder: str | Path, encoder: Encoder, protocol: dict[str, Any]) -> Measured | None:
    """Return what remember() stored for an untrained encoder of this architecture under this protocol, or None.

    The protocol holds all else that the numbers depend on, the seed and the data sets' fingerprints included.
    """
    try:
        entry = json.loads(_file(folder, encoder, protocol).read_text())
        right = torch.tensor([digit == "1" for digit in entry["right"]])
        return Measured(entry["feature"], entry["accuracy"], right)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(folder: str | Path, encoder: Encoder, protocol: dict[str, Any], measured: Measured) -> None:
    """Store the result for recall(). A folder that cannot be written is reported, and nothing is stored."""
    file = _file(folder, encoder, protocol)
    right = "".join(map(str, measured.right.int().tolist()))
    entry = {"feature": measured.feature, "accuracy": measured.accuracy, "right": right, "of": protocol}
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(entry) + "\n")
        unfinished.replace(file)
    except OSError as error:
        reason = error.strerror
        logger.warning("%s cannot be written (%s); the untrained encoder is measured again next time", file, reason)


def _file(folder: str | Path, encoder: Encoder, protocol: dict[str, Any]) -> Path:
    known = {"format": FORMAT, "encoder": asdict(encoder.shape), "normalisation": encoder.normalisation, **protocol}
    weights = hashlib.sha256()  # of the initial weights, which another version may draw otherwise
    for values in encoder.state_dict().values():
        weights.update(values.cpu().numpy().tobytes())
    known["weights"] = weights.hexdigest()
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:24]
    return Path(folder) / "baselines" / f"{key}.json"
