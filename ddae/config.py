"""Every knob that can change a result, and the few that say where a run reads and writes.

What only changes speed or memory (ZeRO stage, buckets, micro-batch) is in the DeepSpeed JSON instead. Defaults are
those of `ddae_vit_b16_100e`; presets.py names the other experiments, METHOD.md says why each number is what it is.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ddae.errors import UserError, shown


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


@dataclass(frozen=True)
class MaskConfig:
    kind: Literal["bootmae_block", "beit_block", "random"] = "bootmae_block"  # how masked patches are chosen
    ratio: float = 0.75  # share of patches that is masked


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


@dataclass(frozen=True)
class FeatureConfig:
    enabled: bool = True  # rebuild the teacher's features of the masked patches
    taps: tuple[int, ...] = (3, 6, 9, 12)  # encoder blocks that are decoded, each towards the teacher's same block
    tap_weights: tuple[float, ...] = (0.75, 0.75, 0.75, 1.0)  # weight of each tap's loss (lambda)
    dynamic: bool = True  # weigh patches by distance, through the betas
    decoder_depth: int = 2  # decoder blocks
    decoder_width: int = 768  # decoder width
    decoder_heads: int = 12  # decoder attention heads
    ramp: float = 0.25  # share of training over which this branch's weight grows from 0 to 1


@dataclass(frozen=True)
class DynamicConfig:
    beta_init: tuple[float, ...] = (-0.5,)  # where the betas begin: one number for all taps, or one a tap
    learnable: bool = True  # betas learn; otherwise they stay where they begin
    shared: bool = True  # one beta a tap for all branches; otherwise each branch has its own
    rescale_grad: Literal["full", "detach"] = "full"  # gradient through the re-scale's maximum, or not
    norm_weight: float = 0.5  # weight of the norm of the weights (Eq. 6)
    norm_batch: float = 1.0  # images over which that norm is taken: 1 a single one, 256 a flattened batch
    coupled_l2: float = 0.05  # L2 decay of the betas, in their gradient
    lr_multiple: float = 1.0  # learning rate of the betas over the encoder's
    clamp: tuple[float, float] = (-16.0, 3.0)  # betas are held in this range where they are used


@dataclass(frozen=True)
class TeacherConfig:
    momentum: float | Literal["schedule"] = "schedule"  # a constant, or the paper's schedule by epoch


@dataclass(frozen=True)
class DataConfig:
    train: str = ""  # shards to train on: a folder, a pattern such as data/train-{000000..000099}.tar, or a URL
    batch_size: int = 4096  # images a step, over all ranks and accumulation
    remainder: Literal["rotate", "drop"] = (
        "rotate"  # an epoch's last, incomplete batch: filled from the next, or left out
    )
    backend: Literal["auto", "dali", "pillow", "synthetic"] = "auto"  # what decodes images; auto: the faster one here
    workers: int = 4  # of each rank: Pillow's processes (0: the training process itself), or DALI's threads
    hw_decoder_load: float = 0.65  # share of JPEGs that DALI gives to a GPU's hardware decoder
    cache: str = "data/cache"  # folder for shards downloaded from URLs
    cache_gib: float = 500.0  # largest size of that folder
    normalisation: Literal["half", "imagenet"] = "half"  # mean and std of pixels
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area that a random crop keeps


@dataclass(frozen=True)
class OptimConfig:
    lr: float | None = None  # peak learning rate; None: base_lr x batch_size / 256
    base_lr: float = 1.5e-4  # peak learning rate of a batch of 256
    min_lr: float = 1e-4  # learning rate at the end of the cosine
    warmup_epochs: float = 20.0  # linear warm-up
    weight_decay: float = 0.05  # decoupled; biases, norms, cls and mask tokens are exempt
    adam_betas: tuple[float, float] = (0.9, 0.95)  # AdamW's averaging factors
    clip_grad: float = 0.0  # largest gradient norm; 0 does not clip


@dataclass(frozen=True)
class TrainConfig:
    epochs: float = 100.0  # length of training
    steps: int | None = None  # length of training in steps, instead of epochs
    seed: int = 0  # of everything random: weights, order, crops, masks
    log_every: int = 20  # steps between rows of metrics
    save_every: int = 1000  # steps between checkpoints
    keep: int = 3  # newest checkpoints that are kept
    keep_every: int = 0  # checkpoints of every so many steps are kept for ever; 0: of none
    hang_after: float = 600.0  # seconds without a step after which the run ends, and every rank leaves its stacks
    extend: bool = False  # allow a finished or started run to be given more steps
    report: bool = True  # draw the pictures and report.html at the end


@dataclass(frozen=True)
class EngineConfig:
    recompute: bool = False  # activations of blocks again in the backward pass: a quarter more work, far less memory
    precision: Literal["bf16", "autocast", "fp32"] = "bf16"  # bf16 weights, fp32 masters; bf16 products
    kernels: Literal["auto", "reference", "triton"] = "auto"  # of the loss; auto: Triton on a GPU, else plain torch


@dataclass(frozen=True)
class TrackerConfig:
    kind: Literal["mlflow", "jsonl"] = "mlflow"  # where metrics go besides metrics.jsonl
    experiment: str = "ddae"  # MLflow experiment


@dataclass(frozen=True)
class Config:
    """A whole experiment. `preset` is the name it started from."""

    preset: str = "ddae_vit_b16_100e"  # named starting point; see README
    run_dir: str = ""  # folder of the run; empty: runs/PRESET
    ds_config: str = ""  # DeepSpeed JSON
    allow_scratch: bool = False  # start anew where a run folder holds only broken checkpoints
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    pixel: PixelConfig = field(default_factory=PixelConfig)
    feature: FeatureConfig = field(default_factory=FeatureConfig)
    dynamic: DynamicConfig = field(default_factory=DynamicConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    @property
    def grid(self) -> tuple[int, int]:
        side = self.model.image_size // self.model.patch_size
        return side, side

    @property
    def num_masked(self) -> int:
        return round(self.mask.ratio * self.grid[0] * self.grid[1])

    @property
    def peak_lr(self) -> float:
        return self.optim.lr if self.optim.lr is not None else self.optim.base_lr * self.data.batch_size / 256

    @property
    def folder(self) -> str:
        return self.run_dir or f"runs/{self.preset}"

    def num_steps(self, epoch_samples: int) -> int:
        """Steps of the whole run whose epochs are of so many images."""
        return self.train.steps or max(1, round(self.train.epochs * epoch_samples / self.data.batch_size))

    def to_dict(self) -> dict[str, Any]:
        """As the files have it: tuples are lists, and URLs have lost what may be secret in them."""
        tree = json.loads(json.dumps(dataclasses.asdict(self)))
        if "://" in self.data.train:
            tree["data"]["train"] = shown(self.data.train)
        return tree

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Config":
        """What to_dict() gave."""
        sections = {each.name: each.type for each in dataclasses.fields(cls) if dataclasses.is_dataclass(each.type)}
        built: dict[str, Any] = dict(tree)
        for name, section in sections.items():
            values = {key: tuple(value) if isinstance(value, list) else value for key, value in tree[name].items()}
            built[name] = section(**values)  # type: ignore[operator]
        return cls(**built)


# Fields that a resumed run may change: they move neither the curve nor what is compared (train.steps and train.epochs
# grow with train.extend; the data set is compared by its content).
FREE_ON_RESUME = {
    *("preset", "run_dir", "ds_config", "allow_scratch", "data.train", "data.backend", "data.workers"),
    *("data.hw_decoder_load", "data.cache", "data.cache_gib"),
    *("engine.kernels", "engine.recompute", "tracker.kind", "tracker.experiment"),
    *("train.log_every", "train.save_every", "train.keep", "train.keep_every", "train.hang_after", "train.extend"),
    "train.report",
}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"width": 768}} -> {"model.width": 768}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def check(config: Config) -> None:
    """UserError with the field, its value and the mend, where the fields contradict each other."""
    _check_ranges(config)
    model = config.model
    if model.image_size % model.patch_size:
        raise UserError(
            f"model.image_size {model.image_size} is not divisible by model.patch_size {model.patch_size}: "
            f"choose {max(1, model.image_size // model.patch_size) * model.patch_size} or another patch size"
        )
    if model.width % model.heads or model.width % 4:
        raise UserError(f"model.width {model.width} must be a multiple of 4 and of model.heads {model.heads}")
    if model.positions == "none" or model.relative_positions != "none":
        raise UserError(
            f"model.positions {model.positions!r} with model.relative_positions {model.relative_positions!r} is an "
            "encoder that sees all patches, and this method's sees the visible ones: keep sin-cos positions alone"
        )
    if not 0 < config.num_masked < config.grid[0] * config.grid[1]:
        raise UserError(f"mask.ratio {config.mask.ratio} must leave at least one patch visible and one masked")
    if not (config.pixel.enabled or config.feature.enabled):
        raise UserError("pixel.enabled and feature.enabled are both off: nothing is left to learn")
    for name, branch in (("pixel", config.pixel), ("feature", config.feature)):
        if branch.enabled:
            _check_branch(name, branch, model.depth)
    betas, taps = len(config.dynamic.beta_init), len(beta_names(config))
    if taps and betas not in (1, taps):
        raise UserError(f"dynamic.beta_init has {betas} numbers: give 1, or {taps}, one for each dynamic tap")
    for name, (low, high) in {"data.crop_scale": config.data.crop_scale, "dynamic.clamp": config.dynamic.clamp}.items():
        if low > high:
            raise UserError(f"{name} is ({low}, {high}): give the smaller number first")


ANY, TINY = math.inf, 1e-12
RANGES = {  # field -> smallest and largest value; every number must also be finite
    **dict.fromkeys(("model.width", "model.depth", "model.heads", "model.image_size", "model.patch_size"), (1, ANY)),
    **{f"{b}.decoder_{f}": (1, ANY) for b in ("pixel", "feature") for f in ("depth", "width", "heads")},
    **dict.fromkeys(("pixel.tap_weights", "feature.tap_weights"), (0, ANY)),
    **dict.fromkeys(("feature.ramp", "mask.ratio", "data.hw_decoder_load"), (0, 1)),
    **dict.fromkeys(("dynamic.beta_init", "dynamic.clamp"), (-ANY, ANY)),
    "model.layer_scale": (0, ANY),
    **dict.fromkeys(("dynamic.norm_weight", "dynamic.coupled_l2", "dynamic.lr_multiple"), (0, ANY)),
    "dynamic.norm_batch": (TINY, ANY),
    "teacher.momentum": (0, 1 - TINY),
    "data.crop_scale": (TINY, 1),
    **dict.fromkeys(("data.batch_size", "train.log_every", "train.save_every", "train.keep", "train.steps"), (1, ANY)),
    **dict.fromkeys(("data.cache_gib", "train.hang_after"), (TINY, ANY)),
    **dict.fromkeys(
        ("data.workers", "train.seed", "train.keep_every", "optim.warmup_epochs", "optim.weight_decay"), (0, ANY)
    ),
    **dict.fromkeys(("optim.lr", "optim.base_lr", "optim.min_lr", "optim.clip_grad"), (0, ANY)),
    "optim.adam_betas": (0, 1 - TINY),
    "train.epochs": (TINY, ANY),
}


def _check_ranges(config: Config) -> None:
    flat = flatten(config.to_dict())
    for name, (low, high) in RANGES.items():
        values = flat[name] if isinstance(flat[name], list) else [flat[name]]
        for value in values:
            if isinstance(value, (int, float)) and not (math.isfinite(value) and low <= value <= high):
                wanted = f"{low:g} or more" if high == ANY else f"a number from {low:g} to {high:g}"
                raise UserError(f"{name} is {value}: choose {'a finite number' if low == -ANY else wanted}")


def _check_branch(name: str, branch: PixelConfig | FeatureConfig, depth: int) -> None:
    if not branch.taps or list(branch.taps) != sorted(set(branch.taps)):
        raise UserError(f"{name}.taps {branch.taps} must name blocks in ascending order, each once")
    if branch.taps[0] < 1 or branch.taps[-1] > depth:
        raise UserError(f"{name}.taps {branch.taps} reach outside the encoder: its blocks are 1 to {depth}")
    if len(branch.tap_weights) != len(branch.taps):
        raise UserError(
            f"{name}.tap_weights has {len(branch.tap_weights)} numbers for {len(branch.taps)} taps: give one a tap"
        )
    if branch.decoder_width % branch.decoder_heads or branch.decoder_width % 4:
        raise UserError(
            f"{name}.decoder_width {branch.decoder_width} must be a multiple of 4 and of "
            f"{name}.decoder_heads {branch.decoder_heads}"
        )


def tap_name(tap: int) -> str:
    """A tap's name in metrics: tap_03."""
    return f"tap_{tap:02d}"


def beta_names(config: Config) -> list[str]:
    """One name for each beta: tap_03 where branches share them, pixel/tap_03 where they do not."""
    branches = {"pixel": config.pixel, "feature": config.feature}
    dynamic = {name: branch for name, branch in branches.items() if branch.enabled and branch.dynamic}
    if config.dynamic.shared:
        return [tap_name(tap) for tap in sorted({tap for branch in dynamic.values() for tap in branch.taps})]
    return [f"{name}/{tap_name(tap)}" for name, branch in dynamic.items() for tap in branch.taps]
