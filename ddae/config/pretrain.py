"""Settings of pretraining that can change a result; base.py has those that all experiments share.

Defaults are those of `ddae_vit_b16_100e`; presets.py names the other experiments, METHOD.md gives the reason for each
number.
"""

from dataclasses import dataclass, field
from typing import Literal

from ddae.config.base import (
    ANY,
    RANGES,
    TINY,
    EngineConfig,
    Experiment,
    ShardsConfig,
    canonical_size,
    check_image_size,
    check_ranges,
    height_width,
)
from ddae.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    width: int = 768  # encoder width D
    depth: int = 12  # encoder blocks
    heads: int = 12  # attention heads
    image_size: int | tuple[int, int] = 224  # pixels of a training image: the side of a square, or height and width
    patch_size: int = 16  # height and width of a patch in pixels
    # Fixed sin-cos positions: what fills their first half; or learned ones, of an encoder of `init`.
    positions: Literal["rowfirst", "colfirst", "learned", "none"] = "rowfirst"
    # Relative positions in attention: one table for all blocks, or one each.
    relative_positions: Literal["none", "shared", "each"] = "none"
    layer_scale: float = 0.0  # initial value of the learnable layer scale; 0: no layer scale
    # Initial weights: Xavier-uniform with queries, keys and values as three matrices (BootMAE, MoCo v3) or as one
    # (MAE), or a truncated normal whose residual layers shrink with depth (BEiT).
    init: Literal["bootmae", "mae", "beit"] = "bootmae"

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", canonical_size(self.image_size))

    @property
    def height_width(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return height_width(self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.height_width
        return height // self.patch_size, width // self.patch_size


@dataclass(frozen=True)
class EncoderShape(ModelConfig):
    """A model's shape, with what encoders of other projects may have in addition."""

    registers: int = 0  # further tokens after the cls token, which the encoder's output lacks (DINOv2, DeiT)
    qk_norm: bool = False  # LayerNorm of the queries and keys of each head


@dataclass(frozen=True)
class MaskConfig:
    kind: Literal["bootmae_block", "beit_block", "random"] = "bootmae_block"  # how masked patches are sampled
    ratio: float = 0.75  # masked patches over all patches
    neighbour_weight: bool = False  # weight a masked patch by 1 + the masked share of its 3 x 3 patches (BootMAE)
    use_mask_token: bool = False  # the encoder sees a mask token for each masked patch (BEiT)


@dataclass(frozen=True)
class BranchConfig:
    """Settings of every branch: which encoder blocks it supervises."""

    enabled: bool = True  # train this branch
    taps: tuple[int, ...] = (3, 6, 9, 12)  # encoder blocks whose output is used, counted from 1
    tap_weights: tuple[float, ...] = (0.75, 0.75, 0.75, 1.0)  # weight of each tap's loss (lambda)
    dynamic: bool = True  # weight patches by distance, through the betas


@dataclass(frozen=True)
class DecoderBranchConfig(BranchConfig):
    """Settings of a branch with a decoder."""

    decoder_depth: int = 2  # decoder blocks
    decoder_width: int = 768  # decoder width
    decoder_heads: int = 12  # attention heads of the decoder
    decoder_positions: Literal["all", "masked"] = "all"  # tokens that get positions: all (MAE), mask tokens (BootMAE)
    cross_attention: bool = False  # decoder blocks cross-attend to the visible patches (BootMAE)
    per_tap_norm: bool = False  # each tap but the last has its own norm instead of the encoder's final one
    per_tap_head: bool = False  # each tap has its own last layer


@dataclass(frozen=True)
class PixelConfig(DecoderBranchConfig):
    """Reconstruct the masked pixels. Cross-attention is to the visible patches after block 1."""

    decoder_width: int = 512  # decoder width
    decoder_heads: int = 16  # attention heads of the decoder
    norm: Literal["per_channel", "joint", "none"] = "per_channel"  # normalisation of a target patch


@dataclass(frozen=True)
class FeatureConfig(DecoderBranchConfig):
    """Regress the teacher's features of the masked patches. Cross-attention is to the visible patches after the tap."""

    # Normalisation of the teacher's tokens: a LayerNorm of each (BootMAE), the same after each channel is standardised
    # over an image's masked tokens (data2vec 2.0) or over those of the batch, or none.
    target_norm: Literal["layer", "instance_layer", "batch_layer", "none"] = "instance_layer"
    warmup_fraction: float = 0.25  # share of training over which this branch's weight grows from 0 to 1


@dataclass(frozen=True)
class TokenConfig(BranchConfig):
    """Predict the masked patches' codes in a tokenizer's codebook (BEiT-v2)."""

    enabled: bool = False  # train this branch
    tokenizer: str = ""  # run directory of train_tokenizer.py, or a published file of BEiT-v2
    codes: int = 8192  # size of the tokenizer's codebook
    cls: bool = True  # predict them from the last cls token and early patches, too, through extra blocks
    cls_block: int = 9  # encoder block that those patches are taken from
    cls_depth: int = 2  # number of extra blocks


@dataclass(frozen=True)
class DynamicConfig:
    beta_init: tuple[float, ...] = (-0.5,)  # initial betas: one number for all taps, or one a tap
    learnable: bool = True  # betas are trained; otherwise they are constant
    shared: bool = True  # one beta a tap for all branches; otherwise one a tap and branch
    distance_norm: Literal["none", "max"] = "none"  # distances in patches, or divided by the image's largest (Fig. 2)
    rescale_grad: Literal["full", "detach"] = "full"  # gradient through the re-scale's maximum, or not
    weight_norm_coef: float = 0.5  # coefficient of the norm of the weights (Eq. 6)
    norm_batch: float = 1.0  # images over which that norm is taken: 1, or 256 for a flattened batch
    beta_l2: float = 0.05  # L2 decay of the betas, in their gradient
    lr_mult: float = 1.0  # learning rate of the betas over the encoder's
    clamp: tuple[float, float] = (-16.0, 3.0)  # range to which betas are clamped in the loss


@dataclass(frozen=True)
class TeacherConfig:
    # Constant, or scheduled by epoch: "schedule" is BootMAE's (0.999, 0.9999 at epoch 100, 0.99999 at 400), "linear" a
    # line from 0.999 to 0.99999 at epoch 400 (the paper's appendix A as printed).
    momentum: float | Literal["schedule", "linear"] = "schedule"


@dataclass(frozen=True)
class DataConfig(ShardsConfig):
    normalisation: Literal["half", "imagenet"] = "half"  # mean and standard deviation of pixels


@dataclass(frozen=True)
class PretrainEngineConfig(EngineConfig):
    """How a step is computed. Nothing here changes its result, except for the order of sums."""

    # Taps are decoded as one batch, or one by one for less memory; auto: sequential on a CPU if they are large.
    tap_execution: Literal["auto", "batched", "sequential"] = "auto"
    skip_unused_tokens: bool = True  # do not compute outputs that no loss reads
    direct_calls: bool = True  # call the functions of a block's layers, without their modules' hooks; not at ZeRO-3
    # At ZeRO 1 and 2: lean fills a bucket of gradients by one launch and waits for its sum on the device; deepspeed is
    # DeepSpeed's own. auto: lean on a CPU, deepspeed on a GPU, where lean is not measured yet.
    gradient_reduction: Literal["auto", "lean", "deepspeed"] = "auto"
    decoder_activation_checkpointing: bool = False  # activation checkpointing of the decoders alone
    compile: bool = False  # torch.compile encoder (in segments from tap to tap), decoders and teacher
    teacher_stream: bool = False  # run the teacher on its own CUDA stream, beside the student
    teacher_graph: bool = False  # run the teacher as a CUDA graph
    # Run what compile compiles of encoder and decoders as CUDA graphs; at ZeRO 1 and 2, with one micro-batch a step.
    student_graphs: bool = False


@dataclass(frozen=True)
class PretrainConfig(Experiment):
    """The settings of a pretraining run."""

    preset: str = "ddae_vit_b16_100e"  # named starting point; see README
    init: str = ""  # encoder that student and teacher start from: a run, an export, a published file, or timm:NAME
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    pixel: PixelConfig = field(default_factory=PixelConfig)
    feature: FeatureConfig = field(default_factory=FeatureConfig)
    token: TokenConfig = field(default_factory=TokenConfig)
    dynamic: DynamicConfig = field(default_factory=DynamicConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    engine: PretrainEngineConfig = field(default_factory=PretrainEngineConfig)
    taps_per_step: int = 0  # taps that a branch with a decoder supervises in a step, drawn at random; 0: all
    decode_fraction: float = 1.0  # share of an image's masked patches that the decoders predict, drawn at random
    probe_every: float = 0.0  # epochs between k-NN evaluations on split val of data.train, from step 0 on; 0: never

    FREE_ON_RESUME = Experiment.FREE_ON_RESUME | {
        *("probe_every", "token.tokenizer", "model.init", "init"),  # a checkpoint replaces initial weights
        *("engine.tap_execution", "engine.skip_unused_tokens", "engine.decoder_activation_checkpointing"),
        *("engine.compile", "engine.teacher_stream", "engine.teacher_graph", "engine.direct_calls"),
        *("engine.student_graphs", "engine.gradient_reduction"),
    }

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.model.grid

    @property
    def branches(self) -> dict[str, BranchConfig]:
        """The enabled branches by name."""
        branches: dict[str, BranchConfig] = {"pixel": self.pixel, "feature": self.feature, "token": self.token}
        return {name: branch for name, branch in branches.items() if branch.enabled}

    @property
    def num_masked(self) -> int:
        """Masked patches of an image."""
        return round(self.mask.ratio * self.grid[0] * self.grid[1])

    @property
    def num_decoded(self) -> int:
        """Masked patches of an image that the decoders predict."""
        return max(1, round(self.decode_fraction * self.num_masked))

    def num_step_taps(self, branch: BranchConfig) -> int:
        """Return how many taps of a branch with a decoder a step supervises."""
        return min(self.taps_per_step or len(branch.taps), len(branch.taps))


def check(config: PretrainConfig) -> None:
    """Raise UserError if a field is out of range or fields contradict each other."""
    check_ranges(config, PRETRAINING_RANGES)
    model = config.model
    check_image_size("model.image_size", model.image_size, model.patch_size)
    if model.width % model.heads or model.width % 4:
        raise UserError(f"model.width is {model.width}; expected a multiple of 4 and of model.heads {model.heads}.")
    if not config.mask.use_mask_token and (model.positions == "none" or model.relative_positions != "none"):
        raise UserError(
            f"model.positions {model.positions!r} with model.relative_positions {model.relative_positions!r} needs an "
            "encoder that sees all patches. Use sin-cos positions alone, or pass --mask.use_mask_token."
        )
    if not 0 < config.num_masked < config.grid[0] * config.grid[1]:
        raise UserError(f"mask.ratio is {config.mask.ratio}; at least one patch must be visible and one masked.")
    branches = config.branches
    if not branches:
        raise UserError("pixel.enabled, feature.enabled and token.enabled are all off. Enable at least one branch.")
    if config.token.enabled and not (config.mask.use_mask_token and len(branches) == 1):
        raise UserError(
            "token.enabled needs an encoder with mask tokens, which the other branches do not support. "
            "Pass --mask.use_mask_token --pixel.no_enabled --feature.no_enabled."
        )
    if config.mask.use_mask_token and not config.token.enabled:
        raise UserError(
            "mask.use_mask_token is for token.enabled alone. Leave it out, or use the preset beitv2_vit_b16_300e."
        )
    if config.token.enabled and (config.taps_per_step or config.decode_fraction < 1):
        raise UserError(
            "taps_per_step and decode_fraction are for branches with a decoder, but token.enabled is set. "
            "Leave out --taps_per_step and --decode_fraction."
        )
    if config.engine.teacher_graph and config.num_step_taps(config.feature) < len(config.feature.taps):
        raise UserError(
            f"engine.teacher_graph needs the same taps in every step, but taps_per_step {config.taps_per_step} draws "
            "them. Leave out one of the two."
        )
    if config.engine.student_graphs and not config.engine.compile:
        raise UserError("engine.student_graphs needs compiled modules. Pass --engine.compile, too.")
    for name, branch in branches.items():
        _check_taps(name, branch, model.depth)
        own = isinstance(branch, DecoderBranchConfig) and (branch.per_tap_norm or branch.per_tap_head)
        if own and config.num_step_taps(branch) < len(branch.taps):
            raise UserError(
                f"taps_per_step is {config.taps_per_step}, but {name} has a norm or a head of its own per tap, which "
                f"would have no gradient in most steps. Leave out --{name}.per_tap_norm and --{name}.per_tap_head."
            )
    for name, branch in (("pixel", config.pixel), ("feature", config.feature)):
        if branch.enabled and (branch.decoder_width % branch.decoder_heads or branch.decoder_width % 4):
            raise UserError(
                f"{name}.decoder_width is {branch.decoder_width}; expected a multiple of 4 and of "
                f"{name}.decoder_heads {branch.decoder_heads}."
            )
    if config.token.enabled and config.token.cls and not 1 <= config.token.cls_block < model.depth:
        raise UserError(f"token.cls_block is {config.token.cls_block}; expected a block from 1 to {model.depth - 1}.")
    betas, taps = len(config.dynamic.beta_init), len(beta_names(config))
    if taps and betas not in (1, taps):
        raise UserError(f"dynamic.beta_init has {betas} numbers; expected 1, or {taps}: one for each dynamic tap.")
    for name, (low, high) in {"data.crop_scale": config.data.crop_scale, "dynamic.clamp": config.dynamic.clamp}.items():
        if low > high:
            raise UserError(f"{name} is ({low}, {high}); expected the smaller number first.")


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
    **dict.fromkeys(("probe_every", "taps_per_step"), (0, ANY)),
    "decode_fraction": (TINY, 1),
    "teacher.momentum": (0, 1 - TINY),
}


def _check_taps(name: str, branch: BranchConfig, depth: int) -> None:
    if not branch.taps or list(branch.taps) != sorted(set(branch.taps)):
        raise UserError(f"{name}.taps is {branch.taps}; expected encoder blocks in ascending order, each once.")
    if branch.taps[0] < 1 or branch.taps[-1] > depth:
        raise UserError(f"{name}.taps is {branch.taps}; expected encoder blocks from 1 to {depth}.")
    if len(branch.tap_weights) != len(branch.taps):
        raise UserError(
            f"{name}.tap_weights has {len(branch.tap_weights)} numbers; expected {len(branch.taps)}: one for each tap."
        )


def tap_name(tap: int) -> str:
    """Return a tap's name in metrics: tap_03."""
    return f"tap_{tap:02d}"


def beta_names(config: PretrainConfig) -> list[str]:
    """Return one name for each beta: tap_03 if branches share them, otherwise pixel/tap_03."""
    dynamic = {name: branch for name, branch in config.branches.items() if branch.dynamic}
    if config.dynamic.shared:
        return [tap_name(tap) for tap in sorted({tap for branch in dynamic.values() for tap in branch.taps})]
    return [f"{name}/{tap_name(tap)}" for name, branch in dynamic.items() for tap in branch.taps]
