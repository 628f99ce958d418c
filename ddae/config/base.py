"""What every experiment has, pretraining and what comes after it: data, optimizer, length, engine, tracker.

What only changes speed or memory (ZeRO stage, buckets, micro-batch) is in the DeepSpeed JSON instead.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Self

from ddae.errors import UserError, shown


@dataclass(frozen=True)
class ShardsConfig:
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
    crop: Literal["random", "once", "centre"] = "random"  # once: a box that does not fit is clamped, not drawn again
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area that a random crop keeps


@dataclass(frozen=True)
class OptimConfig:
    lr: float | None = None  # peak learning rate; None: base_lr x batch_size / 256
    base_lr: float = 1.5e-4  # peak learning rate of a batch of 256
    min_lr: float = 1e-4  # learning rate at the end of the cosine
    warmup_epochs: float = 20.0  # linear warm-up
    weight_decay: float = 0.05  # decoupled; biases, norms, cls and mask tokens are exempt
    decay_mask_tokens: bool = False  # mask tokens decay, too (BootMAE)
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
    parent: str = ""  # MLflow run that this one is shown under


ANY, TINY = math.inf, 1e-12
RANGES = {  # field -> smallest and largest value; every number must also be finite
    "data.hw_decoder_load": (0, 1),
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


@dataclass(frozen=True)
class Experiment:
    """`preset` is the name it started from."""

    preset: str = ""  # named starting point; see README
    run_dir: str = ""  # folder of the run; empty: runs/PRESET
    ds_config: str = ""  # DeepSpeed JSON
    allow_scratch: bool = False  # start anew where a run folder holds only broken checkpoints
    data: ShardsConfig = field(default_factory=ShardsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    # Fields that a resumed run may change: they move neither the curve nor what is compared (train.steps and
    # train.epochs grow with train.extend; the data set is compared by its content).
    FREE_ON_RESUME: ClassVar[frozenset[str]] = frozenset(
        {
            *("preset", "run_dir", "ds_config", "allow_scratch", "data.train", "data.backend", "data.workers"),
            *("data.hw_decoder_load", "data.cache", "data.cache_gib"),
            *("engine.kernels", "engine.recompute", "tracker.kind", "tracker.experiment"),
            "tracker.parent",
            *("train.log_every", "train.save_every", "train.keep", "train.keep_every", "train.hang_after"),
            *("train.extend", "train.report"),
        }
    )

    UNUSED: ClassVar[frozenset[str]] = frozenset()  # fields that this kind of experiment has no use for

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
    def from_dict(cls, tree: dict[str, Any]) -> Self:
        """What to_dict() gave."""
        sections = {each.name: each.type for each in dataclasses.fields(cls) if dataclasses.is_dataclass(each.type)}
        built: dict[str, Any] = dict(tree)
        for name, section in sections.items():
            if name not in tree:  # of an earlier version: what it did not know has its default
                continue
            values = {key: tuple(value) if isinstance(value, list) else value for key, value in tree[name].items()}
            built[name] = section(**values)  # type: ignore[operator]
        return cls(**built)


class Kind(NamedTuple):
    """What a command trains: its config, where that may start from, and what does not fit together."""

    config: type[Experiment]
    preset: Callable[[str], Any]
    check: Callable[[Any], None]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"width": 768}} -> {"model.width": 768}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def check_ranges(config: Experiment, ranges: dict[str, tuple[float, float]]) -> None:
    """UserError with the field, its value and the mend, where a number lies outside of its range."""
    flat = flatten(config.to_dict())
    for name, (low, high) in ranges.items():
        values = flat[name] if isinstance(flat[name], list) else [flat[name]]
        for value in values:
            if isinstance(value, (int, float)) and not (math.isfinite(value) and low <= value <= high):
                wanted = f"{low:g} or more" if high == ANY else f"a number from {low:g} to {high:g}"
                raise UserError(f"{name} is {value}: choose {'a finite number' if low == -ANY else wanted}")
