"""Read and write encoders and tokenizers: exports, checkpoints, published files, timm, ONNX, torch.export.

An export is a folder with `encoder.safetensors` (fp32, timm's names) and `config.json` (shape and normalisation).
"""

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddae.atomic import new_folder, write_json
from ddae.config.pretrain import ModelConfig, PretrainConfig
from ddae.distributed.checkpoint_format import MANIFEST, load_weights
from ddae.errors import UserError, one_line
from ddae.export.convert import read_encoder, read_tokenizer, to_beit, to_mae
from ddae.models.patches import NORMALISATIONS
from ddae.models.tokenizer import Tokenizer
from ddae.models.vit import Encoder

ENCODER_FILE, TOKENIZER_FILE, CONFIG_FILE = "encoder.safetensors", "tokenizer.safetensors", "config.json"
FORMAT = 1  # of an export
TIMM_BIAS_OPTIONS = {"use_rel_pos_bias": "each", "use_shared_rel_pos_bias": "shared"}  # -> model.relative_positions
DYNAMIC_BATCH = {"images": {0: torch.export.Dim("batch")}}  # the batch size of exported programs is not fixed


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
    with new_folder(folder) as partial:
        save_file(encoder.state_dict(), partial / ENCODER_FILE)
        write_json(partial / CONFIG_FILE, config | {"preset": preset})


def load_encoder(
    path: str | Path,
    image_size: int | None = None,
    normalisation: str | None = None,
    part: Literal["student", "teacher"] = "student",
) -> Encoder:
    """Load an encoder on the CPU, in fp32 and eval mode.

    path: a run folder, a checkpoint, an export, or a published file of MAE, BEiT, BEiT-v2, BootMAE or timm (.pth or
    .safetensors). image_size: resample the positions to this input size. normalisation: "half" or "imagenet"; needed
    for a published file that was not trained with imagenet's. part: the teacher is in checkpoints only, of which the
    newest of a run folder is used.

    encoder(images) maps [B, 3, H, W], normalised with `encoder.normalisation`, to tokens [B, 1 + N, D] after the
    final norm, cls token first; encoder.features(images, layers) returns those after the given blocks. For a published
    file encoder.report lists the names of the tensors that were loaded and left out.

    Raise UserError if there is no complete encoder.
    """
    path = Path(path)
    checkpoint = _find_checkpoint(path, part)
    if checkpoint is not None:
        encoder = _load_checkpoint(checkpoint, part)
    elif part == "teacher":
        raise UserError(f"{path} has no teacher; only checkpoints have. Pass a run folder with checkpoints/.")
    elif path.is_file():
        converted = read_encoder(path)
        encoder = Encoder(converted.model)
        encoder.load_state_dict(converted.weights)
        encoder.normalisation, encoder.report = "imagenet", converted.report
    else:
        encoder = _load_export(path)
    encoder.normalisation = normalisation or encoder.normalisation
    if image_size is not None:
        patch = encoder.shape.patch_size
        if image_size < patch or image_size % patch:
            raise UserError(
                f"image_size is {image_size}; expected a multiple of {patch}, the patch size of {path}. Pass another."
            )
        encoder.set_image_size(image_size)
    return encoder.eval().requires_grad_(False)


def write_tokenizer(weights: dict[str, Tensor], tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer's weights and shape atomically."""
    codes, code_width = tokenizer.codebook.shape
    shape = asdict(tokenizer.encoder.shape)
    with new_folder(folder) as partial:
        save_file(weights, partial / TOKENIZER_FILE)
        config = {"format": FORMAT, "model": shape, "codes": codes, "code_width": code_width}
        write_json(partial / CONFIG_FILE, config)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer on the CPU, in fp32 and eval mode.

    path: a run folder of train_tokenizer.py, or a published file of BEiT-v2 (.pth or .safetensors). Raise UserError if
    there is no complete tokenizer.
    """
    path = Path(path)
    if (path / "tokenizer").is_dir():
        source = path / "tokenizer"
    else:
        source = path.parent if path.name == TOKENIZER_FILE else path
    try:
        if source.is_file():
            converted = read_tokenizer(source)
            weights = converted.weights
            tokenizer = Tokenizer(converted.model, *weights["codebook"].shape)
        else:
            config = json.loads((source / CONFIG_FILE).read_text())
            tokenizer = Tokenizer(ModelConfig(**config["model"]), config["codes"], config["code_width"])
            weights = load_file(source / TOKENIZER_FILE)
        tokenizer.load_state_dict(weights)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{path} is not a tokenizer ({one_line(error, 150)}). Pass a run of launch/train_tokenizer.py, or a "
            "published file of BEiT-v2."
        ) from None
    return tokenizer.eval().requires_grad_(False)


def write_timm(
    encoder: Encoder,
    folder: Path,
    head: dict[str, Tensor] | None = None,
    pool: str = "token",
    classes: Sequence[str] = (),
) -> None:
    """Write model.safetensors and config.json for `timm.create_model("local-dir:FOLDER", pretrained=True)`, atomically.

    head: a classifier's tensors under timm's names; pool: timm's name of its pooling; classes: names of its classes.
    Without a head, num_classes=0 gives features.
    """
    shape, state = encoder.shape, encoder.state_dict() | (head or {})
    size = shape.image_size
    model_args = {"img_size": size, "patch_size": shape.patch_size, "embed_dim": shape.width, "depth": shape.depth}
    model_args |= {"num_heads": shape.heads, "init_values": shape.layer_scale or None, "global_pool": pool}
    architecture = "vit_base_patch16_224"
    if shape.relative_positions != "none":
        architecture, state = "beit_base_patch16_224", to_beit(state)
        model_args |= {"use_abs_pos_emb": shape.positions != "none"}
        model_args |= {option: shape.relative_positions == value for option, value in TIMM_BIAS_OPTIONS.items()}
    mean, std = NORMALISATIONS[encoder.normalisation]
    config = {
        "architecture": architecture,
        "num_classes": len(classes),
        "label_names": list(classes),
        "model_args": model_args,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "num_classes": len(classes),
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "mean": list(mean),
            "std": list(std),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    with new_folder(folder) as partial:
        save_file(state, partial / "model.safetensors")
        write_json(partial / "config.json", config)


def write_mae(encoder: Encoder, file: Path) -> None:
    """Write a file for MAE's own code. Raise UserError if the encoder has relative positions."""
    torch.save({"model": to_mae(encoder.state_dict())}, file)


def write_beit(encoder: Encoder, file: Path) -> None:
    """Write a file for BEiT's own code."""
    torch.save({"model": to_beit(encoder.state_dict())}, file)


def write_onnx(encoder: Encoder, file: Path) -> None:
    """Write an ONNX program: images [B, 3, H, W] -> tokens [B, 1 + N, D], any B.

    Raise UserError if onnx is not installed.
    """
    example = torch.zeros(2, 3, encoder.shape.image_size, encoder.shape.image_size)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["tokens"]}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the exporter prints its progress
            program = torch.onnx.export(encoder, (example,), dynamo=True, dynamic_shapes=DYNAMIC_BATCH, **names)
    except ImportError as error:
        raise UserError(f"ONNX export needs packages that are missing ({error}). pip install -e '.[onnx]'") from None
    assert program is not None
    program.save(file)


def write_torch_export(encoder: Encoder, file: Path) -> None:
    """Write a program for torch.export.load: images [B, 3, H, W] -> tokens [B, 1 + N, D], any B."""
    example = torch.zeros(2, 3, encoder.shape.image_size, encoder.shape.image_size)
    torch.export.save(torch.export.export(encoder, (example,), dynamic_shapes=DYNAMIC_BATCH), file)


WRITERS: dict[str, Callable[[Encoder, Path], None]] = {
    "ddae": write_export,
    "timm": write_timm,
    "mae": write_mae,
    "beit": write_beit,
    "onnx": write_onnx,
    "torch": write_torch_export,
}


def newest_checkpoint(run: Path) -> Path | None:
    """Return the newest complete checkpoint of a run folder, None if there is none."""
    complete = sorted(run.glob(f"checkpoints/step_*/{MANIFEST}"))
    return complete[-1].parent if complete else None


def _find_checkpoint(path: Path, part: str) -> Path | None:
    """Return the checkpoint to load: the path itself, or a run folder's newest if its export does not suffice."""
    if (path / MANIFEST).exists() and list(path.glob("rank_*.safetensors")):
        return path
    return newest_checkpoint(path) if part == "teacher" or not (path / "encoder").is_dir() else None


def _load_checkpoint(path: Path, part: str) -> Encoder:
    config_file = path.parent.parent / "config.json"
    try:
        config = PretrainConfig.read(config_file)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a checkpoint of a pretraining run: {config_file} cannot be read ({one_line(error)}). "
            "Pass runs/NAME or runs/NAME/checkpoints/step_NUMBER."
        ) from None
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
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        if config.get("format") != FORMAT:
            raise ValueError(f"its format is {config.get('format')}, not {FORMAT}")
        encoder = Encoder(ModelConfig(**config["model"]))
        encoder.normalisation = config["normalisation"]
        encoder.load_state_dict(load_file(folder / ENCODER_FILE))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{folder} is not an export that this version reads: {one_line(error)}. Export the encoder again."
        ) from None
    return encoder
