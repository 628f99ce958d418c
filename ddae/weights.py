"""Encoders in and out of files.

An export is a folder with `encoder.safetensors` (fp32, timm's key names) and `config.json` (shape and normalisation).
"""

import json
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddae.config import Config, ModelConfig
from ddae.errors import UserError
from ddae.method import build_encoder
from ddae.model.vit import Encoder

WEIGHTS, SETTINGS = "encoder.safetensors", "config.json"


def export_encoder(weights: dict[str, Tensor], config: Config, folder: Path) -> None:
    """Write the encoder's fp32 parameters with its position table and settings."""
    encoder = build_encoder(config)  # its tables are fp32, whatever the precision of the run
    missing, unexpected = encoder.load_state_dict(weights, strict=False)
    if unexpected or missing != ["pos_embed"]:
        raise ValueError(f"these are not the encoder's weights: missing {missing}, unexpected {unexpected}")
    settings = {"model": config.to_dict()["model"], "normalisation": config.data.normalisation, "preset": config.preset}
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file(encoder.state_dict(), unfinished / WEIGHTS)
    (unfinished / WEIGHTS).chmod(0o644)  # safetensors writes for its owner alone
    (unfinished / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def load_encoder(path: str | Path) -> Encoder:
    """The encoder of a run folder or an export folder, on the CPU, in fp32 and eval mode.

    encoder(images) takes [B, 3, H, W], normalised as `encoder.normalisation` names, and gives tokens [B, 1 + N, D]
    after the final norm, cls first; encoder.features(images, layers) those after the named blocks.
    UserError where the folder holds no complete export.
    """
    folder = Path(path)
    folder = folder / "encoder" if (folder / "encoder").is_dir() else folder
    for name in (WEIGHTS, SETTINGS):
        if not (folder / name).exists():
            raise UserError(f"{path} is not an export: it has no {name}; name a finished run or its encoder/ folder")
    try:
        settings = json.loads((folder / SETTINGS).read_text())
        encoder = build_encoder(Config(model=ModelConfig(**settings["model"])))
        encoder.normalisation = settings["normalisation"]
        encoder.load_state_dict(load_file(folder / WEIGHTS))
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} is not an export that this version reads: {reason}") from None
    return encoder.eval().requires_grad_(False)
