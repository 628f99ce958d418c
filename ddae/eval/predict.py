"""What a fine-tuned classifier takes somebody's pictures for."""

from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform, resolve_model_data_config

from ddae.errors import UserError

BEST = 5


class Guess(NamedTuple):
    """A class and its probability."""

    name: str
    probability: float


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
        try:
            with Image.open(photo) as image:
                pixels = transform(image.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"{photo} cannot be read as a picture ({error})") from None
        with torch.inference_mode():
            probabilities, best = model(pixels[None]).softmax(1)[0].topk(min(BEST, len(names)))
        both = zip(best.tolist(), probabilities.tolist(), strict=True)
        guesses[photo] = [Guess(names[number], probability) for number, probability in both]
    return guesses
