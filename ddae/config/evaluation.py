"""Settings of fine-tuning and linear probes that can change a result, and the published recipes by name.

docs/evaluation.md gives the source of each number. Batch sizes are global, learning rates are for those batches.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, TypeVar

from ddae.config.base import (
    ANY,
    RANGES,
    EngineConfig,
    Experiment,
    ExperimentType,
    OptimConfig,
    ShardsConfig,
    TrainConfig,
    canonical_size,
    check_ranges,
)
from ddae.errors import UserError

SMALL = 384  # largest encoder width for which the paper's settings of ViT-S are used
PAPER = {"small": (1.6e-2, 0.75), "base": (8e-3, 0.65)}  # learning rate and layer decay of the paper's appendix


@dataclass(frozen=True)
class AugmentConfig:
    policy: str = "rand-m9-mstd0.5-inc1"  # RandAugment policy as timm names it; empty: none
    erase: float = 0.25  # probability of random erasing
    mixup: float = 0.8  # alpha of mixup; 0: off
    cutmix: float = 1.0  # alpha of CutMix; 0: off
    switch: float = 0.5  # probability of CutMix if both are on
    smoothing: float = 0.1  # label smoothing


@dataclass(frozen=True)
class TuneConfig:
    pool: Literal["mean", "cls"] = "mean"  # classify the mean of the patch tokens, or the cls token
    layer_decay: float | None = None  # learning rate of a block over the next block's; None: the paper's for the width
    drop_path: float = 0.1  # stochastic depth rate of the last block
    head_std: float = 2e-5  # standard deviation of the head's initial weights
    ema: float = 0.0  # momentum of averaged weights, which are evaluated, too; 0: none
    evaluate_every: float = 1.0  # epochs between evaluations
    untrained: bool = False  # first fine-tune initial weights by the same recipe, to compare with: doubles the time


@dataclass(frozen=True)
class Evaluation(Experiment):
    """Settings that every experiment with an encoder has."""

    preset: str = "paper"  # recipe
    encoder: str = ""  # a run directory, an export, a checkpoint, or a published file
    normalisation: Literal["", "half", "imagenet"] = ""  # of pixels; empty: as in the encoder's training
    image_size: int | tuple[int, int] | None = None  # pixels: a square's side, or height and width; None: the encoder's
    val: str = ""  # validation shards; empty: split val of the folder data.train

    TASK: ClassVar[str]  # name of its folder
    FREE_ON_RESUME = Experiment.FREE_ON_RESUME | {"val", "encoder"}  # a checkpoint holds the encoder's weights

    def __post_init__(self) -> None:
        if self.image_size is not None:
            object.__setattr__(self, "image_size", canonical_size(self.image_size))

    @property
    def folder(self) -> str:
        return self.run_dir or task_folder(self.encoder, self.TASK)


@dataclass(frozen=True)
class FinetuneConfig(Evaluation):
    """The settings of a fine-tuning run."""

    preset: str = "paper"  # recipe: paper, beit, beitv2, mae or demo
    tune: TuneConfig = field(default_factory=TuneConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    TASK = "finetune"
    UNUSED = frozenset({"engine.loss_backend"})
    FREE_ON_RESUME = Evaluation.FREE_ON_RESUME | {"tune.untrained"}

    def resolved_for(self, width: int) -> "FinetuneConfig":
        """Return the config with the paper's learning rate and layer decay for this width, unless they are set."""
        lr, decay = PAPER["small" if width <= SMALL else "base"]
        optim = self.optim if self.optim.lr is not None or self.optim.base_lr else replace(self.optim, lr=lr)
        tune = self.tune if self.tune.layer_decay is not None else replace(self.tune, layer_decay=decay)
        return replace(self, optim=optim, tune=tune)


@dataclass(frozen=True)
class HeadsConfig:
    layers: tuple[int, ...] = ()  # blocks, counted from 1; empty: 3, 6, 9, 10 and 12 of 12
    micro_batch: int = 512  # images of a GPU at a time, over which batch norm is computed
    momentum: float = 0.9  # of LARS
    untrained: bool = True  # train the same heads on an untrained encoder, too, in the same pass
    cache: bool = False  # compute features once, without augmentation, and train on them
    evaluate_every: float = 5.0  # epochs between evaluations


@dataclass(frozen=True)
class ProbeConfig(Evaluation):
    """The settings of a linear probe."""

    preset: str = "paper"  # recipe: paper or demo
    probe: HeadsConfig = field(default_factory=HeadsConfig)

    TASK = "linear_probe"
    UNUSED = frozenset(  # LARS trains the heads, without DeepSpeed
        {"ds_config", "engine.loss_backend", "engine.activation_checkpointing", "optim.adam_betas", "optim.clip_grad"}
    )

    def resolved_for(self, depth: int) -> "ProbeConfig":
        """Return the config with blocks for this depth, unless they are set. Raise UserError if one is beyond it."""
        layers = self.probe.layers
        if not layers:
            layers = tuple(sorted({max(1, depth * part // 12) for part in (3, 6, 9, 10, 12)}))
        if list(layers) != sorted(set(layers)) or layers[0] < 1 or layers[-1] > depth:
            raise UserError(
                f"probe.layers is {layers}; expected blocks from 1 to {depth} in ascending order, each once."
            )
        return replace(self, probe=replace(self.probe, layers=layers))


def task_folder(encoder: str, task: str) -> str:
    """Return the folder of an evaluation: in the encoder's run directory, or in runs/ for a file."""
    path = encoder.rstrip("/").removesuffix("/encoder")
    if "/checkpoints/step_" in path:
        run, _, step = path.rpartition("/checkpoints/")
        return f"{run}/{task}_{step}"
    of_a_file = path.endswith((".pth", ".pt", ".bin", ".safetensors"))
    return f"runs/{path.rpartition('/')[2]}_{task}" if of_a_file else f"{path}/{task}"


def paper() -> FinetuneConfig:
    """The paper's appendix; settings that it leaves open are shared by all recipes below."""
    return FinetuneConfig(
        data=ShardsConfig(batch_size=1024, crop_scale=(0.08, 1.0), remainder="drop"),
        optim=OptimConfig(base_lr=0.0, min_lr=1e-6, warmup_epochs=5, weight_decay=0.05, adam_betas=(0.9, 0.999)),
        train=TrainConfig(epochs=100),
    )


def beit() -> FinetuneConfig:
    config = paper()
    return replace(
        config,
        optim=replace(config.optim, lr=4e-3, warmup_epochs=20),
        tune=replace(config.tune, layer_decay=0.65),
    )


def beitv2() -> FinetuneConfig:
    config = beit()
    return replace(config, optim=replace(config.optim, lr=5e-4))


def mae() -> FinetuneConfig:
    config = paper()
    return replace(config, optim=replace(config.optim, base_lr=5e-4), tune=replace(config.tune, layer_decay=0.65))


def demo() -> FinetuneConfig:
    """The encoder of `make demo` on its photographs: minutes on two cores."""
    config = paper()
    return replace(
        config,
        data=replace(config.data, batch_size=64, workers=1),
        optim=replace(config.optim, lr=2e-3, warmup_epochs=1),
        train=replace(config.train, epochs=6, log_every=5),
        tune=replace(config.tune, layer_decay=0.75, head_std=0.02, untrained=True),
        augment=replace(config.augment, erase=0.0, mixup=0.0, cutmix=0.0),
        engine=EngineConfig(precision="fp32"),
    )


RECIPES = {"paper": paper, "beit": beit, "beitv2": beitv2, "mae": mae, "demo": demo}


def probe_paper() -> ProbeConfig:
    """The paper's appendix: MAE's linear probe."""
    return ProbeConfig(
        data=ShardsConfig(batch_size=16384, crop="clamped", crop_scale=(0.08, 1.0), remainder="drop"),
        optim=OptimConfig(base_lr=0.1, min_lr=0.0, warmup_epochs=10, weight_decay=0.0),
        train=TrainConfig(epochs=90),
    )


def probe_demo() -> ProbeConfig:
    """The encoder of `make demo` on its photographs: a minute on two cores."""
    config = probe_paper()
    return replace(
        config,
        data=replace(config.data, batch_size=256, crop="centre", workers=1),
        optim=replace(config.optim, base_lr=10.0, warmup_epochs=2),
        train=replace(config.train, epochs=40, log_every=20),
        probe=replace(config.probe, cache=True),
    )


PROBES = {"paper": probe_paper, "demo": probe_demo}
R = TypeVar("R", bound=Experiment)


def recipe(name: str) -> FinetuneConfig:
    """Return the fine-tuning recipe of that name. Raise UserError with the nearest name if there is none."""
    return named(name, RECIPES)


def probe_recipe(name: str) -> ProbeConfig:
    """Return the linear probe's recipe of that name. Raise UserError with the nearest name if there is none."""
    return named(name, PROBES)


def named(name: str, recipes: dict[str, Callable[[], R]]) -> R:
    """Return the recipe of that name. Raise UserError with the nearest name if there is none."""
    if name not in recipes:
        nearest = difflib.get_close_matches(name, recipes, 1, 0)[0]
        raise UserError(f"unknown recipe {name!r}; the nearest is {nearest!r}. Choose from {', '.join(recipes)}.")
    return replace(recipes[name](), preset=name)


FINETUNE_RANGES = {
    **RANGES,
    "image_size": (1, ANY),
    "tune.layer_decay": (0, 1),
    **dict.fromkeys(("tune.drop_path", "tune.ema", "augment.smoothing"), (0, 1 - 1e-12)),
    **dict.fromkeys(("augment.erase", "augment.switch"), (0, 1)),
    **dict.fromkeys(("augment.mixup", "augment.cutmix", "tune.head_std"), (0, ANY)),
    "tune.evaluate_every": (1e-12, ANY),
}


PROBE_RANGES = {
    **RANGES,
    "image_size": (1, ANY),
    "probe.micro_batch": (1, ANY),
    "probe.momentum": (0, 1 - 1e-12),
    "probe.evaluate_every": (1e-12, ANY),
}


def check_encoder(config: Evaluation) -> None:
    """Raise UserError if no encoder is named."""
    if not config.encoder:
        raise UserError("no encoder is given. Pass --encoder runs/demo, or another run, export or file.")


def check_probe(config: ProbeConfig) -> None:
    """Raise UserError if a field is out of range or fields contradict each other."""
    check_ranges(config, PROBE_RANGES)
    check_encoder(config)
    if config.probe.cache and config.data.crop != "centre":
        raise UserError(f"data.crop is {config.data.crop!r}; probe.cache requires 'centre'. Pass --data.crop centre.")


def check_finetune(config: FinetuneConfig) -> None:
    """Raise UserError if a field is out of range or fields contradict each other."""
    check_ranges(config, FINETUNE_RANGES)
    check_encoder(config)
    if config.augment.policy and config.data.backend not in ("auto", "pillow"):
        raise UserError(
            f"data.backend is {config.data.backend}, which does not support RandAugment. "
            "Pass --data.backend pillow, or --augment.policy '' for none."
        )


FINETUNING = ExperimentType(FinetuneConfig, recipe, check_finetune)
PROBING = ExperimentType(ProbeConfig, probe_recipe, check_probe)
