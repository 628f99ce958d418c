"""What a step of pretraining is made of: settings for this machine, the teacher, the forward pass, schedules."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from ddae_kernels.implementation import choose
from torch import Tensor

from ddae.config.pretrain import Config
from ddae.data.loader import Batch
from ddae.data.masking import Mask, sample_mask
from ddae.data.reader import DrawMask
from ddae.distributed.comm import device
from ddae.distributed.engine import Engine
from ddae.errors import UserError
from ddae.export.encoder import load_tokenizer
from ddae.method.betas import Betas
from ddae.method.branches import Inputs
from ddae.method.distance import masked_distance, neighbour_weight
from ddae.method.model import Losses, Method
from ddae.method.teacher import Teacher
from ddae.models.decoder import Decoder
from ddae.models.patches import gather_tokens, normalise_patches, patchify
from ddae.models.tokenizer import Tokenizer
from ddae.models.vit import Encoder
from ddae.training.schedules import TEACHER_LINE, TEACHER_MOMENTUM, ramp, teacher_momentum, warmup_cosine

POINTS = {"schedule": TEACHER_MOMENTUM, "linear": TEACHER_LINE}  # of teacher.momentum
LARGE = 2**24  # numbers: 64 MiB in fp32


def settle(config: Config, ds_json: dict[str, Any]) -> Config:
    """`engine.taps` without auto; UserError where the ZeRO stage or the device does not allow what `engine` says."""
    if config.engine.teacher_stream and device().type == "cpu":
        raise UserError("--engine.teacher_stream is for a GPU, a CPU has no streams: leave it out")
    if config.feature.enabled and config.feature.target_norm == "batch_layer":
        micro = ds_json["train_micro_batch_size_per_gpu"]
        if micro != config.data.batch_size:
            raise UserError(
                f"feature.target_norm batch_layer takes statistics over the whole batch of {config.data.batch_size} "
                f"images, and a rank sees {micro} at a time: use one rank without accumulation, or instance_layer"
            )
    stage_3, taps = ds_json.get("zero_optimization", {}).get("stage", 0) == 3, config.engine.taps
    if stage_3 and taps == "sequential":
        raise UserError(
            "--engine.taps sequential keeps the gradients of whole parameters, which ZeRO-3 has only in parts: take "
            "--engine.taps batched, or another stage"
        )
    if taps == "auto":
        taps = "sequential" if device().type == "cpu" and not stage_3 and _is_large(config, ds_json) else "batched"
    return replace(config, engine=replace(config.engine, taps=taps))


def _is_large(config: Config, ds_json: dict[str, Any]) -> bool:
    """Whether the widest thing that all taps make together is more than a CPU has cache for, so that batching them
    gains nothing."""
    images, tokens = ds_json["train_micro_batch_size_per_gpu"], 1 + config.grid[0] * config.grid[1]
    numbers = [len(b.taps) * images * tokens * 4 * b.decoder_width for b in (config.pixel, config.feature) if b.enabled]
    return max(numbers, default=0) > LARGE


def loss_kernels(config: Config) -> str:
    """The implementation of the loss that serves this device; UserError where the one asked for cannot."""
    try:
        return choose(config.engine.kernels, device(), quiet=True)  # the run's first line says it
    except ValueError as error:
        raise UserError(f"--engine.kernels {config.engine.kernels}: {error}") from None


def mask_drawer(config: Config) -> DrawMask:
    """Masks by seeds, as the config has them."""
    return partial(sample_mask, config.mask.kind, grid=config.grid, num_masked=config.num_masked)


def forward(
    config: Config,
    engine: Engine,
    teacher: Teacher | Tokenizer | None,
    betas: Betas,
    feature_weight: float,
    share: float,
    kernels: str,
    batch: Batch,
) -> Losses:
    """One micro-batch: masks and distances, the teacher's targets, the student's losses."""
    mask = (batch.mask or mask_drawer(config)(batch.seeds)).to(engine.device)
    distance = masked_distance(mask, config.grid, kernels, config.dynamic.distance_norm)
    patch_weight = neighbour_weight(mask, config.grid) if config.mask.neighbour_weight else None
    targets = ready = codes = None
    patches = None if config.mask.replaced else cut(batch.images, mask, config, engine.dtype)
    if isinstance(teacher, Tokenizer):
        with torch.autocast(engine.device.type, torch.bfloat16, enabled=config.engine.precision != "fp32"):
            codes = teacher.codes(batch.images).gather(1, mask.masked)
    elif teacher is not None and patches is not None:
        with engine.autocast():
            targets, ready = teacher.start(patches, config.feature.taps, mask)
    betas.add_norm(distance)
    weight = torch.full((), feature_weight, device=engine.device)
    inputs = Inputs(batch.images, mask, distance, betas.used(), targets, weight, share, kernels, codes, patches, ready)
    return engine(inputs._replace(patch_weight=patch_weight))


def cut(images: Tensor, mask: Mask, config: Config, dtype: torch.dtype) -> Tensor:
    """uint8 [B, 3, H, W] -> normalised patches [B, N, P], visible ones first, for student and teacher; without a
    teacher the visible ones alone."""
    order = torch.cat(mask, 1) if config.feature.enabled else mask.visible
    patches = gather_tokens(patchify(images, config.model.patch_size), order)
    return normalise_patches(patches, config.data.normalisation, dtype)


def build_teacher(config: Config, engine: Engine) -> Teacher | None:
    """The momentum encoder, equal to the student; None where no branch asks for it."""
    if not config.feature.enabled:
        return None
    encoder = Encoder(config.model).to(engine.device, engine.dtype)
    teacher = Teacher(encoder, engine.masters(engine.module.encoder), engine.sharded)
    set_up_teacher(teacher, config)
    return teacher


def set_up_teacher(teacher: Teacher, config: Config) -> None:
    """How it works; what it computes stays the same."""
    teacher.only_masked = config.engine.shortcuts
    teacher.stream = torch.cuda.Stream() if config.engine.teacher_stream else None


def build_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer that the config names; UserError where it does not fit the model."""
    where, model = config.token.tokenizer, config.model
    if not where:
        raise UserError("token.tokenizer is empty: name a run of launch/train_tokenizer.py or a file of BEiT-v2's")
    tokenizer = load_tokenizer(where)
    codes, shape = len(tokenizer.codebook), tokenizer.encoder.shape
    if codes != config.token.codes:
        raise UserError(f"{where} has a codebook of {codes}, and token.codes is {config.token.codes}: make them equal")
    if (shape.image_size, shape.patch_size) != (model.image_size, model.patch_size):
        raise UserError(
            f"{where} reads images of {shape.image_size} pixels in patches of {shape.patch_size}, the model "
            f"{model.image_size} in {model.patch_size}: make them equal"
        )
    return tokenizer


class Schedules(NamedTuple):
    """What the course of training sets for one step."""

    epoch: float
    lr: float
    momentum: float  # the teacher's
    ramp: float  # weight of the feature branch


def schedules(config: Config, step: int, steps: int, epoch_samples: int) -> Schedules:
    """The numbers of a step, counted from 0, of a run of so many; an epoch has so many samples."""
    epoch = step * config.data.batch_size / epoch_samples
    warmup_steps = config.optim.warmup_epochs * epoch_samples / config.data.batch_size
    momentum = config.teacher.momentum
    return Schedules(
        epoch,
        warmup_cosine(step, steps, warmup_steps, config.peak_lr, config.optim.min_lr),
        teacher_momentum(epoch, config.data.batch_size, POINTS[momentum]) if isinstance(momentum, str) else momentum,
        ramp(step, config.feature.ramp * steps),
    )


def compile_parts(method: Method, teacher: Teacher | Tokenizer | None) -> None:
    """Have encoder, decoders and teacher compiled when they first run, each as a whole, for the shapes they meet."""
    decoders = [module for module in method.modules() if isinstance(module, Decoder)]
    for part in (method.encoder, *decoders, *([teacher.module] if isinstance(teacher, Teacher) else [])):
        part.compile(dynamic=False)
