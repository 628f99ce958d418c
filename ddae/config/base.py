"""Settings that every experiment has, pretraining and downstream tasks: data, optimizer, length, engine, tracker.

Settings that only change speed or memory (ZeRO stage, buckets, micro-batch) are in the DeepSpeed JSON instead.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

from ddae import atomic
from ddae.errors import UserError, redact_url

TrackerKind = Literal["mlflow", "tensorboard", "wandb", "jsonl"]
FORMAT = 2  # of a run's config.json; 0.1 wrote none
ImageSize = int | tuple[int, int]  # pixels: the side of a square, or height and width


def height_width(size: ImageSize) -> tuple[int, int]:
    """Return an image size as height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def canonical_size(size: ImageSize) -> ImageSize:
    """Return an image size as a tuple, or as one number if height and width are equal. JSON has lists for tuples."""
    height, width = height_width(size)
    return height if height == width else (height, width)


def check_image_size(name: str, size: ImageSize, patch_size: int) -> None:
    """Raise UserError if an image of this size cannot be divided into patches."""
    if any(side % patch_size for side in height_width(size)):
        height, width = (max(1, side // patch_size) * patch_size for side in height_width(size))
        raise UserError(
            f"{name} is {describe_size(size)}; expected a multiple of the patch size {patch_size}. "
            f"Pass --{name} {describe_size(canonical_size((height, width)))}, or another patch size."
        )


def describe_size(size: ImageSize) -> str:
    """Return an image size as its flag is written: 224, or 224 160."""
    return str(size) if isinstance(size, int) else f"{size[0]} {size[1]}"


@dataclass(frozen=True)
class ShardsConfig:
    # training images: a folder of images; or shards: a folder, a pattern such as data/train-{000000..000099}.tar, or a
    # URL; or several of these.
    train: str | tuple[str, ...] = ""
    val_share: float = 0.05  # of a folder of images: share that is set aside for validation
    labels: Literal["none", "folders"] = "none"  # classes in a folder of images: none, or its subfolders
    weights: tuple[int, ...] = ()  # how often an epoch contains the images of each of several sources; (): once
    batch_size: int = 4096  # images a step, over all ranks and accumulation steps
    # An epoch's last, incomplete batch: completed with images of the next epoch, or dropped.
    remainder: Literal["carry_over", "drop"] = "carry_over"
    backend: Literal["auto", "dali", "pillow", "synthetic"] = "auto"  # image decoder; auto: the faster one here
    in_memory: bool = False  # decode a small data set once, with Pillow, and keep its images in memory
    workers: int | None = None  # a rank's worker processes and DALI's threads; None: its cores; 0: no processes
    hw_decoder_load: float = 0.65  # share of JPEGs that DALI gives to a GPU's hardware decoder
    cache: str = "data/cache"  # folder for shards downloaded from URLs
    cache_gib: float = 500.0  # largest size of that folder, in GiB
    crop: Literal["random", "clamped", "centre"] = "random"  # clamped: a box that does not fit is cut, not redrawn
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of a random crop over the image's

    @property
    def sources(self) -> tuple[str, ...]:
        """The training shards' sources: one, or several."""
        return (self.train,) if isinstance(self.train, str) else self.train


@dataclass(frozen=True)
class OptimConfig:
    lr: float | None = None  # peak learning rate; None: base_lr x batch_size / 256
    base_lr: float = 1.5e-4  # peak learning rate at batch size 256
    min_lr: float = 1e-4  # learning rate at the end of the cosine
    warmup_epochs: float = 20.0  # linear warm-up of the learning rate, in epochs
    weight_decay: float = 0.05  # decoupled; biases, norms, cls and mask tokens are exempt
    decay_mask_tokens: bool = False  # apply weight decay to mask tokens (BootMAE)
    adam_betas: tuple[float, float] = (0.9, 0.95)  # AdamW's averaging factors
    clip_grad: float = 0.0  # largest gradient norm; 0: no clipping


@dataclass(frozen=True)
class TrainConfig:
    epochs: float = 100.0  # length of training in epochs
    steps: int | None = None  # length of training in steps, instead of epochs
    seed: int = 0  # seed of weights, order, crops and masks
    log_every: int = 20  # steps between rows of metrics
    save_every: int = 1000  # steps between checkpoints
    async_save: bool = False  # write checkpoints in the background; takes host memory for a copy of the state
    keep: int = 3  # number of newest checkpoints to keep
    keep_every: int = 0  # keep checkpoints of every so many steps for ever; 0: none
    watchdog_timeout_s: float = 600.0  # seconds without progress after which a rank writes its stacks and exits
    allow_longer: bool = False  # allow a started or finished run to be given more steps
    profile_steps: str = ""  # FIRST:LAST, such as 50:55: write a profiler trace of these steps to RUN/profile
    report: bool = True  # write figures and report.html at the end


@dataclass(frozen=True)
class EngineConfig:
    device: Literal["auto", "cpu"] = "auto"  # auto: the GPU; the CPU only where there is none
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: a quarter more work, less memory
    precision: Literal["bf16", "autocast", "fp32"] = "bf16"  # bf16 weights, fp32 masters; or bf16 products alone
    reduce_dtype: Literal["auto", "fp32"] = "auto"  # in which ranks sum gradients; auto: that of the weights
    loss_backend: Literal["auto", "reference", "triton"] = "auto"  # auto: Triton on a GPU, PyTorch on a CPU


@dataclass(frozen=True)
class TrackerConfig:
    kind: TrackerKind = "mlflow"  # where metrics go besides metrics.jsonl
    experiment: str = "ddae"  # MLflow's experiment, or the project of Weights & Biases
    parent: str = ""  # MLflow run that this one is nested under


ANY, TINY = math.inf, 1e-12
RANGES = {  # field -> smallest and largest value; every number must also be finite
    **dict.fromkeys(("data.hw_decoder_load", "data.val_share"), (0, 1)),
    "data.crop_scale": (TINY, 1),
    **dict.fromkeys(("data.batch_size", "data.weights", "train.steps"), (1, ANY)),
    **dict.fromkeys(("train.log_every", "train.save_every", "train.keep"), (1, ANY)),
    **dict.fromkeys(("data.cache_gib", "train.watchdog_timeout_s"), (TINY, ANY)),
    **dict.fromkeys(("data.workers", "train.keep_every", "optim.warmup_epochs", "optim.weight_decay"), (0, ANY)),
    "train.seed": (0, 2**63 - 1),  # random numbers are drawn from int64 keys
    **dict.fromkeys(("optim.lr", "optim.base_lr", "optim.min_lr", "optim.clip_grad"), (0, ANY)),
    "optim.adam_betas": (0, 1 - TINY),
    "train.epochs": (TINY, ANY),
}


@dataclass(frozen=True)
class Experiment:
    """The settings of one run."""

    preset: str = ""  # named starting point; see README
    run_dir: str = ""  # run directory; empty: runs/PRESET
    ds_config: str = ""  # DeepSpeed JSON
    allow_restart: bool = False  # train from the start if a run directory holds only damaged checkpoints
    data: ShardsConfig = field(default_factory=ShardsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    # Fields that a resumed run may change: they change no curve. (train.steps and train.epochs may grow with
    # train.allow_longer; the data set is compared by its content.)
    FREE_ON_RESUME: ClassVar[frozenset[str]] = frozenset(
        {
            *("preset", "run_dir", "ds_config", "allow_restart", "data.train", "data.backend", "data.workers"),
            *(
                "data.val_share",
                "data.labels",
                "data.in_memory",
                "data.hw_decoder_load",
                "data.cache",
                "data.cache_gib",
            ),
            *("engine.device", "engine.loss_backend", "engine.activation_checkpointing"),
            *("tracker.kind", "tracker.experiment", "tracker.parent"),
            *("train.log_every", "train.save_every", "train.keep", "train.keep_every", "train.watchdog_timeout_s"),
            *("train.allow_longer", "train.async_save", "train.profile_steps", "train.report"),
        }
    )

    UNUSED: ClassVar[frozenset[str]] = frozenset()  # fields that this kind of experiment does not read

    @property
    def peak_lr(self) -> float:
        return self.optim.lr if self.optim.lr is not None else self.optim.base_lr * self.data.batch_size / 256

    @property
    def folder(self) -> str:
        return self.run_dir or f"runs/{self.preset}"

    def num_steps(self, epoch_samples: int) -> int:
        """Return the length of the run in steps; an epoch has `epoch_samples` images."""
        return self.train.steps or max(1, round(self.train.epochs * epoch_samples / self.data.batch_size))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings for JSON: tuples are lists, and secrets in URLs are redacted."""
        tree = json.loads(json.dumps(dataclasses.asdict(self)))
        sources = [redact_url(each) if "://" in each else each for each in self.data.sources]
        tree["data"]["train"] = sources if isinstance(self.data.train, tuple) else sources[0]
        return tree

    def write(self, path: Path) -> None:
        """Write a run's config.json atomically."""
        atomic.write_json(path, {"format": FORMAT, **self.to_dict()})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what write() wrote. Raise UserError for a run of another version."""
        return cls.from_dict(read_settings(path))

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Self:
        """Return what to_dict() was called on."""
        sections = {each.name: each.type for each in dataclasses.fields(cls) if dataclasses.is_dataclass(each.type)}
        built: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in tree.items()}
        for name, section in sections.items():
            values = {key: tuple(value) if isinstance(value, list) else value for key, value in tree[name].items()}
            built[name] = section(**values)  # type: ignore[operator]
        return cls(**built)


class ExperimentType(NamedTuple):
    """A kind of experiment: the class of its config, its presets by name, and the check of a whole config."""

    config: type[Experiment]
    preset: Callable[[str], Any]
    check: Callable[[Any], None]


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a run's config.json, of any kind of experiment.

    Raise UserError for another version, or if the file cannot be read.
    """
    tree = read_run_file(path)
    if tree.pop("format", None) != FORMAT:
        raise UserError(
            f"{path} was written by another version of ddae; this one reads run format {FORMAT}. "
            "Use that version with this run directory, or choose another directory."
        )
    return tree


def read_run_file(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a run. Raise UserError if the file cannot be read."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        reason = error.strerror
    except ValueError:  # of JSON, or of text
        reason = "it is empty or no JSON"
    else:
        if isinstance(content, dict):
            return content
        reason = "it is no JSON object"
    raise UserError(f"{path} cannot be read ({reason}). Restore it, or choose another --run_dir.")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"width": 768}} -> {"model.width": 768}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def check_ranges(config: Experiment, ranges: dict[str, tuple[float, float]]) -> None:
    """Raise UserError if a number lies outside its range, naming the field, its value and the range."""
    flat = flatten(config.to_dict())
    for name, (low, high) in ranges.items():
        values = flat[name] if isinstance(flat[name], list) else [flat[name]]
        for value in values:
            if isinstance(value, (int, float)) and not (math.isfinite(value) and low <= value <= high):
                expected = f"a value >= {low:g}" if high == ANY else f"a value from {low:g} to {high:g}"
                expected += ", which is excluded" if high == 1 - TINY else ""
                raise UserError(f"{name} is {value}; expected {'a finite number' if low == -ANY else expected}.")
