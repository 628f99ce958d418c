"""Images with segmentation masks: random crops for training, whole images for validation.

Shapes: S pixels a side of a crop, H x W of an image. The loader passes image and labels through as one array uint8
[5, H, W]: red, green, blue, low byte and high byte of the labels. Pixels labelled IGNORE_INDEX have no class.
"""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddae.config.segmentation import SceneConfig
from ddae.data.cache import Cache
from ddae.data.decode import decode_image
from ddae.data.loader import Loader
from ddae.data.reader import Reader
from ddae.data.shards import Shards, open_shards
from ddae.errors import UserError
from ddae.eval.dataset import SplitReader
from ddae.models.patches import NORMALISATIONS

IGNORE_INDEX = 65535
MAX_CROP_TRIES = 10  # crops drawn until no class covers more than its largest share
MAX_ASPECT = 4  # longer side of a resized image over the requested shorter side
REMAKE = "Make the shards with data_prep/prepare_ade20k.py"


class SceneBatchReader(Reader):
    """Reads micro-batches of images and masks; the loader's `augment` must be a SceneCrop."""

    def __init__(self, shards: Shards, *args: Any):
        """Raise UserError if the shards have no masks."""
        super().__init__(shards, *args)
        self.masks = shards.file_locations("png")

    def decode(self, row: int, sample: int, box: list[int], flip: bool) -> np.ndarray:
        """Return a sample's whole image and labels: uint8 [5, H, W]."""
        assert isinstance(self.augment, SceneCrop)
        image, labels = read_scene(self.shards, sample, self.masks[sample], self.augment.num_classes)
        planes = labels.view(np.uint8).reshape(*labels.shape, 2).transpose(2, 0, 1)
        return np.concatenate([image, planes])


class SceneLoader(Loader):
    """Loader of training crops with labels."""

    READER, PLANES = SceneBatchReader, 5


def split_planes(planes: Tensor) -> tuple[Tensor, Tensor]:
    """Split uint8 [B, 5, S, S] into images uint8 [B, 3, S, S] and labels int64 [B, S, S]."""
    return planes[:, :3], planes[:, 3].long() + 256 * planes[:, 4].long()


class SceneCrop:
    """Training augmentation of an image and its labels: random resize, crop, flip and photometric distortion.

    Follows mmsegmentation's ADE20K pipeline.
    """

    def __init__(self, config: SceneConfig, size: int, normalisation: str, num_classes: int):
        self.config, self.size, self.num_classes = config, size, num_classes
        self.fill = np.array([round(255 * each) for each in NORMALISATIONS[normalisation][0]], np.uint8)

    def __call__(self, scene: np.ndarray, seed: int) -> np.ndarray:
        """Crop uint8 [5, H, W] to uint8 [5, S, S]. Pixels outside the image get the mean colour and IGNORE_INDEX."""
        rng = np.random.default_rng(seed & (2**63 - 1))
        image, labels = scene[:3], scene[3].astype(np.uint16) + scene[4] * np.uint16(256)
        short = self.size * rng.uniform(*self.config.scale)
        height, width = resized_shape(labels.shape, short)
        image, labels = resize_image(image, height, width), resize_labels(labels, height, width)
        top, left = self._crop_origin(labels, rng)
        image = image[:, top : top + self.size, left : left + self.size]
        labels = labels[top : top + self.size, left : left + self.size]
        if rng.random() < 0.5:
            image, labels = image[:, :, ::-1], labels[:, ::-1]
        if self.config.distort:
            image = distort_colours(image, rng)
        crop = np.empty((5, self.size, self.size), np.uint8)
        crop[:3] = self.fill[:, None, None]
        crop[3:] = 255
        inside = crop[:, : labels.shape[0], : labels.shape[1]]
        inside[:3], inside[3], inside[4] = image, labels & 255, labels >> 8
        return crop

    def _crop_origin(self, labels: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
        """Draw top and left of a crop in which no class exceeds config.max_share of the labelled pixels.

        After MAX_CROP_TRIES draws the last one is returned as it is.
        """
        top = left = 0
        for _ in range(MAX_CROP_TRIES if self.config.max_share < 1 else 1):
            top, left = (int(rng.integers(0, max(side - self.size, 0) + 1)) for side in labels.shape)
            crop = labels[top : top + self.size, left : left + self.size]
            counts = np.bincount(crop[crop != IGNORE_INDEX], minlength=1)
            if (counts > 0).sum() > 1 and counts.max() < self.config.max_share * counts.sum():
                break
        return top, left


class Scene(NamedTuple):
    """A validation image with its labels."""

    image: Tensor  # uint8 [3, h, w]: resized so that its shorter side is the crop's
    labels: Tensor  # int64 [H, W]: at the size of the stored image


class SceneDataset(SplitReader):
    """Whole images of a split with their labels."""

    def __init__(self, source: str, split: str, size: int, cache: Cache, num_classes: int = 0):
        """Open the shards. size: shorter side of the resized images in pixels.

        num_classes: only for shards that do not name their classes. Raise UserError if the shards have no masks, or if
        their classes cannot be determined.
        """
        self.shards, self.size = open_shards(source, cache, split), size
        self.sample_bytes = (3 + 8) * 2 * size * size  # of an image twice as wide as high, and its labels in int64
        self.samples, self.masks = range(len(self.shards)), self.shards.file_locations("png")
        self.classes = class_names(self.shards.classes, num_classes)

    def decode(self, index: int, sample: int) -> Scene:
        """Return a scene. Raise UserError if its mask cannot be used."""
        image, labels = read_scene(self.shards, sample, self.masks[sample], len(self.classes))
        image = resize_image(image, *resized_shape(labels.shape, self.size))
        return Scene(torch.from_numpy(image), torch.from_numpy(labels.astype(np.int64)))


def require_several_classes(scenes: SceneDataset) -> None:
    """Raise UserError if all masks have the same class: any prediction of it would be right; or if one is unusable.

    Masks are read until two classes were found, which the first one has as a rule.
    """
    present: set[int] = set()
    for index, sample in enumerate(scenes.samples):
        _, labels = read_scene(scenes.shards, int(sample), scenes.masks[index], len(scenes.classes))
        present |= set(np.unique(labels[labels != IGNORE_INDEX]).tolist())
        if len(present) >= min(2, len(scenes.classes)):
            return
    only = f"the class {scenes.classes[present.pop()]!r} alone" if present else "no class"
    fix = "Pixels of value 255 have no class: masks of 0 and 255 need 1 in place of 255."
    raise UserError(f"the validation masks contain {only}, so that their mIoU would say nothing. {fix}")


def class_names(named: Sequence[str], num_classes: int) -> list[str]:
    """Return a unique name per class: those of the shards, or `num_classes` numbers if the shards name none.

    Raise UserError if both are given and differ in number, or if neither is given.
    """
    if num_classes and named and num_classes != len(named):
        raise UserError(
            f"seg.classes is {num_classes}, but the shards name {len(named)} classes. Remove --seg.classes."
        )
    if not named and not num_classes:
        raise UserError("the shards do not name their classes. Pass their number, e.g. --seg.classes 150.")
    repeated = {name for name in named if named.count(name) > 1}
    numbered = enumerate(named or [""] * num_classes)
    return [f"{name} {number}".strip() if not name or name in repeated else name for number, name in numbered]


def read_scene(shards: Shards, sample: int, location: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Read a sample's image uint8 [3, H, W] and labels uint16 [H, W].

    location: of its mask, a row of shards.file_locations("png"). Raise UserError if the mask is not one channel of the
    image's size, or if a label is not below `num_classes`.
    """
    image = decode_image(shards.read(sample))
    with Image.open(io.BytesIO(shards.read_file(sample, location)), formats=["PNG"]) as file:
        labels = np.asarray(file)
    if labels.ndim != 2:
        name = shards.sample_name(sample)  # reads the shard's index: for messages alone
        raise UserError(f"the mask of {name} has {labels.shape[2]} channels; expected one class per pixel. {REMAKE}.")
    if labels.shape != image.shape[1:]:
        mask_size, image_size = (f"{each[1]} x {each[0]}" for each in (labels.shape, image.shape[1:]))
        name, fix = shards.sample_name(sample), f"{REMAKE}, which leaves out such pairs."
        raise UserError(f"the mask of {name} has {mask_size} pixels; expected {image_size}, as its image. {fix}")
    if labels.dtype == np.uint8:
        labels = np.where(labels == 255, IGNORE_INDEX, labels.astype(np.uint16))
    largest = int(labels.max(where=labels != IGNORE_INDEX, initial=0))
    if largest >= num_classes:
        fix = f"{REMAKE}." if shards.classes else f"Pass --seg.classes {largest + 1} or more."
        name = shards.sample_name(sample)
        raise UserError(f"{name} has class {largest}; expected classes 0 to {num_classes - 1}. {fix}")
    return image, labels.astype(np.uint16)


def resized_shape(shape: tuple[int, ...], short: float) -> tuple[int, int]:
    """Return height and width scaled so that the shorter side is `short` pixels.

    The shorter side gets smaller if the longer one would exceed MAX_ASPECT * short.
    """
    factor = min(short / min(shape), MAX_ASPECT * short / max(shape))
    return max(1, int(shape[0] * factor + 0.5)), max(1, int(shape[1] * factor + 0.5))


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 [3, H, W] to [3, height, width] by bilinear interpolation with antialiasing."""
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR)).transpose(2, 0, 1).copy()


def resize_labels(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize [H, W] to [height, width] by nearest-neighbour interpolation."""
    rows = ((np.arange(height) + 0.5) * labels.shape[0] / height).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * labels.shape[1] / width).astype(np.int64)
    return labels[rows[:, None], columns]


def distort_colours(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast, saturation and hue of uint8 [3, H, W], each with probability 1/2.

    Contrast is changed before or after saturation and hue (SSD's photometric distortion).
    """
    image = image.astype(np.float32)
    if rng.random() < 0.5:
        image = np.clip(image + rng.uniform(-32, 32), 0, 255)
    contrast_first, contrast = rng.random() < 0.5, rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    if contrast_first:
        image = np.clip(image * contrast, 0, 255)
    saturation, hue = (rng.uniform(*limits) if rng.random() < 0.5 else None for limits in ((0.5, 1.5), (-0.1, 0.1)))
    if saturation is not None or hue is not None:
        hsv = Image.fromarray(image.astype(np.uint8).transpose(1, 2, 0)).convert("HSV")
        values = np.asarray(hsv).astype(np.float32)
        values[..., 1] = np.clip(values[..., 1] * (saturation or 1.0), 0, 255)
        shifted = np.concatenate([(values[..., :1] + 256 * (hue or 0.0)) % 256, values[..., 1:]], -1)
        changed = Image.frombytes("HSV", hsv.size, shifted.astype(np.uint8).tobytes())
        image = np.asarray(changed.convert("RGB")).transpose(2, 0, 1).astype(np.float32)
    if not contrast_first:
        image = np.clip(image * contrast, 0, 255)
    return image.astype(np.uint8)
