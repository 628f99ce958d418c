"""Augmentations of fine-tuning, timm's, each as a pure function of a seed: a resumed run draws what an unbroken one
draws.

B images, S pixels a side, C classes.
"""

import random

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn import functional as F

from ddae.config.evaluation import AugmentConfig
from ddae.errors import UserError
from ddae.models.patches import NORMALISATIONS

SHIFT = 0.45  # of the side: the largest translation, in timm's training transforms


class Policy:
    """RandAugment of one image, in a reader process."""

    def __init__(self, policy: str, size: int, normalisation: str):
        mean = tuple(min(255, round(255 * each)) for each in NORMALISATIONS[normalisation][0])
        options = {"translate_const": int(size * SHIFT), "img_mean": mean, "interpolation": Image.Resampling.BICUBIC}
        try:
            self._transform = rand_augment_transform(policy, options)
        except (AssertionError, ValueError, KeyError) as error:
            reason = f" ({error})" if str(error) else ""
            raise UserError(f"augment.policy {policy!r} is none of timm's{reason}: try rand-m9-mstd0.5-inc1") from None

        for operation in self._transform.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize

    def __call__(self, image: np.ndarray, seed: int) -> np.ndarray:
        """uint8 [3, S, S] -> the same."""
        seed_all(seed)
        changed = self._transform(Image.fromarray(image.transpose(1, 2, 0)))
        return np.ascontiguousarray(np.asarray(changed).transpose(2, 0, 1))


def posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """The highest `bits` of every channel. The strongest setting of `inc1` keeps none, which is a black image and which
    Pillow 12 refuses."""
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


class Mixer:
    """Random erasing, then mixup or CutMix, and the soft targets that go with them, of a batch on its device."""

    def __init__(self, config: AugmentConfig, num_classes: int, device: torch.device):
        self._smoothing, self._num_classes = config.smoothing, num_classes
        self._erase = RandomErasing(config.erase, mode="pixel", device=str(device)) if config.erase else None
        self._mix = None
        if config.mixup or config.cutmix:
            self._mix = Mixup(
                config.mixup,
                config.cutmix,
                switch_prob=config.switch,
                label_smoothing=config.smoothing,
                num_classes=num_classes,
            )

    def __call__(self, pixels: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S], int64 [B] -> the pixels and targets float32 [B, C], whose rows add up to 1.

        B is even where images are mixed.
        """
        seed_all(seed)
        if self._erase is not None:
            pixels = self._erase(pixels)
        if self._mix is not None:
            return self._mix(pixels, labels)
        targets = F.one_hot(labels, self._num_classes).float()
        return pixels, targets * (1 - self._smoothing) + self._smoothing / self._num_classes


def seed_all(seed: int) -> None:
    """Begin all generators of this process anew: Python's, NumPy's and torch's."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)
