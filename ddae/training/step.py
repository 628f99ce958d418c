"""The pretraining step: settings for this machine, targets, forward pass, schedules."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from ddae_kernels.implementation import resolve_impl
from torch import Tensor

from ddae.config.base import describe_size
from ddae.config.pretrain import PretrainConfig
from ddae.data.loader import Batch, Loader
from ddae.data.masking import Mask, sample_mask, to_device
from ddae.data.reader import MaskSampler, RankBatch
from ddae.data.rng import fold
from ddae.distributed.checkpoint_format import Checkpointable, FrozenModule
from ddae.distributed.comm import device
from ddae.distributed.engine import Engine
from ddae.errors import UserError
from ddae.export.encoder import load_tokenizer
from ddae.method.betas import Betas
from ddae.method.branches import Inputs
from ddae.method.cuda_graph import GraphedFunction
from ddae.method.distance import masked_distance, neighbour_weight
from ddae.method.model import Losses, PretrainModel, set_direct_calls
from ddae.method.partial_supervision import draw_subset, draw_taps
from ddae.method.teacher import Teacher
from ddae.models.decoder import Decoder
from ddae.models.patches import gather_tokens, normalise_patches, patchify
from ddae.models.tokenizer import Tokenizer
from ddae.models.vit import Encoder
from ddae.training.collapse import CollapseMonitor
from ddae.training.schedules import TEACHER_LINE, TEACHER_MOMENTUM, ramp, teacher_momentum, warmup_cosine

MOMENTUM_SCHEDULES = {"schedule": TEACHER_MOMENTUM, "linear": TEACHER_LINE}  # by teacher.momentum
LARGE = 2**24  # numbers: 64 MiB in fp32


def resolve_auto(config: PretrainConfig, ds_json: dict[str, Any]) -> PretrainConfig:
    """Return the config with engine.tap_execution chosen for this machine.

    Raise UserError if the ZeRO stage, the device or the micro-batch rule out a setting.
    """
    if config.engine.teacher_stream and device().type == "cpu":
        raise UserError("engine.teacher_stream is set, but a CPU has no CUDA streams. Leave it out.")
    if config.engine.teacher_graph and device().type == "cpu":
        raise UserError("engine.teacher_graph is set, but a CPU has no CUDA graphs. Leave it out.")
    if config.engine.student_graphs and device().type == "cpu":
        raise UserError("engine.student_graphs is set, but a CPU has no CUDA graphs. Leave it out.")
    micro_batch = ds_json["train_micro_batch_size_per_gpu"]
    batch_norm = config.feature.enabled and config.feature.target_norm == "batch_layer"
    if batch_norm and micro_batch != config.data.batch_size:
        raise UserError(
            f"feature.target_norm is batch_layer, which needs the whole batch of {config.data.batch_size} images on "
            f"one rank; a rank processes {micro_batch} at a time. Use one rank without accumulation, or instance_layer."
        )
    stage = ds_json.get("zero_optimization", {}).get("stage", 0)
    accumulation = ds_json.get("gradient_accumulation_steps", 1)
    if config.engine.student_graphs and (stage not in (1, 2) or accumulation > 1):
        # Elsewhere gradients stay where the graph has written them, and its next replay overwrites them.
        raise UserError(
            f"engine.student_graphs needs ZeRO 1 or 2 and one micro-batch a step; this run has ZeRO {stage} and "
            f"{accumulation}. Leave it out, or use ds_configs/zero2.json and a larger micro-batch."
        )
    is_stage_3, execution = stage == 3, config.engine.tap_execution
    if is_stage_3 and execution == "sequential":
        raise UserError(
            "engine.tap_execution is sequential, which needs whole parameters; ZeRO stage 3 shards them. "
            "Pass --engine.tap_execution batched, or use another stage."
        )
    if execution == "auto":
        sequential = device().type == "cpu" and not is_stage_3 and _largest_activation(config, micro_batch) > LARGE
        execution = "sequential" if sequential else "batched"
    direct_calls = config.engine.direct_calls and not is_stage_3  # whose hooks gather the weights
    return replace(config, engine=replace(config.engine, tap_execution=execution, direct_calls=direct_calls))


def _largest_activation(config: PretrainConfig, images: int) -> int:
    """Return the numbers in the widest decoder activation of all taps; beyond a CPU's cache batching gains nothing."""
    tokens = 1 + config.grid[0] * config.grid[1]
    branches = [branch for branch in (config.pixel, config.feature) if branch.enabled]
    return max((len(b.taps) * images * tokens * 4 * b.decoder_width for b in branches), default=0)


def resolve_loss_backend(config: PretrainConfig) -> str:
    """Return the loss implementation for this device: reference or triton. Raise UserError if it cannot run here."""
    try:
        return resolve_impl(config.engine.loss_backend, device(), quiet=True)
    except ValueError as error:
        raise UserError(f"engine.loss_backend is {config.engine.loss_backend}: {error}") from None


def mask_sampler(config: PretrainConfig) -> MaskSampler:
    """Return the function from seeds (int64 [B]) to masks."""
    return partial(sample_mask, config.mask.kind, grid=config.grid, num_masked=config.num_masked)


def build_loader(config: PretrainConfig, rank_batch: RankBatch) -> Loader:
    """Return the loader of the training images; its workers sample the masks."""
    size, seed = config.model.image_size, config.train.seed
    return Loader(config.data, size, seed, rank_batch, device(), sample_masks=mask_sampler(config))


class Targets:
    """What the branches regress besides pixels. This class: nothing, for methods that reconstruct pixels alone."""

    def __init__(self) -> None:
        self.state: dict[str, Checkpointable] = {}  # saved with a checkpoint
        self.modules: Sequence[torch.nn.Module] = ()  # to compile

    def __call__(self, images: Tensor, patches: Tensor | None, mask: Mask, tap_seed: int) -> dict[str, Any]:
        """Compute the targets of a micro-batch. Return them as fields of Inputs; tap_seed: one of them."""
        return {}

    def update(self, momentum: float, applied: Tensor) -> None:
        """Follow the student after its step; applied: float32 [], 0 if the step was skipped."""

    def metrics(self, now: "Schedules") -> dict[str, float]:
        """Return what a log row shows of the targets."""
        return {}


class TeacherTargets(Targets):
    """Tokens of the EMA teacher after the feature branch's taps (paper Eq. 5)."""

    def __init__(self, config: PretrainConfig, engine: Engine, teacher: Teacher):
        super().__init__()
        self.teacher, self._engine, self.config = teacher, engine, config
        self.state = {"teacher": teacher}
        self.modules = (teacher.module,)

    def __call__(self, images: Tensor, patches: Tensor | None, mask: Mask, tap_seed: int) -> dict[str, Any]:
        assert patches is not None
        with self._engine.autocast():
            tokens, event = self.teacher.start_targets(patches, step_taps(self.config, tap_seed), mask)
        return {"teacher_tokens": tokens, "teacher_event": event}

    def update(self, momentum: float, applied: Tensor) -> None:
        self.teacher.update(momentum, applied)

    def metrics(self, now: "Schedules") -> dict[str, float]:
        return {"teacher/momentum": now.momentum, "teacher/feature_weight": now.feature_weight}


class TokenTargets(Targets):
    """Codes of the masked patches in a frozen tokenizer's codebook (BEiT-v2)."""

    def __init__(self, config: PretrainConfig, tokenizer: Tokenizer):
        self._tokenizer, self._autocast = tokenizer, config.engine.precision != "fp32"
        super().__init__()
        self.state = {"tokenizer": FrozenModule("tokenizer", tokenizer)}

    def __call__(self, images: Tensor, patches: Tensor | None, mask: Mask, tap_seed: int) -> dict[str, Any]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self._autocast):
            return {"codes": self._tokenizer.codes(images).gather(1, mask.masked)}


def build_targets(config: PretrainConfig, engine: Engine, tokenizer: Tokenizer | None = None) -> Targets:
    """Return the targets that the config's branches need."""
    if tokenizer is not None:
        return TokenTargets(config, tokenizer.to(engine.device))
    teacher = build_teacher(config, engine)
    return Targets() if teacher is None else TeacherTargets(config, engine, teacher)


def build_teacher(config: PretrainConfig, engine: Engine) -> Teacher | None:
    """Return the EMA teacher, equal to the student; None if the feature branch is off."""
    if not config.feature.enabled:
        return None
    encoder = Encoder(config.model).to(engine.device, engine.dtype)
    teacher = Teacher(encoder, engine.masters(engine.module.encoder), engine.sharded)
    configure_teacher(teacher, config)
    return teacher


def configure_teacher(teacher: Teacher, config: PretrainConfig) -> None:
    """Apply the settings that change the teacher's speed, not its targets."""
    teacher.skip_unused_tokens = config.engine.skip_unused_tokens
    set_direct_calls(teacher.module, config.engine.direct_calls)  # at ZeRO-3, too: its weights are not sharded
    teacher.stream = torch.cuda.Stream() if config.engine.teacher_stream else None
    teacher.graph = GraphedFunction(teacher.compute_targets) if config.engine.teacher_graph else None


def build_tokenizer(config: PretrainConfig) -> Tokenizer:
    """Load the tokenizer that the config names. Raise UserError if it does not fit the model."""
    path, model = config.token.tokenizer, config.model
    if not path:
        raise UserError(
            "token.tokenizer is empty. Name a run of launch/train_tokenizer.py, or a published file of BEiT-v2."
        )
    tokenizer = load_tokenizer(path)
    codes, shape = len(tokenizer.codebook), tokenizer.encoder.shape
    if codes != config.token.codes:
        raise UserError(
            f"token.codes is {config.token.codes}, but {path} has {codes} codes. Pass --token.codes {codes}."
        )
    if (shape.image_size, shape.patch_size) != (model.image_size, model.patch_size):
        raise UserError(
            f"{path} expects images of {describe_size(shape.image_size)} pixels in patches of {shape.patch_size}, but "
            f"the model has {describe_size(model.image_size)} and {model.patch_size}. Use the same for both."
        )
    return tokenizer


class ForwardPass:
    """The forward pass of a micro-batch: mask, distances, targets, losses."""

    def __init__(
        self,
        config: PretrainConfig,
        engine: Engine,
        targets: Targets,
        betas: Betas,
        share: float,
        loss_backend: str,
    ):
        """share: 1 / micro-batches of a step."""
        self.config, self.engine, self.targets, self.betas = config, engine, targets, betas
        self.share, self.loss_backend = share, loss_backend
        self.monitor = CollapseMonitor(config) if config.feature.enabled else None

    def __call__(self, batch: Batch, feature_weight: float, step: int = 0, measure: bool = False) -> Losses:
        """Return the losses.

        feature_weight: of the feature branch, 0 to 1. step: from which the step's taps are drawn. measure: give the
        tokens to the collapse monitor, if there is one.
        """
        config, engine = self.config, self.engine
        if config.engine.student_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # the graphs may overwrite the last step's tensors
        mask = (batch.mask or mask_sampler(config)(batch.seeds)).to(engine.device)
        distance = masked_distance(mask, config.grid, self.loss_backend, config.dynamic.distance_norm)
        patches = None if config.mask.use_mask_token else extract_patches(batch.images, mask, config, engine.dtype)
        tap_seed = int(fold(config.train.seed, step)) if config.taps_per_step else 0
        targets = self.targets(batch.images, patches, mask, tap_seed)
        subset = draw_subset(batch.seeds, config.num_masked, config.num_decoded)
        self.betas.accumulate_norm(distance)
        inputs = Inputs(
            images=batch.images,
            mask=mask,
            distance=distance,
            betas=self.betas.clamped(),
            feature_weight=torch.full((), feature_weight, device=engine.device),
            share=self.share,
            loss_backend=self.loss_backend,
            patches=patches,
            patch_weight=neighbour_weight(mask, config.grid) if config.mask.neighbour_weight else None,
            subset=subset if subset is None else to_device(subset, engine.device),
            tap_seed=tap_seed,
            **targets,
        )
        losses = engine(inputs)
        if measure and self.monitor is not None:
            taps = step_taps(config, tap_seed)
            self.monitor.measure({tap: losses.tokens[tap] for tap in taps}, targets["teacher_tokens"], mask)
        return losses._replace(tokens={})  # so that they are freed after the backward pass

    def metrics(self, now: "Schedules", losses: dict[str, float]) -> dict[str, float]:
        """Return what a log row shows of targets and tokens. losses: the row so far. All ranks call it."""
        row = self.targets.metrics(now)
        if self.monitor is None:
            return row
        warmed_up = now.feature_weight >= 1 and now.epoch >= self.config.optim.warmup_epochs
        return row | self.monitor.read(losses, warmed_up)


def step_taps(config: PretrainConfig, tap_seed: int) -> tuple[int, ...]:
    """Return the blocks after which a step's feature branch compares with the teacher."""
    taps = config.feature.taps
    return tuple(taps[index] for index in draw_taps(len(taps), config.taps_per_step, tap_seed))


def extract_patches(images: Tensor, mask: Mask, config: PretrainConfig, dtype: torch.dtype) -> Tensor:
    """uint8 [B, 3, H, W] -> normalised patches [B, N, P] for student and teacher, the visible ones first.

    Without a teacher the visible ones alone: [B, V, P].
    """
    order = torch.cat(mask, 1) if config.feature.enabled else mask.visible
    patches = gather_tokens(patchify(images, config.model.patch_size), order)
    return normalise_patches(patches, config.data.normalisation, dtype)


class Schedules(NamedTuple):
    """The scheduled values of one step."""

    epoch: float
    lr: float
    momentum: float  # of the teacher
    feature_weight: float  # of the feature branch, 0 to 1


def schedules(config: PretrainConfig, step: int, num_steps: int, epoch_samples: int) -> Schedules:
    """Return the scheduled values of a step, counted from 0; an epoch has `epoch_samples` images."""
    epoch = step * config.data.batch_size / epoch_samples
    warmup_steps = config.optim.warmup_epochs * epoch_samples / config.data.batch_size
    momentum = config.teacher.momentum
    if isinstance(momentum, str):
        momentum = teacher_momentum(epoch, config.data.batch_size, MOMENTUM_SCHEDULES[momentum])
    return Schedules(
        epoch,
        warmup_cosine(step, num_steps, warmup_steps, config.peak_lr, config.optim.min_lr),
        momentum,
        ramp(step, config.feature.warmup_fraction * num_steps),
    )


def compile_modules(
    model: PretrainModel, targets: Targets, backend: str | Callable[..., Any] = "inductor", graphs: bool = False
) -> None:
    """Compile decoders and teacher, each as a whole, and the encoder in segments that end at the taps.

    Compilation is when they first run. backend: of torch.compile. graphs: let inductor run decoders and segments as
    CUDA graphs, forward and backward pass.
    """
    options: dict[str, Any] = {"options": {"triton.cudagraphs": True}} if graphs else {}
    model.encoder.compile_segments(backend=backend, **options)
    for decoder in (module for module in model.modules() if isinstance(module, Decoder)):
        decoder.compile(dynamic=False, backend=backend, **options)
    for module in targets.modules:
        module.compile(dynamic=False, backend=backend)
