"""The preset `own`: settings that follow from the number of images, their size, and whether there is a GPU.

docs/results.md has the runs behind the rules for a CPU. Those for a GPU follow the presets of the paper, with longer
training of smaller models on fewer images; they are untested.
"""

import math
from typing import NamedTuple

from ddae.config.base import OptimConfig, TrainConfig
from ddae.config.pretrain import (
    DataConfig,
    DynamicConfig,
    FeatureConfig,
    ModelConfig,
    PixelConfig,
    PretrainConfig,
    PretrainEngineConfig,
    TeacherConfig,
)

FEW_STEPS = 1000  # the shortest runs in docs/results.md; shorter ones were not evaluated
HALF_LIFE = 1 / 8  # of the teacher, in runs
WARMUP = 0.05  # share of the steps in which the learning rate is warmed up
LONG_RUN = 10_000  # steps, from which on the betas keep the paper's learning rate and L2


class Images(NamedTuple):
    """The training images, as far as the rules read them."""

    count: int
    side: int  # median shorter side in pixels; 0: unknown


class Size(NamedTuple):
    """A model and how long it is trained."""

    max_images: float  # the size is for data sets of at most so many images
    width: int
    depth: int
    heads: int
    image_size: int  # pixels a side
    patch_size: int
    decoder_width: int
    decoder_heads: int
    batch_size: int
    lr: float
    epochs: float
    min_steps: int


CPU = Size(math.inf, 96, 8, 6, 64, 8, 96, 8, 16, 3e-3, 10, 2000)
CPU_SMALL_IMAGES = CPU._replace(image_size=32, patch_size=4)  # for images of fewer than SMALL_SIDE pixels
SMALL_SIDE = 48
GPU = (
    Size(20_000, 192, 12, 3, 224, 16, 192, 6, 128, 1e-3, 300, 10_000),
    Size(200_000, 384, 12, 6, 224, 16, 384, 6, 512, 6e-4, 200, 20_000),
    Size(math.inf, 768, 12, 12, 224, 16, 768, 12, 2048, 1.2e-3, 100, 50_000),
)


def own(images: Images, has_gpu: bool) -> PretrainConfig:
    """Return the settings for a data set."""
    size = next(each for each in GPU if images.count <= each.max_images) if has_gpu else CPU
    if not has_gpu and 0 < images.side < SMALL_SIDE:
        size = CPU_SMALL_IMAGES
    steps = max(size.min_steps, round(size.epochs * images.count / size.batch_size))
    branch = {"taps": tuple(size.depth * i // 4 for i in (1, 2, 3, 4)), "decoder_depth": 1}
    branch |= {"decoder_width": size.decoder_width, "decoder_heads": size.decoder_heads}
    epoch_steps = max(1, images.count) / size.batch_size
    short = steps < LONG_RUN
    return PretrainConfig(
        preset="own",
        ds_config="zero2",
        model=ModelConfig(size.width, size.depth, size.heads, size.image_size, size.patch_size),
        pixel=PixelConfig(**branch, norm="joint"),
        feature=FeatureConfig(**branch),
        dynamic=DynamicConfig(lr_mult=4.0, beta_l2=0.01) if short else DynamicConfig(),
        teacher=TeacherConfig(momentum=round(0.5 ** (1 / (HALF_LIFE * steps)), 9)),
        data=DataConfig(batch_size=size.batch_size, workers=None if has_gpu else 1),
        optim=OptimConfig(lr=size.lr, min_lr=size.lr / 30, warmup_epochs=round(WARMUP * steps / epoch_steps, 3)),
        train=TrainConfig(steps=steps, log_every=20, save_every=max(100, min(1000, steps // 4))),
        engine=PretrainEngineConfig(precision="bf16" if has_gpu else "fp32"),
    )


def describe(config: PretrainConfig, images: Images, has_gpu: bool) -> str:
    """Return what was chosen, and a warning where training is too short, as text."""
    model, steps = config.model, config.num_steps(images.count)
    epochs = steps * config.data.batch_size / images.count
    lines = [
        f"preset own: {images.count:,} training images, a {'GPU' if has_gpu else 'CPU'}, {config.ds_config}",
        f"encoder: {model.depth} blocks of width {model.width}, {model.image_size} pixels in patches of "
        f"{model.patch_size}",
        f"training: {steps:,} steps of {config.data.batch_size} images, {epochs:,.1f} epochs",
    ]
    if steps < FEW_STEPS:
        lines.append(f"warning: fewer than {FEW_STEPS:,} steps; shorter training was not evaluated (docs/results.md)")
    return "\n".join(lines)
