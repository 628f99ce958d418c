"""Images with a class a pixel, as segmentation reads them: crops for training, whole images for validation.

S pixels a side of a crop, H x W of an image. A training crop travels through the loader as five planes: red, green,
blue, and its labels' lower and higher byte; IGNORED is no class.
"""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ddae.config.segmentation import SceneConfig
from ddae.data.cache import Cache
from ddae.data.decode import decode_image
from ddae.data.loader import Loader
from ddae.data.reader import Reader
from ddae.data.shards import Shards, open_shards
from ddae.errors import UserError
from ddae.models.patches import NORMALISATIONS

IGNORED = 65535
TRIES = 10  # crops drawn until one is not of a single class
WIDEST = 4  # the longer side of a resized image over the crop's


class Scenes(Reader):
    """Micro-batches of crops, which `augment` cuts: UserError where the shards have no masks."""

    def __init__(self, shards: Shards, *about: Any):
        super().__init__(shards, *about)
        self.masks = shards.others("png")

    def decode(self, row: int, sample: int, box: list[int], flip: bool) -> np.ndarray:
        """A sample's image and labels, whole: uint8 [5, H, W]."""
        assert isinstance(self.augment, SceneCrop)
        image, labels = read_scene(self.shards, sample, self.masks[sample], self.augment.num_classes)
        planes = labels.view(np.uint8).reshape(*labels.shape, 2).transpose(2, 0, 1)
        return np.concatenate([image, planes])


class SceneLoader(Loader):
    """The stream of crops."""

    READER = Scenes


def split_planes(planes: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [B, 5, S, S] -> images uint8 [B, 3, S, S] and labels int64 [B, S, S]."""
    return planes[:, :3], planes[:, 3].long() + 256 * planes[:, 4].long()


class SceneCrop:
    """A random crop of an image and its labels: scaled, cut, mirrored, its colours distorted (mmsegmentation's pipeline
    for ADE20K)."""

    def __init__(self, config: SceneConfig, size: int, normalisation: str, num_classes: int):
        self.config, self.size, self.num_classes = config, size, num_classes
        self.fill = np.array([round(255 * each) for each in NORMALISATIONS[normalisation][0]], np.uint8)

    def __call__(self, scene: np.ndarray, seed: int) -> np.ndarray:
        """uint8 [5, H, W] -> uint8 [5, S, S]; beyond the image the mean colour and IGNORED."""
        rng = np.random.default_rng(seed & (2**63 - 1))
        image, labels = scene[:3], scene[3].astype(np.uint16) + scene[4] * np.uint16(256)
        short = self.size * rng.uniform(*self.config.scale)
        height, width = fitting(labels.shape, short)
        image, labels = resized(image, height, width), resized_labels(labels, height, width)
        top, left = self._place(labels, rng)
        image = image[:, top : top + self.size, left : left + self.size]
        labels = labels[top : top + self.size, left : left + self.size]
        if rng.random() < 0.5:
            image, labels = image[:, :, ::-1], labels[:, ::-1]
        if self.config.distort:
            image = distorted(image, rng)
        whole = np.empty((5, self.size, self.size), np.uint8)
        whole[:3] = self.fill[:, None, None]
        whole[3:] = 255
        inside = whole[:, : labels.shape[0], : labels.shape[1]]
        inside[:3], inside[3], inside[4] = image, labels & 255, labels >> 8
        return whole

    def _place(self, labels: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
        """The first of TRIES random places where no class has more than its share of the crop; else the last."""
        top = left = 0
        for _ in range(TRIES if self.config.max_share < 1 else 1):
            top, left = (int(rng.integers(0, max(side - self.size, 0) + 1)) for side in labels.shape)
            here = labels[top : top + self.size, left : left + self.size]
            counts = np.bincount(here[here != IGNORED], minlength=1)
            if (counts > 0).sum() > 1 and counts.max() < self.config.max_share * counts.sum():
                break
        return top, left


class Scene(NamedTuple):
    """A validation image."""

    image: Tensor  # uint8 [3, h, w]: its shorter side is the crop's
    labels: Tensor  # int64 [H, W], of the image as it is stored


class SceneReader(Dataset):
    """The images of a split, whole; UserError where they have no masks, or their classes cannot be known."""

    def __init__(self, where: str, split: str, size: int, cache: Cache, count: int = 0):
        """count: of the classes, where the shards do not name them."""
        self.shards, self.size = open_shards(where, cache, split), size
        self.masks = self.shards.others("png")
        self.classes = class_names(self.shards.classes, count)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, sample: int) -> Scene:
        """UserError where it cannot be used."""
        try:
            image, labels = read_scene(self.shards, sample, self.masks[sample], len(self.classes))
        except UserError:
            raise
        except Exception as error:  # decoders raise whatever a broken file leads them to
            raise UserError(f"{self.shards.sample_name(sample)} cannot be decoded ({error}): mark it bad") from None
        image = resized(image, *fitting(labels.shape, self.size))
        return Scene(torch.from_numpy(image), torch.from_numpy(labels.astype(np.int64)))


def class_names(named: Sequence[str], count: int) -> list[str]:
    """The classes by number, each name once: those that the shards name, else `count` numbers; UserError where the two
    contradict each other, or neither is there."""
    if count and named and count != len(named):
        raise UserError(f"seg.classes is {count}, and the shards name {len(named)} classes: leave it out")
    if not named and not count:
        raise UserError("the shards do not name their classes: say how many there are with --seg.classes 150")
    twice = {name for name in named if named.count(name) > 1}
    numbered = enumerate(named or [""] * count)
    return [f"{name} {number}".strip() if not name or name in twice else name for number, name in numbered]


def read_scene(shards: Shards, sample: int, place: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """A sample's image uint8 [3, H, W] and labels uint16 [H, W].

    UserError where they do not fit together, or a label is none of the classes.
    """
    image = decode_image(shards.read(sample))
    with Image.open(io.BytesIO(shards.read_other(sample, place)), formats=["PNG"]) as opened:
        labels = np.asarray(opened)
    name, made = shards.sample_name, "make the shards with data_prep/prepare_ade20k.py"
    if labels.ndim != 2:
        raise UserError(f"the mask of {name(sample)} has {labels.shape[2]} channels, not a class a pixel: {made}")
    if labels.shape != image.shape[1:]:
        sizes = " and ".join(f"{each[1]} x {each[0]}" for each in (image.shape[1:], labels.shape))
        raise UserError(f"image and mask of {name(sample)} have {sizes} pixels: {made}, which leaves such pairs out")
    if labels.dtype == np.uint8:
        labels = np.where(labels == 255, IGNORED, labels.astype(np.uint16))
    largest = int(labels.max(where=labels != IGNORED, initial=0))
    if largest >= num_classes:
        mend = made if shards.classes else f"--seg.classes {largest + 1} would have room for it"
        raise UserError(f"{name(sample)} has the class {largest}, there are {num_classes} counted from 0: {mend}")
    return image, labels.astype(np.uint16)


def fitting(shape: tuple[int, ...], short: float) -> tuple[int, int]:
    """Height and width at which the shorter side is `short`, or less where the longer one would be beyond WIDEST times
    that."""
    factor = min(short / min(shape), WIDEST * short / max(shape))
    return max(1, int(shape[0] * factor + 0.5)), max(1, int(shape[1] * factor + 0.5))


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [3, H, W] -> [3, height, width], bilinear with antialiasing."""
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR)).transpose(2, 0, 1).copy()


def resized_labels(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """[H, W] -> [height, width], each pixel its nearest one's."""
    rows = ((np.arange(height) + 0.5) * labels.shape[0] / height).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * labels.shape[1] / width).astype(np.int64)
    return labels[rows[:, None], columns]


def distorted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 [3, H, W] -> the same with brightness, contrast, saturation and hue each changed half the time; contrast
    before or after the colours (SSD's photometric distortion)."""
    image = image.astype(np.float32)
    if rng.random() < 0.5:
        image = np.clip(image + rng.uniform(-32, 32), 0, 255)
    first, contrast = rng.random() < 0.5, rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    if first:
        image = np.clip(image * contrast, 0, 255)
    saturation, hue = (rng.uniform(*limits) if rng.random() < 0.5 else None for limits in ((0.5, 1.5), (-0.1, 0.1)))
    if saturation is not None or hue is not None:
        colours = Image.fromarray(image.astype(np.uint8).transpose(1, 2, 0)).convert("HSV")
        values = np.asarray(colours).astype(np.float32)
        values[..., 1] = np.clip(values[..., 1] * (saturation or 1.0), 0, 255)
        turned = np.concatenate([(values[..., :1] + 256 * (hue or 0.0)) % 256, values[..., 1:]], -1)
        changed = Image.frombytes("HSV", colours.size, turned.astype(np.uint8).tobytes())
        image = np.asarray(changed.convert("RGB")).transpose(2, 0, 1).astype(np.float32)
    if not first:
        image = np.clip(image * contrast, 0, 255)
    return image.astype(np.uint8)
