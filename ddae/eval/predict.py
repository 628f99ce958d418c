"""What a fine-tuned classifier takes somebody's pictures for, and where a segmenter sees what."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import create_transform, resolve_model_data_config

from ddae.distributed.comm import device
from ddae.errors import UserError
from ddae.eval.figures import captioned, painted, palette
from ddae.eval.segmentation_data import fitting, resized
from ddae.eval.upernet import classify, load_segmenter
from ddae.models.patches import normalise

BEST = 5


class Guess(NamedTuple):
    """A class and its probability, or its share of a picture."""

    name: str
    share: float


def predict(folder: Path, photos: list[Path]) -> dict[Path, list[Guess]]:
    """The likeliest classes of each photograph, by the classifier of a fine-tuning's folder.

    UserError where there is no classifier, or a file is no picture.
    """
    classifier = folder / "classifier" if (folder / "classifier").is_dir() else folder
    if not (classifier / "model.safetensors").exists():
        raise UserError(f"{folder} holds no classifier: name the folder of a finished fine-tuning, runs/NAME/finetune")
    model: Any = timm.create_model(f"local-dir:{classifier}", pretrained=True).eval()
    names = model.pretrained_cfg["label_names"]
    transform: Any = create_transform(**resolve_model_data_config(model))
    guesses = {}
    for photo in photos:
        pixels = transform(opened(photo))
        with torch.inference_mode():
            shares = model(pixels[None]).softmax(1)[0]
        guesses[photo] = most(shares, names)
    return guesses


def segment(folder: Path, photos: list[Path], out: Path) -> dict[Path, list[Guess]]:
    """The classes that cover most of each photograph, by the segmenter of a segmentation's folder; a picture with the
    classes' colours over it goes to `out`: of photo.jpg photo_classes.png.

    UserError where there is no segmenter, a file is no picture, or two of them would be written to one place.
    """
    where = folder / "segmenter" if (folder / "segmenter").is_dir() else folder
    segmenter, stride, names = load_segmenter(where)
    segmenter.to(device())
    places = [out / f"{photo.stem}_classes.png" for photo in photos]
    if len({*places, *photos}) < len(places) + len(photos):
        raise UserError(f"two of the pictures would have one place in {out}: name them one after the other")
    colours, guesses = palette(len(names)), {}
    for photo, place in zip(photos, places, strict=True):
        image = np.asarray(opened(photo))
        planes = resized(image.transpose(2, 0, 1), *fitting(image.shape[:2], segmenter.encoder.shape.image_size))
        pixels = normalise(torch.from_numpy(planes).to(device()), segmenter.encoder.normalisation, torch.float32)
        labels = classify(segmenter, pixels, stride, image.shape[:2]).cpu()
        out.mkdir(parents=True, exist_ok=True)
        shares = labels.flatten().bincount(minlength=len(names)) / labels.numel()
        guesses[photo] = seen = [guess for guess in most(shares, names) if guess.share]
        words = [f"{guess.name} {guess.share:.0%}" for guess in seen]
        shown = [colours[names.index(guess.name)].tolist() for guess in seen]
        captioned(painted(image, labels.numpy(), colours), words, shown).save(place)
    return guesses


def opened(photo: Path) -> Image.Image:
    """A picture in RGB, turned as its EXIF says; UserError where the file is none."""
    try:
        with Image.open(photo) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{photo} cannot be read as a picture ({error})") from None


def most(shares: torch.Tensor, names: list[str]) -> list[Guess]:
    """The largest of float [C], by name."""
    found = shares.topk(min(BEST, len(names)))
    both = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    return [Guess(names[number], share) for number, share in both]
