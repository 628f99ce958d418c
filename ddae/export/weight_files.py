"""Read the tensors of an encoder from a file or a snapshot folder of another project, without running code in them.

A file may nest its state dict in containers (`{"model": ..., "model_ema": ...}`), and its names may have prefixes
(`module.backbone.`). A snapshot is a folder of transformers or timm: config.json beside the weights.
"""

import argparse
import codecs
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ddae.config.base import ImageSize
from ddae.errors import UserError, one_line
from ddae.models.patches import NORMALISATIONS

# Names under which files nest their state dict, in the order of preference.
CONTAINERS = ("model", "state_dict", "module", "teacher", "student", "model_ema", "state_dict_ema", "ema")
PREFIXES = {  # parts of the names of an encoder's tensors, before its own
    *("module", "backbone", "encoder", "_orig_mod", "model", "teacher", "student", "base_encoder", "vit", "deit"),
    *("dinov2", "dinov2_with_registers", "beit", "net", "network", "online"),
}
CLS_TOKEN = re.compile(r"(?P<prefix>(?:\w+\.)*?)(?:embeddings\.)?cls_token")  # of an encoder; transformers nests it
TOP_LEVEL = "the top level"  # of a file, where there are containers, too
MOCO_HEADS = 12  # of MoCo-v3's ViT-S and ViT-B
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a snapshot
SNAPSHOT_FIX = "Pass the folder with config.json and model.safetensors, or a file of weights."
SCALAR: Any = np.float64(0).__reduce__()[0]  # what a pickled NumPy number is made with
ALLOWED = [  # in pickled files, besides tensors
    argparse.Namespace,  # MAE's files hold their command line
    (SCALAR, "numpy.core.multiarray.scalar"),
    (SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")),
    (codecs.encode, "_codecs.encode"),
]


TIMM_OPTIONS = {  # options of timm's ViTs that the tensors show, or that do not change the features
    *("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "qk_norm", "init_values"),
    *(
        "class_token",
        "reg_tokens",
        "no_embed_class",
        "global_pool",
        "num_classes",
        "in_chans",
        "fc_norm",
        "weight_init",
    ),
    *(
        "weight_init",
        "dynamic_img_size",
        "drop_rate",
        "drop_path_rate",
        "pos_drop_rate",
        "patch_drop_rate",
        "proj_drop_rate",
    ),
    *("attn_drop_rate", "use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias", "norm_eps", "layer_norm_eps"),
}
MAX_NORM_EPS = 1e-5  # of LayerNorms; ours is 1e-6, and smaller ones make no difference


class EncoderFile(NamedTuple):
    """The tensors of one encoder under the names of the project that wrote it."""

    state: dict[str, Tensor]
    heads: int | None  # attention heads, if the file or the snapshot states them
    normalisation: str | None  # of the images, if the snapshot states it
    image_size: ImageSize | None  # if the file or the snapshot states it
    source: str  # which of several state dicts was taken, "" if there is one


def read_encoder_file(path: Path, key: str = "") -> EncoderFile:
    """Read a file or a snapshot folder.

    key: of the state dict to take, such as "model_ema" or "teacher.backbone"; "": the preferred one. Raise UserError if
    there is no encoder, or if there are several without a preferred one.
    """
    config: dict[str, Any] = {}
    if path.is_dir():
        config, content = _read_snapshot(path)
    else:
        content = read_file(path)
        if (path.suffix == ".safetensors" or path.name in WEIGHTS) and (path.parent / "config.json").exists():
            config = _read_config(path.parent)
    container, state, others = _unwrap(content, key, path)
    prefix, state, other_encoders = _without_prefix(state, key.removeprefix(container).lstrip("."), path)
    taken = ".".join(part for part in (container, prefix) if part) or TOP_LEVEL
    others += other_encoders
    stated = content.get("heads") if isinstance(content, dict) else None  # in our own files
    if not isinstance(stated, int):
        is_moco = isinstance(content, dict) and content.get("arch") == "vit_small"  # MoCo-v3's ViT-S has 12 heads
        stated = MOCO_HEADS if is_moco or "base_encoder" in prefix else _heads(config, path)
    source = f"{taken}, not {', '.join(others)} (--key selects)" if others else ""
    image_size = _image_size(content.get("image_size") if isinstance(content, dict) else None, config)
    return EncoderFile(state, stated, _normalisation(config, path), image_size, source)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return all tensors of the preferred state dict of a file. Raise UserError if the file cannot be read."""
    return _unwrap(read_file(path), "", path)[1]


def read_file(path: Path) -> Any:
    """Load a file. Pickled files are loaded with weights_only: tensors, NumPy numbers and argparse.Namespace only.

    Raise UserError if the file cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError) as error:
        reason, fix = "cannot be read as weights", "Pass a .pth or .safetensors file."
        raise UserError(f"{path} {reason}: {one_line(error)}. {fix}") from None
    except Exception as error:  # pickle raises its own for objects that are not allowed
        reason, fix = "holds more than tensors, which could run code", "Pass a file that holds only a state dict."
        found = re.search(r"(?:GLOBAL|Unsupported class|type) ([\w.]+)", str(error))
        raise UserError(f"{path} {reason}: {found[1] if found else one_line(error, 150)}. {fix}") from None


def is_snapshot(path: Path) -> bool:
    """Return whether a folder is a snapshot of transformers or timm."""
    config = _read_config(path) if (path / "config.json").exists() else {}
    return "model_type" in config or "architecture" in config


def _read_snapshot(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a snapshot's config and tensors."""
    for name in WEIGHTS:
        parts = [path / name]
        if (index := path / f"{name}.index.json").exists():  # in several files
            try:
                parts = [path / part for part in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                raise UserError(f"{index} does not name the files of the weights. {SNAPSHOT_FIX}") from None
            if not parts:
                raise UserError(f"{index} names no file. {SNAPSHOT_FIX}")
        if parts[0].exists():
            content = {}
            for part in parts:
                content |= read_file(part)
            return _read_config(path), content
    raise UserError(f"{path} has none of {', '.join(WEIGHTS)}. {SNAPSHOT_FIX}")


def _read_config(folder: Path) -> dict[str, Any]:
    """Return a snapshot's config. Raise UserError if it is damaged, or for an activation other than GELU."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/config.json cannot be read ({one_line(error)}). {SNAPSHOT_FIX}") from None
    if not isinstance(config, dict):
        return {}
    options = config.get("model_args") or {}
    if not isinstance(options, dict):
        raise UserError(f"{folder}/config.json has model_args = {options!r}; expected an object. {SNAPSHOT_FIX}")
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise UserError(f"{folder} is an encoder with the activation {activation!r}; expected 'gelu'. Pass another.")
    if unknown := sorted(options.keys() - TIMM_OPTIONS):
        problem = f"is an encoder with {unknown[0]} = {options[unknown[0]]!r}"
        raise UserError(f"{folder} {problem}, which would change the features and is not supported. Pass another.")
    for eps in (config.get("layer_norm_eps"), options.get("norm_eps"), options.get("layer_norm_eps")):
        if isinstance(eps, (int, float)) and eps > MAX_NORM_EPS:
            problem = f"has LayerNorms with an epsilon of {eps}; expected at most {MAX_NORM_EPS}"
            raise UserError(f"{folder} {problem}. Pass another.")
    return config


def _heads(config: dict[str, Any], path: Path) -> int | None:
    """Return the attention heads that a snapshot's config states."""
    options = config.get("model_args") or {}
    if heads := config.get("num_attention_heads") or options.get("num_heads"):
        if not isinstance(heads, int):
            raise UserError(
                f"{path} has a config.json with {heads!r} attention heads; expected a number. {SNAPSHOT_FIX}"
            )
        return heads
    if architecture := config.get("architecture"):
        import timm

        try:
            with torch.device("meta"):
                model: Any = timm.create_model(architecture, **options)
                return int(model.blocks[0].attn.num_heads)
        except Exception as error:  # timm raises many types for architectures that it does not know or that are no ViT
            problem = f"is a {architecture}, which timm does not build as a Vision Transformer ({one_line(error)})"
            raise UserError(f"{path} {problem}. Pass a file of a ViT encoder.") from None
    return None


def _image_size(stated: Any, config: dict[str, Any]) -> ImageSize | None:
    """Return the image size that a file or a snapshot's config states: of this project, transformers or timm."""
    options, data = config.get("model_args") or {}, config.get("pretrained_cfg") or {}
    of_input = (data.get("input_size") or [0])[1:]
    for each in (stated, config.get("image_size"), options.get("img_size"), of_input):
        sides = [each, each] if isinstance(each, int) else each
        if isinstance(sides, (list, tuple)) and len(sides) == 2 and all(isinstance(side, int) for side in sides):
            return int(sides[0]), int(sides[1])
    return None


def _normalisation(config: dict[str, Any], path: Path) -> str | None:
    """Return the name of the normalisation of images that a snapshot states, None if it states none.

    Raise UserError for one that has no name here.
    """
    stated = config.get("pretrained_cfg") or {}  # timm's; transformers' is in another file
    folder = path if path.is_dir() else path.parent
    processor = folder / "preprocessor_config.json"
    if "model_type" in config and processor.exists():
        try:
            images = json.loads(processor.read_text())
            stated = {"mean": images.get("image_mean"), "std": images.get("image_std")}
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{processor} cannot be read ({one_line(error)}). {SNAPSHOT_FIX}") from None
    mean, std = stated.get("mean"), stated.get("std")
    if not mean or not std:
        return None
    for name, known in NORMALISATIONS.items():
        if np.allclose([*mean, *std], [*known[0], *known[1]], atol=1e-3):
            return name
    return f"mean {list(mean)}, std {list(std)}"


def _unwrap(content: Any, key: str, path: Path) -> tuple[str, dict[str, Tensor], list[str]]:
    """Return the container's name, its tensors, and the names of other containers. Containers may be nested.

    An encoder beside the containers comes before those in them.
    """
    names, others = [], []
    while isinstance(content, dict):
        found = [str(name) for name, value in content.items() if isinstance(value, dict) and _has_encoder(value)]
        wanted = next((name for name in found if key == name or key.startswith(f"{name}.")), None)
        is_beside = any(str(name).endswith("cls_token") and isinstance(v, Tensor) for name, v in content.items())
        taken = wanted or (None if is_beside else next((name for name in CONTAINERS if name in found), None))
        if taken is None:
            others += found
            break
        others += [name for name in found if name != taken]
        names.append(taken)
        content = content[taken]
        key = key.removeprefix(taken).lstrip(".")
    state = {n: v for n, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if key and not any(name.startswith(f"{key}.") for name in state):
        known = ", ".join([*names, *others]) or "no containers"
        raise UserError(f"{path} has no {key!r} (--key); it has {known}. Pass one of them, or a prefix of its tensors.")
    return ".".join(names), state, others


def _has_encoder(content: dict[Any, Any]) -> bool:
    """Return whether a dict contains an encoder's cls token, at any depth."""
    nested = any(_has_encoder(value) for value in content.values() if isinstance(value, dict))
    return nested or any(str(name).endswith("cls_token") for name in content)


def _without_prefix(state: dict[str, Tensor], key: str, path: Path) -> tuple[str, dict[str, Tensor], list[str]]:
    """Return the prefix of an encoder's names, its tensors without it, and the prefixes of other encoders."""
    found = {match["prefix"].rstrip(".") for name in state if (match := CLS_TOKEN.fullmatch(name))}
    chosen = {each for each in found if each == key or each.startswith(f"{key}.")} if key else found
    known = {each for each in chosen if set(each.split(".")) <= PREFIXES | {""}}
    candidates = known or chosen
    if not candidates:
        raise UserError(f"{path} is not a Vision Transformer: it has no cls_token. Pass a file of a ViT encoder.")
    if len(candidates) > 1:
        names = ", ".join(sorted(candidates))
        raise UserError(f"{path} has several encoders: {names}. Pass one of them as --key to launch/export.py.")
    (taken,) = candidates
    prefix = f"{taken}." if taken else ""
    tensors = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    return taken, tensors, sorted(each or TOP_LEVEL for each in found - {taken})
