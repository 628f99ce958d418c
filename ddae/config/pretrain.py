"""Every knob of pretraining that can change a result, with what experiment.py has of all experiments.

Defaults are those of `ddae_vit_b16_100e`; presets.py names the other experiments, METHOD.md says why each number is
what it is.
"""

from dataclasses import dataclass, field
from typing import Literal

from ddae.config.base import ANY, RANGES, TINY, EngineConfig, Experiment, ShardsConfig, check_ranges
from ddae.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    width: int = 768  # encoder width D
    depth: int = 12  # encoder blocks
    heads: int = 12  # attention heads
    image_size: int = 224  # pixels a side of a training image
    patch_size: int = 16  # pixels a side of a patch
    positions: Literal["rowfirst", "colfirst", "none"] = "rowfirst"  # what fills the first half of a position
    relative_positions: Literal["none", "shared", "each"] = "none"  # of attention: one table for all blocks, or each's
    layer_scale: float = 0.0  # where learnable factors of what a block adds begin; 0: there are none
    # Initial weights: Xavier-uniform with queries, keys and values as three matrices (BootMAE, MoCo v3) or as one
    # (MAE), or a truncated normal whose residual layers shrink with depth (BEiT).
    init: Literal["bootmae", "mae", "beit"] = "bootmae"


@dataclass(frozen=True)
class MaskConfig:
    kind: Literal["bootmae_block", "beit_block", "random"] = "bootmae_block"  # how masked patches are chosen
    ratio: float = 0.75  # share of patches that is masked
    neighbour_weight: bool = False  # weigh a masked patch by 1 + the masked share of the 3 x 3 around it (BootMAE)
    use_mask_token: bool = (
        False  # the encoder sees a mask token in a masked patch's place (BEiT), instead of nothing (MAE)
    )


@dataclass(frozen=True)
class PixelConfig:
    enabled: bool = True  # rebuild the masked pixels
    taps: tuple[int, ...] = (3, 6, 9, 12)  # encoder blocks whose output is decoded, counted from 1
    tap_weights: tuple[float, ...] = (0.75, 0.75, 0.75, 1.0)  # weight of each tap's loss (lambda)
    dynamic: bool = True  # weigh patches by distance, through the betas
    decoder_depth: int = 2  # decoder blocks
    decoder_width: int = 512  # decoder width
    decoder_heads: int = 16  # decoder attention heads
    norm: Literal["per_channel", "joint", "none"] = "per_channel"  # how a target patch is normalised
    decoder_positions: Literal["all", "masked"] = "all"  # tokens that get positions: all (MAE), mask tokens (BootMAE)
    cross_attention: bool = False  # decoder blocks look at the visible patches as block 1 left them (BootMAE)
    per_tap_norm: bool = False  # each tap but the last has a norm of its own, instead of the encoder's final one
    per_tap_head: bool = False  # each tap has a last layer of its own


@dataclass(frozen=True)
class FeatureConfig:
    enabled: bool = True  # rebuild the teacher's features of the masked patches
    taps: tuple[int, ...] = (3, 6, 9, 12)  # encoder blocks that are decoded, each towards the teacher's same block
    tap_weights: tuple[float, ...] = (0.75, 0.75, 0.75, 1.0)  # weight of each tap's loss (lambda)
    dynamic: bool = True  # weigh patches by distance, through the betas
    decoder_depth: int = 2  # decoder blocks
    decoder_width: int = 768  # decoder width
    decoder_heads: int = 12  # decoder attention heads
    # Normalisation of the teacher's tokens: a LayerNorm of each (BootMAE), the same after each channel is standardised
    # over an image's masked tokens (data2vec 2.0) or over those of the batch, or none.
    target_norm: Literal["layer", "instance_layer", "batch_layer", "none"] = "instance_layer"
    warmup_fraction: float = 0.25  # share of training over which this branch's weight grows from 0 to 1
    decoder_positions: Literal["all", "masked"] = "all"  # tokens that get positions: all (MAE), mask tokens (BootMAE)
    cross_attention: bool = False  # decoder blocks look at the visible patches as the tap left them (BootMAE)
    per_tap_norm: bool = False  # each tap but the last has a norm of its own, instead of the encoder's final one
    per_tap_head: bool = False  # each tap has a last layer of its own


@dataclass(frozen=True)
class TokenConfig:
    enabled: bool = False  # tell the masked patches' codes in a tokenizer's codebook (BEiT-v2)
    taps: tuple[int, ...] = (3, 6, 9, 12)  # encoder blocks whose output tells the codes
    tap_weights: tuple[float, ...] = (0.75, 0.75, 0.75, 1.0)  # weight of each tap's loss (lambda)
    dynamic: bool = True  # weigh patches by distance, through the betas
    tokenizer: str = ""  # folder of train_tokenizer.py, or a published file of BEiT-v2's
    codes: int = 8192  # of the tokenizer's codebook
    cls: bool = True  # tell them from the last cls token and early patches, too, through blocks of their own
    cls_block: int = 9  # encoder block that those patches are taken from
    cls_depth: int = 2  # blocks of their own


@dataclass(frozen=True)
class DynamicConfig:
    beta_init: tuple[float, ...] = (-0.5,)  # where the betas begin: one number for all taps, or one a tap
    learnable: bool = True  # betas learn; otherwise they stay where they begin
    shared: bool = True  # one beta a tap for all branches; otherwise each branch has its own
    distance_norm: Literal["none", "max"] = "none"  # distances in patches, or over the image's largest (Fig. 2)
    rescale_grad: Literal["full", "detach"] = "full"  # gradient through the re-scale's maximum, or not
    weight_norm_coef: float = 0.5  # weight of the norm of the weights (Eq. 6)
    norm_batch: float = 1.0  # images over which that norm is taken: 1 a single one, 256 a flattened batch
    beta_l2: float = 0.05  # L2 decay of the betas, in their gradient
    lr_mult: float = 1.0  # learning rate of the betas over the encoder's
    clamp: tuple[float, float] = (-16.0, 3.0)  # betas are held in this range where they are used


@dataclass(frozen=True)
class TeacherConfig:
    # A constant, or by epoch: "schedule" is BootMAE's (0.999, 0.9999 at epoch 100, 0.99999 at 400), "linear" one line
    # from 0.999 to 0.99999 at epoch 400 (the paper's appendix A as printed).
    momentum: float | Literal["schedule", "linear"] = "schedule"


@dataclass(frozen=True)
class DataConfig(ShardsConfig):
    normalisation: Literal["half", "imagenet"] = "half"  # mean and std of pixels


@dataclass(frozen=True)
class PretrainEngineConfig(EngineConfig):
    """How a step is computed. Nothing here changes what it computes, but for the order of sums."""

    # Decoded at once or, for less memory, one by one and without GELU's output; auto: so on a CPU where they are large.
    tap_execution: Literal["auto", "batched", "sequential"] = "auto"
    skip_unused_tokens: bool = True  # leave out work whose result no loss reads
    decoder_activation_checkpointing: bool = False  # as recompute, but the encoder keeps its activations
    compile: bool = False  # compile encoder, decoders and teacher when training starts
    teacher_stream: bool = False  # on a GPU the teacher beside the student, on a stream of its own


@dataclass(frozen=True)
class PretrainConfig(Experiment):
    """A whole pretraining."""

    preset: str = "ddae_vit_b16_100e"  # named starting point; see README
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    pixel: PixelConfig = field(default_factory=PixelConfig)
    feature: FeatureConfig = field(default_factory=FeatureConfig)
    token: TokenConfig = field(default_factory=TokenConfig)
    dynamic: DynamicConfig = field(default_factory=DynamicConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    engine: PretrainEngineConfig = field(default_factory=PretrainEngineConfig)
    probe_every: float = 0.0  # epochs between k-NN probes on the split val of data.train, from step 0 on; 0: never

    FREE_ON_RESUME = Experiment.FREE_ON_RESUME | {
        *("probe_every", "token.tokenizer", "model.init"),  # a checkpoint replaces initial weights
        *(
            "engine.tap_execution",
            "engine.skip_unused_tokens",
            "engine.decoder_activation_checkpointing",
            "engine.compile",
            "engine.teacher_stream",
        ),
    }

    @property
    def grid(self) -> tuple[int, int]:
        side = self.model.image_size // self.model.patch_size
        return side, side

    @property
    def branches(self) -> dict[str, PixelConfig | FeatureConfig | TokenConfig]:
        """Those that are on, by name."""
        all_of_them = {"pixel": self.pixel, "feature": self.feature, "token": self.token}
        return {name: branch for name, branch in all_of_them.items() if branch.enabled}

    @property
    def num_masked(self) -> int:
        return round(self.mask.ratio * self.grid[0] * self.grid[1])


def check(config: PretrainConfig) -> None:
    """UserError with the field, its value and the mend, where the fields contradict each other."""
    check_ranges(config, PRETRAINING_RANGES)
    model = config.model
    if model.image_size % model.patch_size:
        raise UserError(
            f"model.image_size {model.image_size} is not divisible by model.patch_size {model.patch_size}: "
            f"choose {max(1, model.image_size // model.patch_size) * model.patch_size} or another patch size"
        )
    if model.width % model.heads or model.width % 4:
        raise UserError(f"model.width {model.width} must be a multiple of 4 and of model.heads {model.heads}")
    if not config.mask.use_mask_token and (model.positions == "none" or model.relative_positions != "none"):
        raise UserError(
            f"model.positions {model.positions!r} with model.relative_positions {model.relative_positions!r} is an "
            "encoder that sees all patches: keep sin-cos positions alone, or set --mask.use_mask_token"
        )
    if not 0 < config.num_masked < config.grid[0] * config.grid[1]:
        raise UserError(f"mask.ratio {config.mask.ratio} must leave at least one patch visible and one masked")
    branches = config.branches
    if not branches:
        raise UserError("pixel.enabled, feature.enabled and token.enabled are all off: nothing is left to learn")
    if config.token.enabled and not (config.mask.use_mask_token and len(branches) == 1):
        raise UserError(
            "token.enabled wants an encoder that sees mask tokens, and the other branches one that does not: set "
            "--mask.use_mask_token --pixel.no_enabled --feature.no_enabled"
        )
    if config.mask.use_mask_token and not config.token.enabled:
        raise UserError(
            "mask.use_mask_token is for token.enabled alone: leave it out, or take the preset beitv2_vit_b16_300e"
        )
    for name, branch in branches.items():
        _check_taps(name, branch, model.depth)
    for name, branch in (("pixel", config.pixel), ("feature", config.feature)):
        if branch.enabled and (branch.decoder_width % branch.decoder_heads or branch.decoder_width % 4):
            raise UserError(
                f"{name}.decoder_width {branch.decoder_width} must be a multiple of 4 and of "
                f"{name}.decoder_heads {branch.decoder_heads}"
            )
    if config.token.enabled and config.token.cls and not 1 <= config.token.cls_block < model.depth:
        raise UserError(f"token.cls_block {config.token.cls_block} must be a block before the last, {model.depth}")
    betas, taps = len(config.dynamic.beta_init), len(beta_names(config))
    if taps and betas not in (1, taps):
        raise UserError(f"dynamic.beta_init has {betas} numbers: give 1, or {taps}, one for each dynamic tap")
    for name, (low, high) in {"data.crop_scale": config.data.crop_scale, "dynamic.clamp": config.dynamic.clamp}.items():
        if low > high:
            raise UserError(f"{name} is ({low}, {high}): give the smaller number first")


PRETRAINING_RANGES = {
    **RANGES,
    **dict.fromkeys(("model.width", "model.depth", "model.heads", "model.image_size", "model.patch_size"), (1, ANY)),
    **{f"{b}.decoder_{f}": (1, ANY) for b in ("pixel", "feature") for f in ("depth", "width", "heads")},
    **dict.fromkeys(("token.codes", "token.cls_depth"), (1, ANY)),
    **dict.fromkeys(("pixel.tap_weights", "feature.tap_weights", "token.tap_weights", "model.layer_scale"), (0, ANY)),
    **dict.fromkeys(("feature.warmup_fraction", "mask.ratio"), (0, 1)),
    **dict.fromkeys(("dynamic.beta_init", "dynamic.clamp"), (-ANY, ANY)),
    **dict.fromkeys(("dynamic.weight_norm_coef", "dynamic.beta_l2", "dynamic.lr_mult"), (0, ANY)),
    "dynamic.norm_batch": (TINY, ANY),
    "probe_every": (0, ANY),
    "teacher.momentum": (0, 1 - TINY),
}


def _check_taps(name: str, branch: PixelConfig | FeatureConfig | TokenConfig, depth: int) -> None:
    if not branch.taps or list(branch.taps) != sorted(set(branch.taps)):
        raise UserError(f"{name}.taps {branch.taps} must name blocks in ascending order, each once")
    if branch.taps[0] < 1 or branch.taps[-1] > depth:
        raise UserError(f"{name}.taps {branch.taps} reach outside the encoder: its blocks are 1 to {depth}")
    if len(branch.tap_weights) != len(branch.taps):
        raise UserError(
            f"{name}.tap_weights has {len(branch.tap_weights)} numbers for {len(branch.taps)} taps: give one a tap"
        )


def tap_name(tap: int) -> str:
    """A tap's name in metrics: tap_03."""
    return f"tap_{tap:02d}"


def beta_names(config: PretrainConfig) -> list[str]:
    """One name for each beta: tap_03 where branches share them, pixel/tap_03 where they do not."""
    dynamic = {name: branch for name, branch in config.branches.items() if branch.dynamic}
    if config.dynamic.shared:
        return [tap_name(tap) for tap in sorted({tap for branch in dynamic.values() for tap in branch.taps})]
    return [f"{name}/{tap_name(tap)}" for name, branch in dynamic.items() for tap in branch.taps]
