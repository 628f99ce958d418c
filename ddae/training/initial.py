"""The encoder that a run starts from, `init`: a run, an export, a published file, or a model of timm."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddae.config.base import describe_size
from ddae.config.pretrain import PretrainConfig
from ddae.errors import UserError, one_line
from ddae.export.encoder import INITIAL, load_encoder, write_export
from ddae.export.published_weights import convert
from ddae.models.patches import LAYOUTS, NORMALISATIONS, sincos_positions
from ddae.models.vit import Encoder

TIMM = "timm:"  # prefix of the name of a model of timm
SHAPE = ("width", "depth", "heads", "patch_size")  # fields of ModelConfig that the config and the encoder share
MAX_ERROR = 1e-4  # of a position table that counts as a sin-cos one


def load_initial(name: str) -> Encoder:
    """Load the encoder, with `shape.positions` as its table is. Raise UserError if it cannot be pretrained further."""
    encoder = _load_timm(name.removeprefix(TIMM)) if name.startswith(TIMM) else load_encoder(name)
    shape = encoder.shape
    for part, found in (("registers", shape.registers), ("norms of queries and keys", shape.qk_norm)):
        if found:
            raise UserError(f"--init {name} has {part}, which pretraining does not support. Pass another encoder.")
    if shape.relative_positions != "none":
        problem = "has relative positions, which need an encoder that sees all patches"
        raise UserError(f"--init {name} {problem}. Pass an encoder with absolute positions.")
    return encoder


def with_initial(config: PretrainConfig, encoder: Encoder) -> PretrainConfig:
    """Return the config with the encoder's positions, layer scale and normalisation.

    Raise UserError if its shape is not that of config.model.
    """
    shape = encoder.shape
    for field in SHAPE:
        expected, found = getattr(config.model, field), getattr(shape, field)
        if expected != found:
            fix = f"Pass --model.{field} {found}, or the preset own, which takes the encoder's shape."
            raise UserError(f"--init {config.init} has model.{field} = {found}, not {expected}. {fix}")
    tables = {layout: sincos_positions(encoder.grid, shape.width, layout) for layout in LAYOUTS}
    is_equal = (name for name, each in tables.items() if (each - encoder.pos_embed).abs().max() < MAX_ERROR)
    model = replace(config.model, positions=next(is_equal, "learned"), layer_scale=shape.layer_scale)
    return replace(config, model=model, data=replace(config.data, normalisation=encoder.normalisation))


def describe(name: str, encoder: Encoder, config: PretrainConfig) -> str:
    """Return what is taken from the encoder, as text."""
    left_out = encoder.report.get("left out", [])
    text = f"init: all {len(encoder.state_dict())} tensors of the encoder in {name}"
    text += f"; left out: {', '.join(left_out)}" if left_out else ""
    size, target = encoder.shape.image_size, config.model.image_size
    if size != target:
        text += f"; positions of {describe_size(size)} pixels are resampled to {describe_size(target)}"
    return f"{text}; decoders and betas start anew"


def start_from(config: PretrainConfig, encoder: nn.Module) -> Encoder:
    """Copy the weights of config.init to a model's encoder. Return the encoder they come from, at its image size."""
    initial = load_initial(config.init)
    if initial.shape.image_size != config.model.image_size:
        initial.set_image_size(config.model.image_size)
    state = initial.state_dict()
    if config.model.positions != "learned":
        state["pos_embed"] = encoder.state_dict()["pos_embed"]
    with torch.no_grad():
        encoder.load_state_dict(state)
    return initial


def write_initial(initial: Encoder, config: PretrainConfig, folder: Path) -> None:
    """Export the encoder that a run starts from, as the baseline of its evaluations."""
    encoder = Encoder(config.model)
    encoder.load_state_dict(initial.state_dict())
    encoder.normalisation = config.data.normalisation
    write_export(encoder, folder / INITIAL, config.preset)


def _load_timm(name: str) -> Encoder:
    import timm

    try:
        model: Any = timm.create_model(name, pretrained=True, num_classes=0)
        heads, grid = int(model.blocks[0].attn.num_heads), tuple(model.patch_embed.grid_size)
        settings = model.pretrained_cfg
    except Exception as error:  # unknown name, not a ViT, or weights that cannot be downloaded
        problem = f"cannot be loaded ({one_line(error)})"
        raise UserError(f"--init {TIMM}{name} {problem}. Pass a ViT of timm, or a file of weights.") from None
    converted = convert(dict(model.state_dict()), f"{TIMM}{name}", heads, grid)
    encoder = Encoder(converted.model)
    encoder.load_state_dict(converted.weights)
    encoder.report = converted.report
    known = {values: each for each, values in NORMALISATIONS.items()}
    stated = tuple(settings["mean"]), tuple(settings["std"])
    if stated not in known:
        raise UserError(f"--init {TIMM}{name} expects images normalised by {stated}. Pass another encoder.")
    encoder.normalisation = known[stated]
    return encoder.eval().requires_grad_(False)
