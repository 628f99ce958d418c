"""Conversion of published encoder weights (MAE, BEiT, BEiT-v2, BootMAE, timm) to this project's names, and back.

MAE, timm's ViT   blocks.I.attn.qkv.bias. MAE's files also hold the decoder, timm's a classification head
BEiT              blocks.I.attn.q_bias and v_bias; keys have no bias, since softmax cancels it. gamma_1 and gamma_2 are
                  the layer scale (ls1.gamma and ls2.gamma here and in timm's ViT). Tables of relative positions, one
                  shared by all blocks or one per block, often without pos_embed
"""

import argparse
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ddae.config.pretrain import ModelConfig
from ddae.errors import UserError, one_line

CONTAINERS = ("model", "state_dict", "module", "teacher", "student")  # keys under which files nest their state dict
PREFIXES = ("module.", "backbone.", "encoder.", "_orig_mod.")
SCALED_LAYERS = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}  # layer scale -> the layer whose output it scales
BIAS_TABLE = "relative_position_bias_table"
SHARED_TABLE = f"rel_pos_bias.{BIAS_TABLE}"
BEIT_RENAMES = (  # (pattern of BEiT's name, this project's name)
    (r"^(blocks\.\d+\.)gamma_([12])$", r"\1ls\2.gamma"),
    (rf"^(blocks\.\d+\.attn\.){BIAS_TABLE}$", rf"\1rel_pos_bias.{BIAS_TABLE}"),
)
TOKENIZER_NAMES = {  # name in BEiT-v2's tokenizer files -> this project's, encoder excluded
    **{f"encode_task_layer.{n}.{kind}": f"to_code.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")},
    "quantize.embedding.weight": "codebook",
}
TOKENIZER_FIX = "Pass a run of launch/train_tokenizer.py, or a published file of BEiT-v2."  # of an error message
BLOCK_LAYERS = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
ENCODER_NAMES = re.compile(
    r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    rf"|blocks\.\d+\.(({'|'.join(BLOCK_LAYERS)})\.(weight|bias)|ls[12]\.gamma|attn\.{SHARED_TABLE})|{SHARED_TABLE}"
)


class ConvertedWeights(NamedTuple):
    """fp32 weights under this project's names, the shape of their encoder, and which tensors of the file were used."""

    weights: dict[str, Tensor]
    model: ModelConfig
    report: dict[str, list[str]]  # "loaded" and "left out": names in the file


def read_encoder(path: Path) -> ConvertedWeights:
    """Read the encoder of a .safetensors or pickled file. Raise UserError if it has none, or an incomplete one."""
    return convert(_encoder_tensors(_read_file(path), path), path)


def read_tokenizer(path: Path) -> ConvertedWeights:
    """Read a BEiT-v2 tokenizer under Tokenizer's names, without the decoder and teacher it was trained with.

    Raise UserError if the file has no tokenizer, or an incomplete one.
    """
    state = _unwrap(_read_file(path))
    encoder = {name.removeprefix("encoder."): v for name, v in state.items() if name.startswith("encoder.")}
    missing = [name for name in ("encoder.cls_token", *TOKENIZER_NAMES) if name not in state]
    if missing:
        raise UserError(f"{path} is not a tokenizer: it has no {missing[0]}. {TOKENIZER_FIX}")
    converted = convert(encoder, path)
    weights = {f"encoder.{name}": values for name, values in converted.weights.items()}
    weights |= {name: state[published].float() for published, name in TOKENIZER_NAMES.items()}
    loaded = [f"encoder.{name}" for name in converted.report["loaded"]] + list(TOKENIZER_NAMES)
    return ConvertedWeights(weights, converted.model, _report(state, loaded))


def convert(state: dict[str, Tensor], path: Path | str) -> ConvertedWeights:
    """Rename an encoder's tensors from any of the published forms. path: for error messages.

    Raise UserError if the encoder is incomplete.
    """
    weights, loaded = {}, []
    for published_name, values in state.items():
        name = published_name
        for pattern, renamed in BEIT_RENAMES:
            name = re.sub(pattern, renamed, name)
        prefix = published_name.removesuffix("q_bias")
        if published_name.endswith(".attn.q_bias") and f"{prefix}v_bias" in state:
            name = f"{prefix}qkv.bias"
            values = torch.cat([values, torch.zeros_like(values), state[f"{prefix}v_bias"]])
            loaded.append(f"{prefix}v_bias")
        elif published_name.startswith("fc_norm.") and "norm.weight" not in state:
            name = published_name.removeprefix("fc_")  # final norm of a model trained on the mean of the patch tokens
        if ENCODER_NAMES.fullmatch(name):
            weights[name] = values.float()
            loaded.append(published_name)
    return ConvertedWeights(weights, _infer_shape(weights, path), _report(state, loaded))


def to_mae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder's tensors in MAE's form: layer scales are folded into the layers they scale.

    The function is unchanged up to rounding. Raise UserError if the encoder has relative positions.
    """
    if any(BIAS_TABLE in name for name in state):
        raise UserError("the encoder has relative positions, which MAE's form lacks. Export it with --form beit.")
    folded = {name: values.clone() for name, values in state.items() if not name.endswith("gamma")}
    for name in state.keys() - folded.keys():
        block, scale = re.findall(r"blocks\.(\d+)\.(.*)", name)[0]
        folded[f"blocks.{block}.{SCALED_LAYERS[scale]}.weight"] *= state[name][:, None]
        folded[f"blocks.{block}.{SCALED_LAYERS[scale]}.bias"] *= state[name]
    return folded


def to_beit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder's tensors in BEiT's form, without the bias of the keys, which softmax cancels."""
    renamed = {}
    for name, values in state.items():
        if name.endswith("attn.qkv.bias"):
            prefix = name.removesuffix("qkv.bias")
            query, _, value = values.chunk(3)
            renamed |= {f"{prefix}q_bias": query.clone(), f"{prefix}v_bias": value.clone()}
        else:
            name = re.sub(r"ls([12])\.gamma$", r"gamma_\1", name)
            renamed[name.replace(f"attn.{SHARED_TABLE}", f"attn.{BIAS_TABLE}")] = values.clone()
    return renamed


def _read_file(path: Path) -> Any:
    """Load a file. Pickled files are loaded with weights_only, so that no code in them runs.

    argparse.Namespace is allowed: MAE's files hold their command line. Raise UserError if the file cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError) as error:
        reason, fix = "cannot be read as weights", "Pass a .pth or .safetensors file."
        raise UserError(f"{path} {reason}: {one_line(error)}. {fix}") from None
    except Exception as error:  # pickle raises its own for objects that are not allowed
        reason, fix = "holds more than tensors, which could run code", "Pass a file that holds only a state dict."
        raise UserError(f"{path} {reason}: {one_line(error, 150)}. {fix}") from None


def _unwrap(content: Any) -> dict[str, Tensor]:
    """Return the tensors of a file's state dict, which may be nested in a container."""
    for container in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(container), dict):
            content = content[container]
    return {n: v for n, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}


def _encoder_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file without their common prefix. Raise UserError if they have no cls_token."""
    state = _unwrap(content)
    for prefix in PREFIXES:
        if f"{prefix}cls_token" in state:
            state = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
    if "cls_token" not in state:
        raise UserError(f"{path} is not a Vision Transformer: it has no cls_token. Pass a file of a ViT encoder.")
    return state


def _report(state: dict[str, Tensor], loaded: list[str]) -> dict[str, list[str]]:
    return {"loaded": loaded, "left out": sorted(set(state) - set(loaded))}


def _infer_shape(weights: dict[str, Tensor], path: Path | str) -> ModelConfig:
    """Infer the shape of an encoder from its tensors. The width of a head is 64 unless a bias table has another.

    Raise UserError if a tensor is missing, or if the patch grid is not square.
    """
    depth = 1 + max((int(name.split(".")[1]) for name in weights if name.startswith("blocks.")), default=-1)
    tables = [name for name in weights if BIAS_TABLE in name]
    relative = "none" if not tables else "shared" if tables == [SHARED_TABLE] else "each"
    layers = {f"blocks.{n}.{layer}" for n in range(depth) for layer in BLOCK_LAYERS} | {"patch_embed.proj", "norm"}
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")} | {"cls_token"}
    expected |= {f"blocks.{n}.attn.{SHARED_TABLE}" for n in range(depth)} if relative == "each" else set()
    has_layer_scale = any(name.endswith("gamma") for name in weights)
    expected |= {f"blocks.{n}.{scale}" for n in range(depth) for scale in SCALED_LAYERS} if has_layer_scale else set()
    expected |= {"pos_embed"} if not tables else set()
    if missing := sorted(expected - weights.keys()):
        others = f"{missing[0]} is missing, and {len(missing) - 1} more"
        raise UserError(f"{path} is an incomplete encoder: {others}. Pass a complete file.")
    width, patch = weights["cls_token"].shape[-1], weights["patch_embed.proj.weight"].shape[-1]
    if "pos_embed" in weights:
        positions, patches = "rowfirst", weights["pos_embed"].shape[1] - 1
        side = math.isqrt(patches)
    else:  # a table has (2 side - 1)^2 offsets, and 3 rows of the cls token
        positions, side = "none", (math.isqrt(len(weights[tables[0]]) - 3) + 1) // 2
        patches = side**2
    heads = weights[tables[0]].shape[1] if tables else width // 64
    if side**2 != patches or heads == 0 or width % heads or (not tables and width % 64):
        expected_shape = "expected a square patch grid and heads of width 64, as no others are supported"
        raise UserError(f"{path} has {patches} patches and width {width}; {expected_shape}. Pass another file.")
    init = "beit" if tables else "mae"  # of the untrained encoder that evaluations compare with
    layer_scale = 1.0 if has_layer_scale else 0.0
    return ModelConfig(width, depth, heads, side * patch, patch, positions, relative, layer_scale, init)
