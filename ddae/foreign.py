"""Other people's weights as ours, and ours as theirs: MAE, BootMAE and timm's ViT, by the names of their tensors.

    MAE, timm     blocks.I.attn.qkv.bias; MAE's files hold the decoder, too, timm's a head
    BEiT's form   blocks.I.attn.q_bias and v_bias, no bias of the keys (softmax cancels it); gamma_1 and gamma_2, which
                  scale what a block adds, and which timm calls ls1.gamma and ls2.gamma

What scales a block's output is folded into its last matrices: the same function, up to rounding. Relative positions,
which BEiT's own files have, are not read.
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

from ddae.config import ModelConfig
from ddae.errors import UserError

CONTAINERS = ("model", "state_dict", "module", "teacher", "student")  # that files keep their tensors in
PREFIXES = ("module.", "backbone.", "encoder.", "_orig_mod.")
SCALES = {"gamma_1": "attn.proj", "ls1.gamma": "attn.proj", "gamma_2": "mlp.fc2", "ls2.gamma": "mlp.fc2"}
OURS = re.compile(
    r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    r"|blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
)


class Read(NamedTuple):
    """An encoder's weights by our names, its shape, and what became of every tensor of the file."""

    weights: dict[str, Tensor]
    model: ModelConfig
    report: dict[str, list[str]]  # loaded, folded, left out: names in the file


def read_file(path: Path) -> Read:
    """The encoder in a .safetensors or a pickled file; UserError where there is none, or not all of one.

    A pickled file is read with weights_only: nothing in it is run. MAE's files hold their command line, an
    argparse.Namespace, which is let through by name.
    """
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as weights: {' '.join(str(error).split())[:200]}") from None
    except Exception as error:  # pickle's own, of a file that holds more than tensors
        raise UserError(
            f"{path} holds more than tensors and is not read: {' '.join(str(error).split())[:150]}"
        ) from None
    return convert(_tensors(state, path), path)


def convert(state: dict[str, Tensor], path: Path | str) -> Read:
    """Tensors by somebody's names -> by ours."""
    if any("relative_position" in name or name.startswith("rel_pos_bias") for name in state):
        raise UserError(f"{path} has relative positions, as BEiT's files do, which this version does not read")
    weights, report = dict(state), {"loaded": [], "folded": [], "left out": []}
    for name in [name for name in state if name.endswith(".attn.q_bias")]:
        start = name.removesuffix("q_bias")
        query, value = weights.pop(name), weights.pop(f"{start}v_bias")
        weights[f"{start}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
        report["loaded"] += [name, f"{start}v_bias"]
    for name in list(state):
        block, _, scale = name.partition(".")[2].partition(".")
        if name.startswith("blocks.") and scale in SCALES:
            factor = weights.pop(name)
            for part in ("weight", "bias"):
                target = f"blocks.{block}.{SCALES[scale]}.{part}"
                weights[target] = weights[target] * (factor[:, None] if part == "weight" else factor)
            report["folded"].append(name)
    if "norm.weight" not in weights:  # trained for the mean of the patches, after which the norm came
        for part in ("weight", "bias"):
            if f"fc_norm.{part}" in weights:
                weights[f"norm.{part}"] = weights.pop(f"fc_norm.{part}")
                report["loaded"].append(f"fc_norm.{part}")
    ours = {name: values.float() for name, values in weights.items() if OURS.fullmatch(name)}
    report["loaded"] += [name for name in ours if name in state]
    report["left out"] = sorted(set(state) - set(report["loaded"]) - set(report["folded"]))
    return Read(ours, _shape(ours, path), report)


def to_beit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors by the names of BEiT's form, without relative positions; the keys' bias, which softmax cancels, is
    left out."""
    renamed = {}
    for name, values in state.items():
        if name.endswith("attn.qkv.bias"):
            start = name.removesuffix("qkv.bias")
            query, _, value = values.chunk(3)
            renamed |= {f"{start}q_bias": query.clone(), f"{start}v_bias": value.clone()}
        else:
            renamed[name] = values
    return renamed


def _tensors(state: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, out of their container and without a prefix that all share."""
    for container in CONTAINERS:
        if isinstance(state, dict) and isinstance(state.get(container), dict):
            state = state[container]
    found = {n: v for n, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    for prefix in PREFIXES:
        if f"{prefix}cls_token" in found:
            found = {name.removeprefix(prefix): v for name, v in found.items() if name.startswith(prefix)}
    if "cls_token" not in found:
        raise UserError(f"{path} holds no Vision Transformer: it has no cls_token")
    return found


def _shape(weights: dict[str, Tensor], path: Path | str) -> ModelConfig:
    """Width, depth and the rest as the tensors show them; heads of 64. UserError where something is missing."""
    depth = 1 + max((int(name.split(".")[1]) for name in weights if name.startswith("blocks.")), default=-1)
    parts = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    whole = {f"blocks.{n}.{part}.{kind}" for n in range(depth) for part in parts for kind in ("weight", "bias")}
    whole |= {
        "cls_token",
        "pos_embed",
        *(f"{part}.{k}" for part in ("patch_embed.proj", "norm") for k in ("weight", "bias")),
    }
    if missing := sorted(whole - weights.keys()):
        raise UserError(f"{path} holds no whole encoder: {missing[0]} is missing, and {len(missing) - 1} more")
    width, patch = weights["cls_token"].shape[-1], weights["patch_embed.proj.weight"].shape[-1]
    side = math.isqrt(weights["pos_embed"].shape[1] - 1)
    if side**2 != weights["pos_embed"].shape[1] - 1 or width % 64:
        raise UserError(f"{path} is not read: {side}^2 positions and heads of 64 are expected, its width is {width}")
    return ModelConfig(width=width, depth=depth, heads=width // 64, image_size=side * patch, patch_size=patch)
