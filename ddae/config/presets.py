"""Presets: named experiments, METHOD_vit_SIZE_EPOCHSe, demo or own. Variants of an experiment are fields, not presets.

ddae_vit_b16_100e            the paper's main model and the default
dds_mae_vit_s16_100e         deep dynamic supervision on MAE, the paper's ablations
"""

import difflib
from collections.abc import Callable
from dataclasses import replace

from ddae.config.base import OptimConfig, TrainConfig
from ddae.config.own import Images, own
from ddae.config.pretrain import (
    DataConfig,
    DynamicConfig,
    FeatureConfig,
    MaskConfig,
    ModelConfig,
    PixelConfig,
    PretrainConfig,
    PretrainEngineConfig,
    TeacherConfig,
    TokenConfig,
)
from ddae.errors import UserError

SIZES = {  # width, depth, heads, pixels a side of a patch
    "s16": (384, 12, 6, 16),
    "b16": (768, 12, 12, 16),
    "l16": (1024, 24, 16, 16),
    "h14": (1280, 32, 16, 14),
}
EPOCHS = (100, 300, 800)


def ddae(size: str, epochs: int) -> PretrainConfig:
    """Both branches at four taps, dynamic; block masks. Paper Table 1: ViT-B 83.5 (100 epochs), 84.3 (800)."""
    width, depth, heads, patch = SIZES[size]
    taps = (depth // 4, depth // 2, depth * 3 // 4, depth)
    return PretrainConfig(
        model=ModelConfig(width=width, depth=depth, heads=heads, patch_size=patch),
        pixel=PixelConfig(taps=taps),
        feature=FeatureConfig(taps=taps, decoder_width=width, decoder_heads=heads),
        optim=OptimConfig(warmup_epochs=warmup_epochs(epochs)),
        train=TrainConfig(epochs=epochs),
    )


def bootmae(size: str, epochs: int) -> PretrainConfig:
    """BootMAE: both branches at the last block, not dynamic; decoders cross-attend to early blocks. Paper Table 1:
    ViT-B 83.0 (100 epochs)."""
    config = ddae(size, epochs)
    last = {"taps": config.pixel.taps[-1:], "tap_weights": (1.0,), "dynamic": False}
    last |= {"cross_attention": True, "decoder_positions": "masked"}
    return replace(
        config,
        mask=replace(config.mask, neighbour_weight=True),
        pixel=replace(config.pixel, **last),
        feature=replace(config.feature, **last, target_norm="layer"),
        optim=replace(config.optim, decay_mask_tokens=True),
    )


def mae(size: str, epochs: int) -> PretrainConfig:
    """MAE: pixels from the last block, an 8-block decoder, random masks. Paper Table 2: ViT-B 82.9 (300 epochs)."""
    width, depth, heads, patch = SIZES[size]
    return PretrainConfig(
        model=ModelConfig(width=width, depth=depth, heads=heads, patch_size=patch, positions="colfirst", init="mae"),
        mask=MaskConfig(kind="random"),
        pixel=PixelConfig(taps=(depth,), tap_weights=(1.0,), dynamic=False, decoder_depth=8, norm="joint"),
        feature=FeatureConfig(enabled=False),
        data=DataConfig(normalisation="imagenet"),
        optim=OptimConfig(warmup_epochs=warmup_epochs(epochs), min_lr=0.0),
        train=TrainConfig(epochs=epochs),
    )


def d_mae(size: str, epochs: int) -> PretrainConfig:
    """MAE with distance weights. Paper Table 3: ViT-S 78.9 (100 epochs)."""
    config = mae(size, epochs)
    return replace(config, pixel=replace(config.pixel, dynamic=True))


def ds_mae(size: str, epochs: int) -> PretrainConfig:
    """MAE with its decoder on four taps. Paper Table 3: ViT-S 79.7 (100 epochs)."""
    config, deep = mae(size, epochs), ddae(size, epochs).pixel
    return replace(config, pixel=replace(config.pixel, taps=deep.taps, tap_weights=deep.tap_weights))


def dds_mae(size: str, epochs: int) -> PretrainConfig:
    """MAE with deep dynamic supervision. Paper Tables 2 and 3: ViT-B 83.2, ViT-S 79.9 (100 epochs)."""
    config = ds_mae(size, epochs)
    return replace(config, pixel=replace(config.pixel, dynamic=True))


def beitv2(size: str, epochs: int) -> PretrainConfig:
    """BEiT-v2: the codes of masked patches from all tokens, 75 of 196 of them mask tokens. Paper Table 2: ViT-B 83.9
    (100 epochs). Its colour jitter of 0.4 is not implemented."""
    width, depth, heads, patch = SIZES[size]
    return PretrainConfig(
        model=ModelConfig(
            *(width, depth, heads),
            patch_size=patch,
            positions="none",
            relative_positions="shared",
            layer_scale=0.1,
            init="beit",
        ),
        mask=MaskConfig(kind="beit_block", ratio=75 / 196, use_mask_token=True),
        pixel=PixelConfig(enabled=False),
        feature=FeatureConfig(enabled=False),
        token=TokenConfig(enabled=True, taps=(depth,), tap_weights=(1.0,), dynamic=False, cls_block=depth * 3 // 4),
        data=DataConfig(normalisation="imagenet", batch_size=2048),
        optim=OptimConfig(base_lr=1.5e-3 / 8, min_lr=1e-5, warmup_epochs=10.0, adam_betas=(0.9, 0.98), clip_grad=3.0),
        train=TrainConfig(epochs=epochs),
    )


def dds_beitv2(size: str, epochs: int) -> PretrainConfig:
    """BEiT-v2 with deep dynamic supervision. Paper Table 2: ViT-B 84.1 (100 epochs)."""
    config, deep = beitv2(size, epochs), ddae(size, epochs).pixel
    return replace(config, token=replace(config.token, taps=deep.taps, tap_weights=deep.tap_weights, dynamic=True))


def demo() -> PretrainConfig:
    """`make demo`: a tiny DDAE on small photographs, minutes on two CPU cores.

    So few steps need their own settings: small batches, for more steps; a teacher with a half-life of 69 steps;
    betas with four times the learning rate and less L2; many narrow heads, which find neighbouring patches sooner;
    plain pixels as targets, for normalised patches take far longer to learn. fp32: a CPU without bf16 instructions
    multiplies a hundred times more slowly in bf16.
    """
    branch = {"taps": (2, 4, 6, 8), "decoder_depth": 1, "decoder_width": 96, "decoder_heads": 8}
    return PretrainConfig(
        model=ModelConfig(width=96, depth=8, heads=6, image_size=64, patch_size=8),
        pixel=PixelConfig(**branch, norm="none"),
        feature=FeatureConfig(**branch),
        dynamic=DynamicConfig(lr_mult=4.0, beta_l2=0.01),
        teacher=TeacherConfig(momentum=0.99),
        data=DataConfig(train="data/demo", batch_size=16, workers=1),
        optim=OptimConfig(lr=3e-3, min_lr=1e-4, warmup_epochs=0.5),
        train=TrainConfig(epochs=9, log_every=20, save_every=500),
        engine=PretrainEngineConfig(precision="fp32"),
    )


def warmup_epochs(epochs: int) -> float:
    return 20.0 if epochs <= 100 else 40.0


def names() -> list[str]:
    """Return the names of all presets."""
    return [
        "own",
        "demo",
        *(f"{method}_vit_{size}_{epochs}e" for method in METHODS for size in SIZES for epochs in EPOCHS),
    ]


def preset(name: str) -> PretrainConfig:
    """Return the experiment of that name. Raise UserError with the nearest name if there is none."""
    if name not in names():
        nearest = difflib.get_close_matches(name, names(), 1, 0)[0]
        raise UserError(f"unknown preset {name!r}; the nearest is {nearest!r}. README.md lists all presets.")
    if name == "own":  # commands/pretrain.py replaces these settings by those for the data set
        return own(Images(0, 0), has_gpu=False)
    if name == "demo":
        return replace(demo(), preset=name)
    method, _, scale = name.partition("_vit_")
    size, epochs = scale.split("_")
    return replace(METHODS[method](size, int(epochs.removesuffix("e"))), preset=name)


METHODS: dict[str, Callable[[str, int], PretrainConfig]] = {
    "ddae": ddae,
    "bootmae": bootmae,
    "mae": mae,
    "d_mae": d_mae,
    "ds_mae": ds_mae,
    "dds_mae": dds_mae,
    "beitv2": beitv2,
    "dds_beitv2": dds_beitv2,
}
