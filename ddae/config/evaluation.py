"""Every knob of fine-tuning that can change a result, and the published recipes by name.

Where each number comes from is in docs/evaluation.md. Batch sizes are global, learning rates are for those batches.
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
    check_ranges,
)
from ddae.errors import UserError

SMALL = 384  # the width up to which the paper's numbers for ViT-S are taken
PAPER = {"small": (1.6e-2, 0.75), "base": (8e-3, 0.65)}  # learning rate and layer decay of the paper's appendix


@dataclass(frozen=True)
class AugmentConfig:
    policy: str = "rand-m9-mstd0.5-inc1"  # timm's name of a RandAugment; empty: none
    erase: float = 0.25  # probability that a rectangle of an image becomes noise
    mixup: float = 0.8  # alpha of mixup; 0: never
    cutmix: float = 1.0  # alpha of CutMix; 0: never
    switch: float = 0.5  # probability of CutMix where both are on
    smoothing: float = 0.1  # of labels


@dataclass(frozen=True)
class TuneConfig:
    pool: Literal["mean", "cls"] = "mean"  # what is classified: the mean of the patches or the cls token
    layer_decay: float | None = None  # learning rate of a block over that of the next; None: the paper's for its size
    drop_path: float = 0.1  # share of images for which the last block is left out
    head_std: float = 2e-5  # deviation of the head's weights at the start
    ema: float = 0.0  # momentum of a second, averaged set of weights, which is reported beside; 0: none
    evaluate_every: float = 1.0  # epochs between evaluations
    untrained: bool = False  # first train an untrained encoder by the same recipe, to compare with: as long again


@dataclass(frozen=True)
class Evaluation(Experiment):
    """What every experiment with an encoder has."""

    preset: str = "paper"  # recipe
    encoder: str = ""  # a run folder, an export, a checkpoint, or a published file
    normalisation: Literal["", "half", "imagenet"] = ""  # of pixels; empty: what the encoder was trained on
    image_size: int | None = None  # pixels a side; None: the encoder's
    val: str = ""  # shards to validate on; empty: the split val of the folder data.train

    TASK: ClassVar[str]  # the name of its folder
    FREE_ON_RESUME = Experiment.FREE_ON_RESUME | {"val", "encoder"}  # what the encoder holds is in the checkpoint

    @property
    def folder(self) -> str:
        return self.run_dir or task_folder(self.encoder, self.TASK)


@dataclass(frozen=True)
class FinetuneConfig(Evaluation):
    """A whole fine-tuning."""

    preset: str = "paper"  # recipe: paper, beit, beitv2, mae or demo
    tune: TuneConfig = field(default_factory=TuneConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    TASK = "finetune"
    UNUSED = frozenset({"engine.loss_backend"})
    FREE_ON_RESUME = Evaluation.FREE_ON_RESUME | {"tune.untrained"}

    def resolved_for(self, width: int) -> "FinetuneConfig":
        """With what the paper says for an encoder of this width where nothing else is said."""
        lr, decay = PAPER["small" if width <= SMALL else "base"]
        optim = self.optim if self.optim.lr is not None or self.optim.base_lr else replace(self.optim, lr=lr)
        tune = self.tune if self.tune.layer_decay is not None else replace(self.tune, layer_decay=decay)
        return replace(self, optim=optim, tune=tune)


@dataclass(frozen=True)
class HeadsConfig:
    layers: tuple[int, ...] = ()  # blocks, counted from 1; empty: every quarter's, and five sixths as BootMAE
    micro_batch: int = 512  # images of a GPU at a time, over which its batch norm goes
    momentum: float = 0.9  # LARS's
    untrained: bool = True  # train the same heads on an untrained encoder, too, in the same pass over the images
    cache: bool = False  # read each image once, without augmentation, and train on what is kept of it
    evaluate_every: float = 5.0  # epochs between evaluations


@dataclass(frozen=True)
class ProbeConfig(Evaluation):
    """A whole linear probe."""

    preset: str = "paper"  # recipe: paper or demo
    probe: HeadsConfig = field(default_factory=HeadsConfig)

    TASK = "linear_probe"
    UNUSED = frozenset(  # LARS on the heads alone, without DeepSpeed
        {"ds_config", "engine.loss_backend", "engine.activation_checkpointing", "optim.adam_betas", "optim.clip_grad"}
    )

    def resolved_for(self, depth: int) -> "ProbeConfig":
        """With the blocks of an encoder of this depth, where none are named; UserError where they are not its own."""
        layers = self.probe.layers
        if not layers:
            layers = tuple(sorted({max(1, depth * part // 12) for part in (3, 6, 9, 10, 12)}))
        if list(layers) != sorted(set(layers)) or layers[0] < 1 or layers[-1] > depth:
            raise UserError(f"probe.layers {layers} must name blocks from 1 to {depth} in ascending order, each once")
        return replace(self, probe=replace(self.probe, layers=layers))


def task_folder(encoder: str, task: str) -> str:
    """Where an evaluation of an encoder lives: within its run, or beside a file."""
    path = encoder.rstrip("/").removesuffix("/encoder")
    if "/checkpoints/step_" in path:
        run, _, step = path.rpartition("/checkpoints/")
        return f"{run}/{task}_{step}"
    of_a_file = path.endswith((".pth", ".pt", ".bin", ".safetensors"))
    return f"runs/{path.rpartition('/')[2]}_{task}" if of_a_file else f"{path}/{task}"


def paper() -> FinetuneConfig:
    """The paper's appendix; what it leaves open is what all recipes below share."""
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
    """For the encoder of `make demo` on its photographs: minutes on two cores."""
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
    """The paper's appendix, which is MAE's linear probe."""
    return ProbeConfig(
        data=ShardsConfig(batch_size=16384, crop="clamped", crop_scale=(0.08, 1.0), remainder="drop"),
        optim=OptimConfig(base_lr=0.1, min_lr=0.0, warmup_epochs=10, weight_decay=0.0),
        train=TrainConfig(epochs=90),
    )


def probe_demo() -> ProbeConfig:
    """For the encoder of `make demo` on its photographs: a minute on two cores."""
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
    """The fine-tuning recipe of that name; UserError with the nearest name where there is none."""
    return named(name, RECIPES)


def probe_recipe(name: str) -> ProbeConfig:
    """The linear probe of that name; UserError with the nearest name where there is none."""
    return named(name, PROBES)


def named(name: str, recipes: dict[str, Callable[[], R]]) -> R:
    """The recipe of that name; UserError with the nearest name where there is none."""
    if name not in recipes:
        nearest = difflib.get_close_matches(name, recipes, 1, 0)[0]
        raise UserError(f"unknown recipe {name!r}: the nearest is {nearest!r}, there are {', '.join(recipes)}")
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
    """UserError where no encoder is named."""
    if not config.encoder:
        raise UserError("no encoder is named: add --encoder runs/demo, or another run, export or file")


def check_probe(config: ProbeConfig) -> None:
    """UserError with the field, its value and the mend, where the fields contradict each other."""
    check_ranges(config, PROBE_RANGES)
    check_encoder(config)
    if config.probe.cache and config.data.crop != "centre":
        raise UserError(f"probe.cache keeps features of one crop, data.crop is {config.data.crop!r}: choose 'centre'")


def check_finetune(config: FinetuneConfig) -> None:
    """UserError with the field, its value and the mend, where the fields contradict each other."""
    check_ranges(config, FINETUNE_RANGES)
    check_encoder(config)
    if config.augment.policy and config.data.backend not in ("auto", "pillow"):
        raise UserError(
            f"data.backend {config.data.backend} has no RandAugment, which works on Pillow's images: choose "
            "--data.backend pillow, or none with --augment.policy ''"
        )


FINETUNING = ExperimentType(FinetuneConfig, recipe, check_finetune)
PROBING = ExperimentType(ProbeConfig, probe_recipe, check_probe)
