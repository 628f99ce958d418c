"""Read encoders and tokenizers from runs, checkpoints, exports and published files; write exports.

An export is a folder with `encoder.safetensors` (fp32, timm's names) and `config.json` (shape and normalisation).
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddae.atomic import new_folder, write_json
from ddae.config.base import ImageSize, check_image_size
from ddae.config.pretrain import EncoderShape, PretrainConfig
from ddae.distributed.checkpoint_format import MANIFEST, NOT_PERMITTED, find_damage, load_weights, weights_hash
from ddae.errors import UserError, one_line
from ddae.export.published_weights import TOKENIZER_FIX, read_encoder, read_tokenizer
from ddae.export.weight_files import is_snapshot
from ddae.models.tokenizer import Tokenizer
from ddae.models.vit import Encoder

ENCODER_FILE, TOKENIZER_FILE, CONFIG_FILE = "encoder.safetensors", "tokenizer.safetensors", "config.json"
INITIAL = "initial"  # folder in a run: the encoder that it started from, if not a random one
FORMAT = 1  # of an export
Part = Literal["student", "teacher"]


def export_encoder(weights: dict[str, Tensor], config: PretrainConfig, folder: Path) -> None:
    """Write an export of a run's encoder from its fp32 parameters."""
    encoder = Encoder(config.model)  # its position table is fp32, whatever the precision of the run
    missing, unexpected = encoder.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"pos_embed"}:
        raise ValueError(f"the weights do not fit the encoder: missing {missing}, unexpected {unexpected}.")
    encoder.normalisation = config.data.normalisation
    write_export(encoder, folder, config.preset)


def write_export(encoder: Encoder, folder: Path, preset: str = "") -> None:
    """Write an export atomically."""
    config = {"format": FORMAT, "model": asdict(encoder.shape), "normalisation": encoder.normalisation}
    config |= {"preset": preset, "hash": encoder_hash(encoder)}
    write_folder(folder, ENCODER_FILE, encoder.state_dict(), config)


def write_folder(folder: Path, file: str, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write weights to a .safetensors file, and config.json beside it, atomically.

    Raise UserError if a weight is not finite.
    """
    require_finite(weights, "the trained model")
    with new_folder(folder) as partial:
        save_file(weights, partial / file)
        write_json(partial / CONFIG_FILE, config)


def require_finite(weights: dict[str, Tensor], source: str) -> None:
    """Raise UserError if a weight is NaN or infinite."""
    names = [name for name, values in weights.items() if values.is_floating_point() and not values.isfinite().all()]
    if names:
        raise UserError(f"{source} has weights that are not finite ({names[0]}). Use an earlier checkpoint.")


def load_encoder(
    path: str | Path,
    image_size: ImageSize | None = None,
    normalisation: str | None = None,
    part: Part = "student",
    heads: int | None = None,
    key: str = "",
) -> Encoder:
    """Load an encoder on the CPU, in fp32 and eval mode.

    path: a run folder, a checkpoint, an export, a published file (.pth or .safetensors) of MAE, BEiT, BEiT-v2, BootMAE,
    MoCo-v3, DeiT, DINOv2 or timm, or a snapshot folder of timm or transformers. image_size: resample the positions to
    this input size. normalisation: "half" or "imagenet"; needed for a published file that was not trained with
    imagenet's and does not state its own. part: the teacher is in checkpoints only, of which the newest of a run folder
    is used. heads: attention heads, for a published file that does not tell. key: which state dict of a published file
    to take, such as "model_ema".

    encoder(images) maps [B, 3, H, W], normalised with `encoder.normalisation`, to tokens [B, 1 + N, D] after the
    final norm, cls token first; encoder.features(images, layers) returns those after the given blocks. For a published
    file encoder.report lists the names of the tensors that were loaded and left out, and the state dict that was taken
    if there are several.

    Raise UserError if there is no complete encoder, or one whose features would differ from the published ones.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist. Pass a run, an export, a checkpoint or a file of weights.")
    checkpoint = _find_checkpoint(path, part)
    if checkpoint is not None:
        encoder = _load_checkpoint(checkpoint, part)
    elif part == "teacher":
        raise UserError(f"{path} has no teacher; only checkpoints have. Pass a run folder with checkpoints/.")
    elif path.is_file() or is_snapshot(path):
        with _reading(f"{path} is not an encoder of this architecture", "Pass a file of a ViT encoder."):
            converted = read_encoder(path, heads, key)
            encoder = Encoder(converted.model)
            encoder.load_state_dict(converted.weights)
        encoder.normalisation, encoder.report = converted.normalisation, converted.report
    else:
        encoder = _load_export(path)
    require_finite(encoder.state_dict(), str(path))
    folder = path.parent if path.name == "encoder" else path
    encoder.initial_path = folder / INITIAL if (folder / INITIAL / ENCODER_FILE).exists() else None
    encoder.normalisation = normalisation or encoder.normalisation
    if image_size is not None:
        check_image_size("image_size", image_size, encoder.shape.patch_size)
        encoder.set_image_size(image_size)
    return encoder.eval().requires_grad_(False)


def encoder_hash(encoder: Encoder) -> str:
    """Return a hash of all that an encoder's features depend on: weights, shape and normalisation."""
    shape = asdict(encoder.shape)
    del shape["init"]
    return weights_hash(encoder, json.dumps([shape, encoder.normalisation], sort_keys=True))


def write_tokenizer(weights: dict[str, Tensor], tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer's weights and shape atomically."""
    codes, code_width = tokenizer.codebook.shape
    config = {"format": FORMAT, "model": asdict(tokenizer.encoder.shape), "codes": codes, "code_width": code_width}
    write_folder(folder, TOKENIZER_FILE, weights, config)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer on the CPU, in fp32 and eval mode.

    path: a run folder of train_tokenizer.py, or a published file of BEiT-v2 (.pth or .safetensors). Raise UserError if
    there is no complete tokenizer.
    """
    path = Path(path)
    source = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    source = source.parent if source.name == TOKENIZER_FILE else source
    with _reading(f"{path} is not a tokenizer", TOKENIZER_FIX):
        if source.is_file():
            converted = read_tokenizer(source)
            weights = converted.weights
            tokenizer = Tokenizer(converted.model, *weights["codebook"].shape)
        else:
            config = json.loads((source / CONFIG_FILE).read_text())
            tokenizer = Tokenizer(EncoderShape(**config["model"]), config["codes"], config["code_width"])
            weights = load_file(source / TOKENIZER_FILE)
        tokenizer.load_state_dict(weights)
    return tokenizer.eval().requires_grad_(False)


@contextmanager
def _reading(failure: str, fix: str) -> Iterator[None]:
    """Raise UserError "FAILURE: reason. FIX" for any error of files that are missing or hold something else."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{failure}: {one_line(error)}. {fix}") from None


def newest_checkpoint(run: Path) -> Path | None:
    """Return the newest complete checkpoint of a run folder, None if there is none."""
    if (run / "checkpoints").is_dir() and not os.access(run / "checkpoints", os.R_OK | os.X_OK):
        raise UserError(f"{run / 'checkpoints'} cannot be read (Permission denied). Change its permissions.")
    complete = sorted(run.glob(f"checkpoints/step_*/{MANIFEST}"))
    return complete[-1].parent if complete else None


def _find_checkpoint(path: Path, part: str) -> Path | None:
    """Return the checkpoint to load: the path itself, or a run folder's newest if its export does not suffice."""
    if (path / MANIFEST).exists() and list(path.glob("rank_*.safetensors")):
        return path
    return newest_checkpoint(path) if part == "teacher" or not (path / "encoder").is_dir() else None


def _load_checkpoint(path: Path, part: str) -> Encoder:
    file = path.parent.parent / "config.json"
    with _reading(f"{path} is not a checkpoint of pretraining: {file}", "Pass runs/NAME, or a checkpoint in it."):
        config = PretrainConfig.read(file)
    if damage := find_damage(path):
        if damage.startswith(NOT_PERMITTED):
            raise UserError(f"{path} cannot be read: {damage}. Change its permissions.")
        raise UserError(f"{path} is damaged: {damage}. Pass another checkpoint of the run.")
    encoder = Encoder(config.model)
    encoder.normalisation = config.data.normalisation
    if part == "student":
        load_weights(path, "weight", nn.ModuleDict({"encoder": encoder}))
    elif config.feature.enabled:
        load_weights(path, "teacher", encoder)
    else:
        raise UserError(f"{path} has no teacher: feature.enabled is false in its run. Load its student.")
    return encoder


def _load_export(path: Path) -> Encoder:
    folder = path / "encoder" if (path / "encoder").is_dir() else path
    for name in (ENCODER_FILE, CONFIG_FILE):
        if not (folder / name).exists():
            raise UserError(f"{path} is not an export: it has no {name}. Pass a finished run or its encoder/ folder.")
    with _reading(f"{folder} is not an export that this version reads", "Export the encoder again."):
        config = json.loads((folder / CONFIG_FILE).read_text())
        if config.get("format") != FORMAT:
            raise ValueError(f"its format is {config.get('format')}, not {FORMAT}")
        encoder = Encoder(EncoderShape(**config["model"]))
        encoder.normalisation = config["normalisation"]
        encoder.load_state_dict(load_file(folder / ENCODER_FILE))
    return encoder
