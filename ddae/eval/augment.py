"""Augmentations of fine-tuning: timm's, each as a pure function of a seed, so that a resumed run draws the same.

B: batch size, S: image side in pixels, C: number of classes.
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

from ddae.config.base import ImageSize, height_width
from ddae.config.evaluation import AugmentConfig
from ddae.errors import UserError
from ddae.models.patches import NORMALISATIONS

MAX_TRANSLATION = 0.45  # of the image side, as in timm's training transforms


class RandAugment:
    """RandAugment of one image; runs in the loader's worker processes."""

    def __init__(self, policy: str, size: ImageSize, normalisation: str):
        """policy: timm's name of it. Raise UserError if timm rejects the policy."""
        mean = tuple(min(255, round(255 * value)) for value in NORMALISATIONS[normalisation][0])
        options = {"translate_const": int(min(height_width(size)) * MAX_TRANSLATION), "img_mean": mean}
        options |= {"interpolation": Image.Resampling.BICUBIC}
        try:
            self._transform = rand_augment_transform(policy, options)
        except (AssertionError, ValueError, KeyError) as error:
            reason = f" ({error})" if str(error) else ""
            raise UserError(
                f"augment.policy is {policy!r}; expected the name of a RandAugment policy of timm{reason}. "
                "Pass --augment.policy rand-m9-mstd0.5-inc1."
            ) from None

        for operation in self._transform.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize

    def __call__(self, image: np.ndarray, seed: int) -> np.ndarray:
        """Augment an image: uint8 [3, H, W] -> uint8 [3, H, W]."""
        seed_all(seed)
        augmented = self._transform(Image.fromarray(image.transpose(1, 2, 0)))
        return np.ascontiguousarray(np.asarray(augmented).transpose(2, 0, 1))


def posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keep the highest `bits` of every channel.

    The strongest setting of `inc1` keeps none: a black image, which Pillow 12 refuses to make.
    """
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


class BatchAugment:
    """Random erasing, then mixup or CutMix, and soft targets, of a batch on its device."""

    def __init__(self, config: AugmentConfig, num_classes: int, device: torch.device):
        self._smoothing, self._num_classes = config.smoothing, num_classes
        self._erase = RandomErasing(config.erase, mode="pixel", device=str(device)) if config.erase else None
        self._mix = None
        if config.mixup or config.cutmix:
            options = {"switch_prob": config.switch, "label_smoothing": config.smoothing, "num_classes": num_classes}
            self._mix = Mixup(config.mixup, config.cutmix, **options)

    def __call__(self, pixels: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return augmented pixels [B, 3, S, S] and targets float32 [B, C], whose rows sum to 1; labels int64 [B].

        With mixup or CutMix B must be even.
        """
        seed_all(seed)
        if self._erase is not None:
            pixels = self._erase(pixels)
        if self._mix is not None:
            return self._mix(pixels, labels)
        targets = F.one_hot(labels, self._num_classes).float()
        return pixels, targets * (1 - self._smoothing) + self._smoothing / self._num_classes


def seed_all(seed: int) -> None:
    """Seed this process's generators: Python's, NumPy's and torch's."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)
