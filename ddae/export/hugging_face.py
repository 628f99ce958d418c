"""Write encoders for transformers: a ViT, or with its decoder a ViTMAE, in a folder for from_pretrained().

Names and configs are those of transformers' ViTModel and ViTMAEForPreTraining. No package of theirs is needed.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ddae.atomic import write_json
from ddae.config.pretrain import PretrainConfig
from ddae.data.sampling import CENTRE_FRACTION
from ddae.distributed.checkpoint_format import load_weights
from ddae.errors import UserError
from ddae.export.encoder import newest_checkpoint, write_folder
from ddae.export.published_weights import to_mae
from ddae.method.model import PretrainModel, build_uninitialised_model
from ddae.models.decoder import Decoder
from ddae.models.patches import NORMALISATIONS
from ddae.models.vit import Encoder

BICUBIC = 3  # Pillow's number
BLOCK_NAMES = (  # (this project's name within a block, transformers')
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("attn.proj.", "attention.output.dense."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
)


def write_transformers(
    encoder: Encoder, folder: Path, decoder: Decoder | None = None, mae: PretrainConfig | None = None
):
    """Write config.json, model.safetensors and preprocessor_config.json, atomically.

    `AutoModel.from_pretrained(folder)` gives the tokens of `encoder` as last_hidden_state. decoder, mae: the decoder
    and the settings of an MAE run; then `ViTMAEForPreTraining.from_pretrained(folder)` reads them, too. Raise UserError
    if the encoder has parts that transformers' ViT lacks.
    """
    if encoder.shape.relative_positions != "none":
        raise UserError(
            "the encoder has relative positions, which transformers' ViT lacks. Export it with --form beit."
        )
    state = _encoder_names(to_mae(encoder.state_dict()))
    config = _shape(encoder) | {"model_type": "vit", "architectures": ["ViTModel"]}
    if decoder is not None and mae is not None:
        state = {f"vit.{name}": values for name, values in state.items()} | _decoder_names(decoder)
        config |= {"model_type": "vit_mae", "architectures": ["ViTMAEForPreTraining"], "mask_ratio": mae.mask.ratio}
        config |= {"norm_pix_loss": mae.pixel.norm != "none", "decoder_hidden_size": mae.pixel.decoder_width}
        config |= {"decoder_num_hidden_layers": mae.pixel.decoder_depth}
        config |= {"decoder_num_attention_heads": mae.pixel.decoder_heads}
        config |= {"decoder_intermediate_size": 4 * mae.pixel.decoder_width}
    write_folder(folder, "model.safetensors", state, config)
    write_json(folder / "preprocessor_config.json", _processor(encoder))


def load_mae_decoder(run: Path) -> tuple[Decoder, PretrainConfig] | None:
    """Return the decoder and settings of a run of MAE, as transformers' ViTMAE has them; None for any other path.

    ViTMAE takes square images only.
    """
    checkpoint = newest_checkpoint(run) if (run / "config.json").exists() and (run / "checkpoints").is_dir() else None
    if checkpoint is None:
        return None
    config = PretrainConfig.read(run / "config.json")
    pixel = config.pixel
    is_last = pixel.taps == (config.model.depth,) and list(config.branches) == ["pixel"]
    is_square = isinstance(config.model.image_size, int)
    if not is_last or not is_square or pixel.cross_attention or pixel.decoder_positions != "all" or pixel.per_tap_norm:
        return None
    model: PretrainModel = build_uninitialised_model(config)
    load_weights(checkpoint, "weight", model)
    decoder = model.branches["pixel"].decoder
    assert isinstance(decoder, Decoder)
    return decoder, config


def _shape(encoder: Encoder) -> dict[str, Any]:
    shape = encoder.shape
    sizes = {"hidden_size": shape.width, "num_hidden_layers": shape.depth, "num_attention_heads": shape.heads}
    sizes |= {"intermediate_size": 4 * shape.width, "image_size": shape.image_size, "patch_size": shape.patch_size}
    return sizes | {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True, "num_channels": 3}


def _processor(encoder: Encoder) -> dict[str, Any]:
    """Return the settings of an image processor whose crop is that of evaluations, if the images are square."""
    mean, std = NORMALISATIONS[encoder.normalisation]
    height, width = encoder.shape.height_width
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(max(height, width) / CENTRE_FRACTION)},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def _encoder_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an encoder's tensors, without layer scale, under transformers' names."""
    renamed = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.position_embeddings": state["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    return renamed | _block_names(state, "encoder.layer")


def _decoder_names(decoder: Decoder) -> dict[str, Tensor]:
    """Return a decoder's tensors under transformers' names."""
    state = {name: values.detach() for name, values in decoder.state_dict().items()}
    renamed = {"mask_token": state["mask_token"], "decoder_pos_embed": decoder.pos_embed}
    for name, other in (("embed", "decoder_embed"), ("norm", "decoder_norm"), ("head", "decoder_pred")):
        renamed |= {f"{other}.{kind}": state[f"{name}.{kind}"] for kind in ("weight", "bias")}
    renamed |= _block_names(state, "decoder_layers")
    return {f"decoder.{name}": values.clone() for name, values in renamed.items()}


def _block_names(state: dict[str, Tensor], layers: str) -> dict[str, Tensor]:
    """Return the tensors of all blocks under transformers' names. layers: their name of the list of blocks."""
    renamed = {}
    for name, values in state.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.*)", name)
        if match is None:
            continue
        rest = match[2]
        if rest.startswith("attn.qkv."):
            parts = zip(("query", "key", "value"), values.chunk(3), strict=True)
            new = {f"attention.attention.{part}.{rest[len('attn.qkv.') :]}": each.clone() for part, each in parts}
        else:
            for ours, theirs in BLOCK_NAMES:
                rest = rest.replace(ours, theirs)
            new = {rest: values}
        renamed |= {f"{layers}.{match[1]}.{key}": each for key, each in new.items()}
    return renamed
