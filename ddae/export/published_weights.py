"""Conversion of published encoder weights to this project's names, and back.

MAE, timm's ViT   blocks.I.attn.qkv.bias. MAE's files also hold the decoder, timm's a classification head
BEiT              blocks.I.attn.q_bias and v_bias; keys have no bias, since softmax cancels it. gamma_1 and gamma_2 are
                  the layer scale (ls1.gamma and ls2.gamma here and in timm's ViT). Tables of relative positions, one
                  shared by all blocks or one per block, often without pos_embed
DeiT              dist_token: a register with a position. DeiT-III: no position of the cls token
DINOv2            register_tokens, without positions (timm: reg_token)
transformers      encoder.layer.I.attention.attention.{query,key,value}, since 5.0 layers.I.attention.{q,k,v}_proj; ...
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddae.config.base import height_width
from ddae.config.pretrain import EncoderShape
from ddae.errors import UserError
from ddae.export.weight_files import EncoderFile, read_encoder_file, read_state_dict
from ddae.models.patches import NORMALISATIONS

SCALED_LAYERS = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}  # layer scale -> the layer whose output it scales
BIAS_TABLE = "relative_position_bias_table"
SHARED_TABLE = f"rel_pos_bias.{BIAS_TABLE}"
RENAMES = (  # (pattern of a published name, this project's name), applied in this order
    (r"^(blocks\.\d+\.)gamma_([12])$", r"\1ls\2.gamma"),
    (rf"^(blocks\.\d+\.attn\.){BIAS_TABLE}$", rf"\1rel_pos_bias.{BIAS_TABLE}"),
    (r"^register_tokens$", "reg_token"),
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
    (r"^(blocks\.\d+\.)attention\.attention\.", r"\1attn."),
    (r"^(blocks\.\d+\.)attention\.(output\.dense|o_proj)\.", r"\1attn.proj."),
    *((rf"^(blocks\.\d+\.)attention\.{part[0]}_proj\.", rf"\1attn.{part}.") for part in ("query", "key", "value")),
    (r"^(blocks\.\d+\.)intermediate\.dense\.", r"\1mlp.fc1."),
    (r"^(blocks\.\d+\.)output\.dense\.", r"\1mlp.fc2."),
    (r"^(blocks\.\d+\.)layernorm_before\.", r"\1norm1."),
    (r"^(blocks\.\d+\.)layernorm_after\.", r"\1norm2."),
    (r"^(blocks\.\d+\.)layer_scale([12])\.lambda1$", r"\1ls\2.gamma"),
)
TOKENIZER_NAMES = {  # name in BEiT-v2's tokenizer files -> this project's, encoder excluded
    **{f"encode_task_layer.{n}.{kind}": f"to_code.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")},
    "quantize.embedding.weight": "codebook",
}
TOKENIZER_FIX = "Pass a run of launch/train_tokenizer.py, or a published file of BEiT-v2."  # of an error message
PROJECTIONS = ("patch_embed.proj.weight", "patch_embeddings.projection.weight")  # endings of published names
Grid = tuple[int, int]  # rows and columns of patches
BLOCK_LAYERS = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
QK_NORMS = ("attn.q_norm", "attn.k_norm")
ENCODER_NAMES = re.compile(
    r"cls_token|reg_token|dist_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    rf"|blocks\.\d+\.(({'|'.join((*BLOCK_LAYERS, *QK_NORMS))})\.(weight|bias)|ls[12]\.gamma|attn\.{SHARED_TABLE})"
    rf"|{SHARED_TABLE}"
)
# Tensors that do not change an encoder's tokens: of decoders, heads and pretraining; what is derived from others.
LEFT_OUT = re.compile(
    r"(.*\.)?(relative_position_index|k_bias|num_batches_tracked)"
    r"|(?!\w*(head_token|register))(\w*head\w*|\w*mask_token\w*|fc_norm|pooler|classifier|\w*decoder\w*|de_\w+"
    r"|decode\w*|down|\w*predictor\w*|\w*projector\w*|queue\w*|\w*cent(er|re)\w*|momentum_\w+|loss\w*|encode_task_layer|quantize|\w*logit_scale)(\..*)?"
)
HEADS = {  # attention heads of known families by (width, depth)
    (192, 12): 3,
    (384, 12): 6,  # MoCo-v3: weight_files.MOCO_HEADS
    (768, 12): 12,
    (1024, 24): 16,
    (1152, 27): 16,
    (1280, 32): 16,
    (1408, 40): 16,
    (1664, 48): 16,
}


class ConvertedWeights(NamedTuple):
    """fp32 weights under this project's names, the shape of their encoder, and which tensors of the file were used."""

    weights: dict[str, Tensor]
    model: EncoderShape
    normalisation: str  # of the images
    report: dict[str, list[str]]  # "loaded" and "left out": names in the file; "taken": which of several state dicts


def read_encoder(path: Path, heads: int | None = None, key: str = "") -> ConvertedWeights:
    """Read the encoder of a .safetensors or pickled file, or of a snapshot folder.

    heads: attention heads, for a file that does not tell. key: of the state dict to take. Raise UserError if there is
    no encoder, an incomplete one, or one with parts that are not supported.
    """
    file = read_encoder_file(path, key)
    if heads and file.heads and heads != file.heads:
        raise UserError(f"{path} states {file.heads} attention heads, but --heads is {heads}. Leave out --heads.")
    converted = convert(file.state, path, heads or file.heads, _stated_grid(file))
    if file.normalisation not in (None, *NORMALISATIONS):
        problem = f"was trained on images normalised by {file.normalisation}"
        raise UserError(f"{path} {problem}; expected one of {', '.join(NORMALISATIONS)}. Pass another.")
    return converted._replace(
        normalisation=file.normalisation or converted.normalisation,
        report=converted.report | ({"taken": [file.source]} if file.source else {}),
    )


def read_tokenizer(path: Path) -> ConvertedWeights:
    """Read a BEiT-v2 tokenizer under Tokenizer's names, without the decoder and teacher it was trained with.

    Raise UserError if the file has no tokenizer, or an incomplete one.
    """
    state = read_state_dict(path)
    encoder = {name.removeprefix("encoder."): v for name, v in state.items() if name.startswith("encoder.")}
    missing = [name for name in ("encoder.cls_token", *TOKENIZER_NAMES) if name not in state]
    if missing:
        raise UserError(f"{path} is not a tokenizer: it has no {missing[0]}. {TOKENIZER_FIX}")
    heads = max(1, encoder["cls_token"].shape[-1] // 64)  # BEiT-v2's encoders have heads of width 64
    converted = convert(encoder, path, heads)
    weights = {f"encoder.{name}": values for name, values in converted.weights.items()}
    weights |= {name: state[published].float() for published, name in TOKENIZER_NAMES.items()}
    loaded = [f"encoder.{name}" for name in converted.report["loaded"]] + list(TOKENIZER_NAMES)
    return converted._replace(weights=weights, report=_report(state, loaded))


def _stated_grid(file: EncoderFile) -> Grid | None:
    """Return rows and columns of patches, if the file states its image size."""
    names = [name for name in file.state if name.endswith(PROJECTIONS)]
    if file.image_size is None or not names:
        return None
    patch = file.state[names[0]].shape[-1]
    height, width = height_width(file.image_size)
    return height // patch, width // patch


def convert(
    state: dict[str, Tensor], path: Path | str, heads: int | None = None, grid: Grid | None = None
) -> ConvertedWeights:
    """Rename an encoder's tensors from any of the published forms. path: for error messages.

    grid: rows and columns of patches, if they are known; otherwise, or if they do not fit, the grid is a square.

    Raise UserError if the encoder is incomplete, has tensors that would change its function, or if its number of
    attention heads is neither given nor known.
    """
    weights, loaded, unknown = {}, [], []
    published = {_own_name(name, state): name for name in state}
    for name, published_name in published.items():
        values = state[published_name]
        if match := re.fullmatch(r"(blocks\.\d+\.attn\.)(q_bias|query\.(weight|bias))", name):
            others = ["v_bias"] if match[2] == "q_bias" else [f"key.{match[3]}", f"value.{match[3]}"]
            others = [f"{match[1]}{other}" for other in others]
            if missing := [other for other in others if other not in published]:
                raise UserError(f"{path} is an incomplete encoder: {missing[0]} is missing. Pass a complete file.")
            name, found = f"{match[1]}qkv.{match[3] or 'bias'}", [state[published[other]] for other in others]
            values = torch.cat([values, *([torch.zeros_like(values)] if len(found) == 1 else []), *found])
            loaded += [published[other] for other in others]
        if ENCODER_NAMES.fullmatch(name):
            if not values.is_floating_point():
                problem = f"has {published_name} in {str(values.dtype).removeprefix('torch.')}"
                raise UserError(
                    f"{path} {problem}; expected floating-point numbers. Pass weights without quantisation."
                )
            weights[name] = values.float()
            loaded.append(published_name)
        elif not LEFT_OUT.fullmatch(name):
            unknown.append(published_name)
    if unknown := [name for name in unknown if name not in loaded]:
        others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        problem = f"has {unknown[0]}{others}, which would change the features and is not supported"
        raise UserError(f"{path} {problem}. Pass another file, or remove what is not part of its encoder.")
    _resolve_prefix_tokens(weights, path, grid)
    return ConvertedWeights(weights, _infer_shape(weights, path, heads, grid), "imagenet", _report(state, loaded))


def _own_name(name: str, state: dict[str, Tensor]) -> str:
    """Return this project's name of a published tensor; biases of queries and values keep theirs."""
    for pattern, renamed in RENAMES:
        name = re.sub(pattern, renamed, name)
    if name.startswith("fc_norm.") and not {"norm.weight", "layernorm.weight"} & state.keys():
        return name.removeprefix("fc_")  # final norm of a model trained on the mean of the patch tokens
    return name


def _resolve_prefix_tokens(weights: dict[str, Tensor], path: Path | str, grid: Grid | None) -> None:
    """Give the cls token a position, and the registers (with a distillation token) none: it is added to them."""
    distillation = weights.pop("dist_token", None)
    if distillation is not None and "reg_token" in weights:
        raise UserError(f"{path} has a distillation token and registers, which is not supported. Pass another file.")
    registers = weights.pop("reg_token", None) if distillation is None else distillation
    positions = weights.get("pos_embed")
    if positions is not None:
        num_registers = 0 if registers is None else registers.shape[1]
        for prefix in dict.fromkeys((1, 0, 1 + num_registers)):  # tokens with a position
            if _grid_of(positions.shape[1] - prefix, grid) is not None:
                break
        else:
            raise UserError(f"{path} has {positions.shape[1]} positions, not a square grid. Pass another file.")
        if prefix == 0:  # DeiT-III, timm's no_embed_class
            weights["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)
        elif prefix > 1 and registers is not None:
            registers = registers + positions[:, 1:prefix]
            weights["pos_embed"] = torch.cat([positions[:, :1], positions[:, prefix:]], 1)
    if registers is not None:
        weights["reg_token"] = registers


def _grid_of(patches: int, stated: Grid | None) -> Grid | None:
    """Return rows and columns of so many patches: those stated if they fit, else of a square; None if it is none."""
    if stated is not None and math.prod(stated) == patches:
        return stated
    side = math.isqrt(patches)
    return (side, side) if side**2 == patches else None


def _grid_of_table(offsets: int, stated: Grid | None) -> Grid | None:
    """Return rows and columns of patches of a table with (2 rows - 1) x (2 columns - 1) relative positions."""
    if stated is not None and (2 * stated[0] - 1) * (2 * stated[1] - 1) == offsets:
        return stated
    side = (math.isqrt(offsets) + 1) // 2
    return (side, side) if (2 * side - 1) ** 2 == offsets else None


def to_mae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder's tensors in MAE's form: layer scales are folded into the layers they scale.

    The function is unchanged up to rounding. Raise UserError if the encoder has relative positions, registers or norms
    of queries and keys.
    """
    _require_plain(state, "MAE")
    if any(BIAS_TABLE in name for name in state):
        raise UserError("the encoder has relative positions, which MAE's form lacks. Export it with --form beit.")
    folded = {name: values.clone() for name, values in state.items() if not name.endswith("gamma")}
    for name in state.keys() - folded.keys():
        block, scale = re.findall(r"blocks\.(\d+)\.(.*)", name)[0]
        folded[f"blocks.{block}.{SCALED_LAYERS[scale]}.weight"] *= state[name][:, None]
        folded[f"blocks.{block}.{SCALED_LAYERS[scale]}.bias"] *= state[name]
    return folded


def _require_plain(state: dict[str, Tensor], project: str) -> None:
    """Raise UserError if an encoder has registers or norms of queries and keys, which this project's form lacks."""
    if other := [name for name in state if name == "reg_token" or any(norm in name for norm in QK_NORMS)]:
        raise UserError(f"the encoder has {other[0]}, which {project}'s form lacks. Export it with --form timm.")


def to_beit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder's tensors in BEiT's form, without the bias of the keys, which softmax cancels.

    Raise UserError if the encoder has registers or norms of queries and keys.
    """
    _require_plain(state, "BEiT")
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


def _report(state: dict[str, Tensor], loaded: list[str]) -> dict[str, list[str]]:
    return {"loaded": loaded, "left out": sorted(set(state) - set(loaded))}


def _infer_shape(
    weights: dict[str, Tensor], path: Path | str, heads: int | None, stated: Grid | None = None
) -> EncoderShape:
    """Infer the shape of an encoder from its tensors.

    Raise UserError if a tensor is missing, if one has an unsupported shape, or if the number of heads is unknown.
    """
    depth = 1 + max((int(name.split(".")[1]) for name in weights if name.startswith("blocks.")), default=-1)
    tables = [name for name in weights if BIAS_TABLE in name]
    relative = "none" if not tables else "shared" if tables == [SHARED_TABLE] else "each"
    has_qk_norm = any(QK_NORMS[0] in name for name in weights)
    block_layers = (*BLOCK_LAYERS, *(QK_NORMS if has_qk_norm else ()))
    layers = {f"blocks.{n}.{layer}" for n in range(depth) for layer in block_layers} | {"patch_embed.proj", "norm"}
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")} | {"cls_token"}
    expected |= {f"blocks.{n}.attn.{SHARED_TABLE}" for n in range(depth)} if relative == "each" else set()
    has_layer_scale = any(name.endswith("gamma") for name in weights)
    expected |= {f"blocks.{n}.{scale}" for n in range(depth) for scale in SCALED_LAYERS} if has_layer_scale else set()
    expected |= {"pos_embed"} if not tables else set()
    if missing := sorted(expected - weights.keys()):
        others = f"{missing[0]} is missing, and {len(missing) - 1} more"
        raise UserError(f"{path} is an incomplete encoder: {others}. Pass a complete file.")
    width, projection = weights["cls_token"].shape[-1], weights["patch_embed.proj.weight"]
    channels, patch = projection.shape[1], projection.shape[-1]
    if channels != 3 or projection.shape[-2] != patch:
        problem = f"takes {channels} channels in patches of {projection.shape[-2]} x {patch}"
        raise UserError(f"{path} {problem}; expected RGB images in square patches. Pass another file.")
    hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
    if hidden != 4 * width:
        raise UserError(f"{path} has MLPs of width {hidden}; expected 4 x {width}. Pass another file.")
    if "pos_embed" in weights:
        positions, count = "rowfirst", weights["pos_embed"].shape[1] - 1
        grid = _grid_of(count, stated)
    else:  # a table also has 3 rows of the cls token
        positions, count = "none", len(weights[tables[0]]) - 3
        grid = _grid_of_table(count, stated)
    if grid is None:
        raise UserError(f"{path} has {count} positions, not those of a square grid. Pass another file.")
    if tables:
        heads = weights[tables[0]].shape[1]
    elif has_qk_norm:
        normed = len(weights["blocks.0.attn.q_norm.weight"])
        of_norm = width // normed
        if normed >= width or width % normed or heads not in (None, of_norm):
            problem = f"has norms of queries over {normed} of {width} channels"
            raise UserError(f"{path} {problem}; expected a norm of each attention head. Pass another file.")
        heads = of_norm
    heads = heads or HEADS.get((width, depth))
    if heads is None:
        fix = "Pass --heads to launch/export.py --form ddae, and use its export."
        raise UserError(f"{path} does not tell its number of attention heads (width {width}, depth {depth}). {fix}")
    if heads < 1 or width % heads:
        raise UserError(f"{path} has the width {width}, no multiple of {heads} attention heads. Correct --heads.")
    init = "beit" if tables else "mae"  # of the untrained encoder that evaluations compare with
    layer_scale, registers = 1.0 if has_layer_scale else 0.0, weights.get("reg_token")
    model = (width, depth, heads, (grid[0] * patch, grid[1] * patch), patch, positions, relative, layer_scale, init)
    return EncoderShape(*model, registers=0 if registers is None else registers.shape[1], qk_norm=has_qk_norm)
