"""Predictions for image files: classes by a fine-tuned classifier, class maps by a segmenter."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from timm.data import create_transform, resolve_model_data_config

from ddae.data.photo import load_rgb
from ddae.distributed.comm import device
from ddae.errors import UserError
from ddae.eval.figures import add_legend, blend_classes, class_colours
from ddae.eval.segmentation_data import resize_image, resized_shape
from ddae.eval.upernet import load_segmenter, predict_classes
from ddae.models.patches import normalise

TOP_K = 5  # classes returned for an image


class Prediction(NamedTuple):
    """A class with its probability (classifier) or its share of the pixels (segmenter)."""

    name: str
    share: float


def classify_images(folder: Path, photos: list[Path]) -> dict[Path, list[Prediction]]:
    """Return the TOP_K most likely classes of each image file.

    folder: of a fine-tuning run, or its classifier/. Raise UserError if it contains no classifier, or if a file is not
    an image.
    """
    classifier = folder / "classifier" if (folder / "classifier").is_dir() else folder
    if not (classifier / "model.safetensors").exists():
        raise UserError(f"{folder} contains no classifier; expected a finished fine-tuning run, runs/NAME/finetune.")
    model: Any = timm.create_model(f"local-dir:{classifier}", pretrained=True).eval()
    names = model.pretrained_cfg["label_names"]
    transform: Any = create_transform(**resolve_model_data_config(model))
    predictions = {}
    for photo in photos:
        pixels = transform(load_rgb(photo))
        with torch.inference_mode():
            probabilities = model(pixels[None]).softmax(1)[0]
        predictions[photo] = top_classes(probabilities, names)
    return predictions


def segment_images(folder: Path, photos: list[Path], out: Path) -> dict[Path, list[Prediction]]:
    """Return the TOP_K classes with most pixels of each image file, and write photo_classes.png for photo.jpg to `out`.

    folder: of a segmentation run, or its segmenter/. Raise UserError if it contains no segmenter, if a file is not an
    image, or if two files have the same output path.
    """
    segmenter, stride, names = load_segmenter(folder / "segmenter" if (folder / "segmenter").is_dir() else folder)
    segmenter.to(device())
    outputs = [out / f"{photo.stem}_classes.png" for photo in photos]
    if len({*outputs, *photos}) < len(outputs) + len(photos):
        raise UserError(
            f"two images have the same output file in {out}; expected different names. Run them one by one."
        )
    colours, predictions = class_colours(len(names)), {}
    for photo, output in zip(photos, outputs, strict=True):
        image = np.asarray(load_rgb(photo))
        shape = resized_shape(image.shape[:2], segmenter.encoder.shape.height_width[0])
        resized = torch.from_numpy(resize_image(image.transpose(2, 0, 1), *shape)).to(device())
        pixels = normalise(resized, segmenter.encoder.normalisation, torch.float32)
        labels = predict_classes(segmenter, pixels, stride, image.shape[:2]).cpu()
        shares = labels.flatten().bincount(minlength=len(names)) / labels.numel()
        predictions[photo] = top = [each for each in top_classes(shares, names) if each.share]
        out.mkdir(parents=True, exist_ok=True)
        legend = [f"{each.name} {each.share:.0%}" for each in top]
        legend_colours = [colours[names.index(each.name)].tolist() for each in top]
        add_legend(blend_classes(image, labels.numpy(), colours), legend, legend_colours).save(output)
    return predictions


def top_classes(shares: torch.Tensor, names: list[str]) -> list[Prediction]:
    """Return the TOP_K classes with the largest values of float [C], largest first."""
    top = shares.topk(min(TOP_K, len(names)))
    return [Prediction(names[i], share) for i, share in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
