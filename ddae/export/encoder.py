"""Encoders in and out of files: our own exports and checkpoints, and what foreign.py reads and writes.

An export is a folder with `encoder.safetensors` (fp32, timm's key names) and `config.json` (shape and normalisation).
"""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddae.config.pretrain import ModelConfig, PretrainConfig
from ddae.distributed.checkpoint_format import MANIFEST, load_weights
from ddae.errors import UserError
from ddae.export.convert import read_file, read_tokenizer, to_beit, to_mae
from ddae.models.patches import NORMALISATIONS
from ddae.models.tokenizer import Tokenizer
from ddae.models.vit import Encoder

WEIGHTS, TOKENIZER, SETTINGS = "encoder.safetensors", "tokenizer.safetensors", "config.json"
FORMAT = 1  # of an export


def export_encoder(weights: dict[str, Tensor], config: PretrainConfig, folder: Path) -> None:
    """Write the encoder's fp32 parameters with its position table and settings."""
    encoder = Encoder(config.model)  # its tables are fp32, whatever the precision of the run
    missing, unexpected = encoder.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"pos_embed"}:
        raise ValueError(f"these are not the encoder's weights: missing {missing}, unexpected {unexpected}")
    encoder.normalisation = config.data.normalisation
    write_export(encoder, folder, config.preset)


def write_export(encoder: Encoder, folder: Path, preset: str = "") -> None:
    """Write an export, whole or not at all."""
    shape = {name: getattr(encoder.shape, name) for name in ModelConfig.__dataclass_fields__}
    settings = {"format": FORMAT, "model": shape, "normalisation": encoder.normalisation, "preset": preset}
    with whole_folder(folder) as unfinished:
        save_file(encoder.state_dict(), unfinished / WEIGHTS)
        (unfinished / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` at the end: whole or not at all."""
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    for file in unfinished.iterdir():
        file.chmod(0o644)  # safetensors writes for its owner alone
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def load_encoder(
    path: str | Path,
    image_size: int | None = None,
    normalisation: str | None = None,
    part: Literal["student", "teacher"] = "student",
) -> Encoder:
    """The encoder of a run folder, a checkpoint, an export folder, or a published file of MAE, BEiT, BEiT-v2, BootMAE
    or timm (.pth or .safetensors), on the CPU, in fp32 and eval mode.

    encoder(images) takes [B, 3, H, W], normalised as `encoder.normalisation` names, and gives tokens [B, 1 + N, D]
    after the final norm, cls first; encoder.features(images, layers) those after the named blocks.
    image_size: positions are resampled to it. normalisation: "half" or "imagenet", for a file that does not say
    (imagenet unless told). part: the teacher is in checkpoints alone, the newest of a run folder's is taken.
    encoder.report says what became of each tensor of a file. UserError where there is no complete encoder.
    """
    path = Path(path)
    checkpoint = _checkpoint(path, part)
    if checkpoint is not None:
        encoder = _load_checkpoint(checkpoint, part)
    elif part == "teacher":
        raise UserError(f"{path} holds no teacher: name a run folder with checkpoints/, or a checkpoint")
    elif path.is_file():
        read = read_file(path)
        encoder = Encoder(read.model)
        encoder.load_state_dict(read.weights)
        encoder.normalisation, encoder.report = "imagenet", read.report
    else:
        encoder = _load_export(path)
    encoder.normalisation = normalisation or encoder.normalisation
    if image_size is not None:
        if image_size < encoder.shape.patch_size or image_size % encoder.shape.patch_size:
            raise UserError(
                f"image_size {image_size} is not divisible by {path}'s patches of {encoder.shape.patch_size} pixels"
            )
        encoder.resize(image_size)
    return encoder.eval().requires_grad_(False)


def write_tokenizer(weights: dict[str, Tensor], tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer's tensors, whole or not at all."""
    shape = {name: getattr(tokenizer.encoder.shape, name) for name in ModelConfig.__dataclass_fields__}
    codes, width = tokenizer.codebook.shape
    with whole_folder(folder) as unfinished:
        save_file(weights, unfinished / TOKENIZER)
        settings = {"format": FORMAT, "model": shape, "codes": codes, "code_width": width}
        (unfinished / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer that train_tokenizer.py left in a run folder, or BEiT-v2's in a published file (.pth or
    .safetensors), on the CPU, in fp32 and eval mode. UserError where there is none."""
    path = Path(path)
    folder = path / "tokenizer" if (path / "tokenizer").is_dir() else path.parent if path.name == TOKENIZER else path
    try:
        if folder.is_file():
            read = read_tokenizer(folder)
            tokenizer, weights = Tokenizer(read.model, *read.weights["codebook"].shape), read.weights
        else:
            settings = json.loads((folder / SETTINGS).read_text())
            tokenizer = Tokenizer(ModelConfig(**settings["model"]), settings["codes"], settings["code_width"])
            weights = load_file(folder / TOKENIZER)
        tokenizer.load_state_dict(weights)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{path} holds no tokenizer ({reason}): launch/train_tokenizer.py makes one") from None
    return tokenizer.eval().requires_grad_(False)


def write_timm(
    encoder: Encoder,
    folder: Path,
    head: dict[str, Tensor] | None = None,
    pool: str = "token",
    classes: Sequence[str] = (),
) -> None:
    """A folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads: model.safetensors and config.json.

    head: the tensors of a classifier beside the encoder's, by timm's names; pool: what it classifies, by timm's word;
    classes: their names. Without them num_classes=0 gives the features.
    """
    shape, state = encoder.shape, encoder.state_dict() | (head or {})
    size = shape.image_size
    arguments = {"img_size": size, "patch_size": shape.patch_size, "embed_dim": shape.width, "depth": shape.depth}
    arguments |= {"num_heads": shape.heads, "init_values": shape.layer_scale or None, "global_pool": pool}
    architecture = "vit_base_patch16_224"
    if shape.relative_positions != "none":
        architecture, state = "beit_base_patch16_224", to_beit(state)
        arguments |= {"use_abs_pos_emb": shape.positions != "none"}
        arguments |= {f"use_{kind}rel_pos_bias": shape.relative_positions == each for kind, each in RELATIVE.items()}
    mean, std = NORMALISATIONS[encoder.normalisation]
    settings = {
        "architecture": architecture,
        "num_classes": len(classes),
        "label_names": list(classes),
        "model_args": arguments,
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
    with whole_folder(folder) as unfinished:
        save_file(state, unfinished / "model.safetensors")
        (unfinished / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


RELATIVE = {"": "each", "shared_": "shared"}  # timm's words for whose the tables are, and ours


def write_mae(encoder: Encoder, file: Path) -> None:
    """A file as MAE's own code reads it; UserError where its form has no place for what the encoder has."""
    torch.save({"model": to_mae(encoder.state_dict())}, file)


def write_beit(encoder: Encoder, file: Path) -> None:
    """A file as BEiT's own code reads it."""
    torch.save({"model": to_beit(encoder.state_dict())}, file)


def write_onnx(encoder: Encoder, file: Path) -> None:
    """images [B, 3, H, W] -> tokens [B, 1 + N, D] for ONNX runtimes, B free; UserError where onnx is not installed."""
    example = torch.zeros(2, 3, encoder.shape.image_size, encoder.shape.image_size)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it counts its own steps aloud
            program = torch.onnx.export(
                encoder, (example,), dynamo=True, input_names=["images"], output_names=["tokens"], dynamic_shapes=FREE
            )
    except ImportError as error:
        raise UserError(f"ONNX cannot be written ({error}): pip install -e '.[onnx]'") from None
    assert program is not None
    program.save(file)


def write_program(encoder: Encoder, file: Path) -> None:
    """images [B, 3, H, W] -> tokens [B, 1 + N, D] as a program that torch.export.load reads, B free."""
    example = torch.zeros(2, 3, encoder.shape.image_size, encoder.shape.image_size)
    torch.export.save(torch.export.export(encoder, (example,), dynamic_shapes=FREE), file)


FREE = {"images": {0: torch.export.Dim("batch")}}  # sizes that are not fixed
WRITERS: dict[str, Callable[[Encoder, Path], None]] = {
    "ddae": write_export,
    "timm": write_timm,
    "mae": write_mae,
    "beit": write_beit,
    "onnx": write_onnx,
    "torch": write_program,
}


def newest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder."""
    complete = sorted(run.glob(f"checkpoints/step_*/{MANIFEST}"))
    return complete[-1].parent if complete else None


def _checkpoint(path: Path, part: str) -> Path | None:
    """The checkpoint that a path stands for: itself, or a run folder's newest, where no export serves."""
    if (path / MANIFEST).exists() and list(path.glob("rank_*.safetensors")):
        return path
    return newest_checkpoint(path) if part == "teacher" or not (path / "encoder").is_dir() else None


def _load_checkpoint(path: Path, part: str) -> Encoder:
    run = path.parent.parent / "config.json"
    try:
        config = PretrainConfig.from_dict(json.loads(run.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no checkpoint of a run: {run} cannot be read ({error})") from None
    encoder = Encoder(config.model)
    encoder.normalisation = config.data.normalisation
    if part == "student":
        load_weights(path, "weight", nn.ModuleDict({"encoder": encoder}))
    elif config.feature.enabled:
        load_weights(path, "teacher", encoder)
    else:
        raise UserError(f"{path} holds no teacher: its method has none")
    return encoder


def _load_export(path: Path) -> Encoder:
    folder = path / "encoder" if (path / "encoder").is_dir() else path
    for name in (WEIGHTS, SETTINGS):
        if not (folder / name).exists():
            raise UserError(f"{path} is not an export: it has no {name}; name a finished run or its encoder/ folder")
    try:
        settings = json.loads((folder / SETTINGS).read_text())
        if settings.get("format") != FORMAT:
            raise ValueError(f"its format is {settings.get('format')}, not {FORMAT}: export it again")
        encoder = Encoder(ModelConfig(**settings["model"]))
        encoder.normalisation = settings["normalisation"]
        encoder.load_state_dict(load_file(folder / WEIGHTS))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} is not an export that this version reads: {reason}") from None
    return encoder
