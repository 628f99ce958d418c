"""Write encoders in other projects' formats: timm, MAE, BEiT, ONNX, torch.export."""

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddae.data.sampling import CENTRE_FRACTION
from ddae.errors import UserError
from ddae.export.encoder import write_export, write_folder
from ddae.export.hugging_face import write_transformers
from ddae.export.published_weights import to_beit, to_mae
from ddae.models.patches import NORMALISATIONS
from ddae.models.vit import Encoder

TIMM_BIAS_OPTIONS = {"use_rel_pos_bias": "each", "use_shared_rel_pos_bias": "shared"}  # -> model.relative_positions
DYNAMIC_BATCH = {"images": {0: torch.export.Dim("batch")}}  # the batch size of exported programs is not fixed


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
    if shape.relative_positions != "none" and shape.grid[0] != shape.grid[1]:  # timm would resample the tables
        raise UserError(
            "the encoder has relative positions on a grid that is not square, which timm does not read. "
            "Export it with --form beit."
        )
    model_args = {
        "img_size": shape.image_size,
        "patch_size": shape.patch_size,
        "embed_dim": shape.width,
        "depth": shape.depth,
    }
    model_args |= {"num_heads": shape.heads, "init_values": shape.layer_scale or None, "global_pool": pool}
    if shape.registers:  # in timm, too, they follow the cls token; here none of both has a position of its own
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
        model_args |= {"reg_tokens": shape.registers, "no_embed_class": True}
    model_args |= {"qk_norm": True} if shape.qk_norm else {}
    architecture = "vit_base_patch16_224"
    if shape.relative_positions != "none":
        architecture, state = "beit_base_patch16_224", to_beit(state)
        model_args |= {"use_abs_pos_emb": shape.positions != "none"}
        model_args |= {option: shape.relative_positions == value for option, value in TIMM_BIAS_OPTIONS.items()}
    mean, std = NORMALISATIONS[encoder.normalisation]
    data = {"input_size": [3, *shape.height_width], "num_classes": len(classes), "interpolation": "bicubic"}
    data |= {"crop_pct": CENTRE_FRACTION}
    data |= {"mean": mean, "std": std, "first_conv": "patch_embed.proj", "classifier": "head"}
    config = {"architecture": architecture, "num_classes": len(classes), "label_names": list(classes)}
    write_folder(folder, "model.safetensors", state, config | {"model_args": model_args, "pretrained_cfg": data})


def write_mae(encoder: Encoder, file: Path) -> None:
    """Write a file for MAE's own code. Raise UserError if the encoder has parts that MAE's lacks."""
    torch.save({"model": to_mae(encoder.state_dict()), **_facts(encoder)}, file)


def write_beit(encoder: Encoder, file: Path) -> None:
    """Write a file for BEiT's own code. Raise UserError if the encoder has parts that BEiT's lacks."""
    torch.save({"model": to_beit(encoder.state_dict()), **_facts(encoder)}, file)


def _facts(encoder: Encoder) -> dict[str, Any]:
    """Return what an encoder's tensors do not show."""
    size = encoder.shape.image_size
    return {"heads": encoder.shape.heads} | ({} if isinstance(size, int) else {"image_size": size})


def write_onnx(encoder: Encoder, file: Path) -> None:
    """Write an ONNX program: images [B, 3, H, W] -> tokens [B, 1 + N, D], any B.

    Raise UserError if onnx is not installed.
    """
    example = torch.zeros(2, 3, *encoder.shape.height_width)
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
    example = torch.zeros(2, 3, *encoder.shape.height_width)
    torch.export.save(torch.export.export(encoder, (example,), dynamic_shapes=DYNAMIC_BATCH), file)


WRITERS: dict[str, Callable[[Encoder, Path], None]] = {
    "ddae": write_export,
    "timm": write_timm,
    "transformers": write_transformers,
    "mae": write_mae,
    "beit": write_beit,
    "onnx": write_onnx,
    "torch": write_torch_export,
}
