"""Settings of segmentation that can change a result, and the recipes by name.

docs/evaluation.md gives the source of each number.
"""

from dataclasses import dataclass, field, replace

from ddae.config.base import (
    ANY,
    RANGES,
    TINY,
    EngineConfig,
    ExperimentType,
    OptimConfig,
    ShardsConfig,
    TrainConfig,
    check_ranges,
)
from ddae.config.evaluation import SMALL, Evaluation, check_encoder, named
from ddae.errors import UserError

ADE20K = 20208  # training images of an epoch, by which the reference's steps are converted to epochs


@dataclass(frozen=True)
class SceneConfig:
    taps: tuple[int, ...] = ()  # blocks, counted from 1, that become the four scales; empty: 4, 6, 8, 12 of 12
    channels: int | None = None  # of the decoder; None: 768, for ViT-S and narrower 512
    layer_decay: float = 0.65  # learning rate of a block over the next block's
    drop_path: float = 0.1  # stochastic depth rate of the last block
    dropout: float = 0.1  # of channels before the classification layer
    aux_weight: float = 0.4  # weight of the auxiliary head's loss, on the third scale
    relative_positions: bool = True  # add relative positions, initially zero, to each block if the encoder has none
    layer_scale: float = 1.0  # initial layer scale if the encoder has none; 0: no layer scale
    scale: tuple[float, float] = (0.5, 2.0)  # range of an image's shorter side over the crop's, in training
    max_share: float = 0.75  # largest share of one class in a crop, if ten draws find such a crop; 1: no limit
    distort: bool = True  # photometric distortion in training
    stride: float = 2 / 3  # stride of the sliding window over its size, in evaluation
    evaluate_every: float = 16000 * 16 / ADE20K  # epochs between evaluations
    classes: int = 0  # number of classes, if the shards do not name them


@dataclass(frozen=True)
class SegmentConfig(Evaluation):
    """The settings of a segmentation run."""

    preset: str = "paper"  # recipe: paper or demo
    seg: SceneConfig = field(default_factory=SceneConfig)

    TASK = "segment"
    UNUSED = frozenset(
        {"engine.loss_backend", "data.crop", "data.crop_scale", "data.hw_decoder_load", "data.in_memory"}
    )

    def resolved_for(self, width: int, depth: int) -> "SegmentConfig":
        """Return the config with blocks and channels for this encoder, unless they are set.

        Raise UserError if the encoder lacks one of the blocks.
        """
        taps = self.seg.taps or tuple(max(1, depth * part // 12) for part in (4, 6, 8, 12))
        if len(taps) != 4 or list(taps) != sorted(taps) or taps[0] < 1 or taps[-1] > depth:
            raise UserError(f"seg.taps is {taps}; expected four blocks from 1 to {depth} in ascending order.")
        channels = self.seg.channels or (512 if width <= SMALL else 768)
        return replace(self, seg=replace(self.seg, taps=taps, channels=channels))


def segment_paper() -> SegmentConfig:
    """The paper's appendix, with BootMAE's settings."""
    return SegmentConfig(
        image_size=512,
        data=ShardsConfig(batch_size=16, remainder="drop"),
        optim=OptimConfig(
            lr=4e-4,
            min_lr=0.0,
            warmup_epochs=1500 * 16 / ADE20K,
            weight_decay=0.05,
            adam_betas=(0.9, 0.999),
            clip_grad=3.0,
        ),
        train=TrainConfig(steps=160_000, log_every=50),
        engine=EngineConfig(precision="autocast"),
    )


def segment_demo() -> SegmentConfig:
    """The encoder of `make demo` on `sample_photos.py --masks`: minutes on two cores."""
    config = segment_paper()
    return replace(
        config,
        image_size=64,
        data=replace(config.data, workers=1),
        optim=replace(config.optim, lr=2e-3, warmup_epochs=1),
        train=replace(config.train, steps=None, epochs=2, log_every=5),
        engine=EngineConfig(precision="fp32"),
        seg=replace(config.seg, channels=32, evaluate_every=1.0, scale=(0.8, 1.25), distort=False),
    )


SEGMENTS = {"paper": segment_paper, "demo": segment_demo}


def segment_recipe(name: str) -> SegmentConfig:
    """Return the segmentation recipe of that name. Raise UserError with the nearest name if there is none."""
    return named(name, SEGMENTS)


SEGMENT_RANGES = {
    **RANGES,
    "image_size": (1, ANY),
    "seg.channels": (1, ANY),
    "seg.layer_decay": (0, 1),
    **dict.fromkeys(("seg.drop_path", "seg.dropout"), (0, 1 - TINY)),
    **dict.fromkeys(("seg.aux_weight", "seg.layer_scale", "seg.classes"), (0, ANY)),
    "seg.max_share": (TINY, 1),
    "seg.stride": (0.25, 1),
    **dict.fromkeys(("seg.scale", "seg.evaluate_every"), (TINY, ANY)),
}


def check_segment(config: SegmentConfig) -> None:
    """Raise UserError if a field is out of range or fields contradict each other."""
    check_ranges(config, SEGMENT_RANGES)
    check_encoder(config)
    if config.seg.scale[0] > config.seg.scale[1]:
        raise UserError(f"seg.scale is {config.seg.scale}; expected the smaller number first.")
    if config.engine.precision == "bf16":
        raise UserError("engine.precision is bf16; bf16 weights are unsupported with BatchNorm. Use autocast or fp32.")
    if config.data.backend not in ("auto", "pillow"):
        raise UserError(f"data.backend is {config.data.backend}, which reads no masks. Pass --data.backend pillow.")


SEGMENTATION = ExperimentType(SegmentConfig, segment_recipe, check_segment)
