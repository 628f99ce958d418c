"""Other people's weights as ours, and ours as theirs: MAE, BEiT, BEiT-v2, BootMAE and timm's, by the names of tensors.

MAE, timm's ViT   blocks.I.attn.qkv.bias; MAE's files hold the decoder, too, timm's a head
BEiT's form       blocks.I.attn.q_bias and v_bias, no bias of the keys (softmax cancels it); gamma_1 and gamma_2,
                  which scale what a block adds (ours and timm's ViT: ls1.gamma, ls2.gamma); tables of relative
                  positions, one shared by all blocks or one each, and then often no pos_embed
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
from ddae.errors import UserError

CONTAINERS = ("model", "state_dict", "module", "teacher", "student")  # that files keep their tensors in
PREFIXES = ("module.", "backbone.", "encoder.", "_orig_mod.")
SCALES = {
    "ls1.gamma": "attn.proj",
    "ls2.gamma": "mlp.fc2",
}  # what scales whose output in a block
TABLE = "relative_position_bias_table"
SHARED = f"rel_pos_bias.{TABLE}"
BEIT_NAMES = (  # BEiT's words and ours
    (r"^(blocks\.\d+\.)gamma_([12])$", r"\1ls\2.gamma"),
    (rf"^(blocks\.\d+\.attn\.){TABLE}$", rf"\1rel_pos_bias.{TABLE}"),
)
TOKENIZER = {  # of a published tokenizer, beside its encoder, and our names
    **{f"encode_task_layer.{n}.{kind}": f"to_code.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")},
    "quantize.embedding.weight": "codebook",
}
PARTS = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
OURS = re.compile(
    r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    rf"|blocks\.\d+\.(({'|'.join(PARTS)})\.(weight|bias)|ls[12]\.gamma|attn\.{SHARED})|{SHARED}"
)


class Read(NamedTuple):
    """An encoder's weights by our names, its shape, and what became of every tensor of the file."""

    weights: dict[str, Tensor]
    model: ModelConfig
    report: dict[str, list[str]]  # loaded, left out: names in the file


def read_file(path: Path) -> Read:
    """The encoder in a .safetensors or a pickled file; UserError where there is none, or not all of one."""
    return convert(_tensors(_contents(path), path), path)


def read_tokenizer(path: Path) -> Read:
    """BEiT-v2's tokenizer in such a file, as Tokenizer names its parts; UserError where there is none, or not all of
    one. What it was trained with (decoder, teacher) is left out."""
    state = _unpacked(_contents(path))
    encoder = {name.removeprefix("encoder."): v for name, v in state.items() if name.startswith("encoder.")}
    missing = [name for name in ("encoder.cls_token", *TOKENIZER) if name not in state]
    if missing:
        raise UserError(f"{path} holds no tokenizer: it has no {missing[0]}")
    read = convert(encoder, path)
    weights = {f"encoder.{name}": values for name, values in read.weights.items()}
    weights |= {ours: state[theirs].float() for theirs, ours in TOKENIZER.items()}
    loaded = [f"encoder.{name}" for name in read.report["loaded"]] + list(TOKENIZER)
    return Read(weights, read.model, {"loaded": loaded, "left out": sorted(set(state) - set(loaded))})


def _contents(path: Path) -> Any:
    """A pickled file is read with weights_only: nothing in it is run. MAE's files hold their command line, an
    argparse.Namespace, which is let through by name."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as weights: {' '.join(str(error).split())[:200]}") from None
    except Exception as error:  # pickle's own, of a file that holds more than tensors
        raise UserError(
            f"{path} holds more than tensors and is not read: {' '.join(str(error).split())[:150]}"
        ) from None


def convert(state: dict[str, Tensor], path: Path | str) -> Read:
    """Tensors by somebody's names -> by ours."""
    weights, loaded = {}, []
    for name, values in state.items():
        ours = name
        for theirs, words in BEIT_NAMES:
            ours = re.sub(theirs, words, ours)
        start = name.removesuffix("q_bias")
        if name.endswith(".attn.q_bias") and f"{start}v_bias" in state:
            ours, values = f"{start}qkv.bias", torch.cat([values, torch.zeros_like(values), state[f"{start}v_bias"]])
            loaded.append(f"{start}v_bias")
        elif name.startswith("fc_norm.") and "norm.weight" not in state:
            ours = name.removeprefix("fc_")  # trained for the mean of the patches, after which the norm came
        if OURS.fullmatch(ours):
            weights[ours] = values.float()
            loaded.append(name)
    report = {"loaded": loaded, "left out": sorted(set(state) - set(loaded))}
    return Read(weights, _shape(weights, path), report)


def to_mae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors as MAE's files have them: what scales a block's output is folded into its last matrices, the same
    function up to rounding. UserError where there are relative positions."""
    if any(TABLE in name for name in state):
        raise UserError("this encoder has relative positions, for which MAE's form has no place: export --form beit")
    folded = {name: values.clone() for name, values in state.items() if not name.endswith("gamma")}
    for name in state.keys() - folded.keys():
        block, scale = re.findall(r"blocks\.(\d+)\.(.*)", name)[0]
        folded[f"blocks.{block}.{SCALES[scale]}.weight"] *= state[name][:, None]
        folded[f"blocks.{block}.{SCALES[scale]}.bias"] *= state[name]
    return folded


def to_beit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors by the names of BEiT's form; the keys' bias, which softmax cancels, is left out."""
    renamed = {}
    for name, values in state.items():
        if name.endswith("attn.qkv.bias"):
            start = name.removesuffix("qkv.bias")
            query, _, value = values.chunk(3)
            renamed |= {f"{start}q_bias": query.clone(), f"{start}v_bias": value.clone()}
        else:
            name = re.sub(r"ls([12])\.gamma$", r"gamma_\1", name)
            renamed[name.replace(f"attn.{SHARED}", f"attn.{TABLE}")] = values.clone()
    return renamed


def _unpacked(state: Any) -> dict[str, Tensor]:
    """The tensors of a file by name, out of their container."""
    for container in CONTAINERS:
        if isinstance(state, dict) and isinstance(state.get(container), dict):
            state = state[container]
    return {n: v for n, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}


def _tensors(state: Any, path: Path) -> dict[str, Tensor]:
    """The same without a prefix that all share."""
    found = _unpacked(state)
    for prefix in PREFIXES:
        if f"{prefix}cls_token" in found:
            found = {name.removeprefix(prefix): v for name, v in found.items() if name.startswith(prefix)}
    if "cls_token" not in found:
        raise UserError(f"{path} holds no Vision Transformer: it has no cls_token")
    return found


def _shape(weights: dict[str, Tensor], path: Path | str) -> ModelConfig:
    """Width, depth and the rest as the tensors show them; heads of 64 where none says how many there are. UserError
    where something is missing."""
    depth = 1 + max((int(name.split(".")[1]) for name in weights if name.startswith("blocks.")), default=-1)
    tables = [name for name in weights if TABLE in name]
    relative = "none" if not tables else "shared" if tables == [SHARED] else "each"
    names = {f"blocks.{n}.{part}" for n in range(depth) for part in PARTS} | {"patch_embed.proj", "norm"}
    whole = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")} | {"cls_token"}
    whole |= {f"blocks.{n}.attn.{SHARED}" for n in range(depth)} if relative == "each" else set()
    scaled = any(name.endswith("gamma") for name in weights)
    whole |= {f"blocks.{n}.{scale}" for n in range(depth) for scale in SCALES} if scaled else set()
    whole |= {"pos_embed"} if not tables else set()
    if missing := sorted(whole - weights.keys()):
        raise UserError(f"{path} holds no whole encoder: {missing[0]} is missing, and {len(missing) - 1} more")
    width, patch = weights["cls_token"].shape[-1], weights["patch_embed.proj.weight"].shape[-1]
    if "pos_embed" in weights:
        places = weights["pos_embed"].shape[1] - 1
        side = math.isqrt(places)
    else:  # (2 side - 1)^2 offsets, and 3 of the cls token
        side = (math.isqrt(len(weights[tables[0]]) - 3) + 1) // 2
        places = side**2
    heads = weights[tables[0]].shape[1] if tables else width // 64
    if side**2 != places or width % heads or (not tables and width % 64):
        raise UserError(f"{path} is not read: {side}^2 positions and heads of 64 are expected, its width is {width}")
    return ModelConfig(
        width=width,
        depth=depth,
        heads=heads,
        image_size=side * patch,
        patch_size=patch,
        positions="rowfirst" if "pos_embed" in weights else "none",
        relative_positions=relative,
        layer_scale=1.0 if scaled else 0.0,
        init="beit" if relative != "none" else "mae",  # of an untrained encoder beside it
    )
