"""Encoders in and out of files: our own exports, and what foreign.py reads and writes.

An export is a folder with `encoder.safetensors` (fp32, timm's key names) and `config.json` (shape and normalisation).
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddae.config import Config, ModelConfig
from ddae.errors import UserError
from ddae.foreign import read_file, to_beit
from ddae.method import build_encoder
from ddae.model.vit import Encoder
from ddae.patches import NORMALISATIONS

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


def load_encoder(path: str | Path, image_size: int | None = None, normalisation: str | None = None) -> Encoder:
    """The encoder of a run folder, an export folder, or a published file of MAE, BootMAE or timm's ViT (.pth or
    .safetensors), on the CPU, in fp32 and eval mode.

    encoder(images) takes [B, 3, H, W], normalised as `encoder.normalisation` names, and gives tokens [B, 1 + N, D]
    after the final norm, cls first; encoder.features(images, layers) those after the named blocks.
    image_size: positions are resampled to it. normalisation: "half" or "imagenet", for a file that does not say
    (imagenet unless told). encoder.report says what became of each tensor of a file.
    UserError where there is no complete encoder.
    """
    if Path(path).is_file():
        read = read_file(Path(path))
        encoder = build_encoder(Config(model=read.model))
        encoder.load_state_dict(read.weights)
        encoder.normalisation, encoder.report = normalisation or "imagenet", read.report
    else:
        encoder = _load_export(path)
        encoder.normalisation = normalisation or encoder.normalisation
    if image_size is not None:
        if image_size < encoder.patch_size or image_size % encoder.patch_size:
            raise UserError(
                f"image_size {image_size} is not divisible by {path}'s patches of {encoder.patch_size} pixels"
            )
        encoder.resize(image_size)
    return encoder.eval().requires_grad_(False)


def write_timm(encoder: Encoder, folder: Path) -> None:
    """A folder that `timm.create_model("local-dir:FOLDER", num_classes=0)` loads: model.safetensors and config.json."""
    grid, width = encoder.grid[0], encoder.cls_token.shape[-1]
    mean, std = NORMALISATIONS[encoder.normalisation]
    size = grid * encoder.patch_size
    shape = {"img_size": size, "patch_size": encoder.patch_size, "embed_dim": width, "depth": len(encoder.blocks)}
    settings = {
        "architecture": "vit_base_patch16_224",
        "num_classes": 0,
        "model_args": shape | {"num_heads": encoder.heads},
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "num_classes": 0,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "mean": list(mean),
            "std": list(std),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(encoder.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_foreign(encoder: Encoder, file: Path, form: str) -> None:
    """A file in MAE's or in BEiT's form ("mae" or "beit"), as their own code reads: {"model": tensors}."""
    state = {name: values.clone() for name, values in encoder.state_dict().items()}
    torch.save({"model": to_beit(state) if form == "beit" else state}, file)


def _load_export(path: str | Path) -> Encoder:
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
    return encoder
