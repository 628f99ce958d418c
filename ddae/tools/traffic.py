"""Bytes that each GPU sends in a training step, by purpose, computed from the sizes of the parameters.

Collectives are assumed to be rings: of S bytes on W GPUs each GPU sends 2 (W - 1) / W S in an all-reduce, and half of
that in an all-gather or a reduce-scatter. tests/tools/test_traffic.py compares the result with a real step.
"""

from functools import cache
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import nn

from ddae.config.pretrain import PretrainConfig, beta_names
from ddae.method.model import build_uninitialised_model
from ddae.training.gpu_memory import (
    BUCKET,
    LIVE,
    PERSISTENT,
    bytes_per_number,
    bytes_per_reduced_number,
    count_parameters,
)

REUSE_DISTANCE, PREFETCH_BUCKET = 1_000_000_000, 50_000_000  # DeepSpeed's defaults at ZeRO-3, in numbers
SENT_IN_BF16 = nn.Linear, nn.Conv2d  # classes, not subclasses, whose weights DeepSpeed sends in bf16 under autocast
GRADIENT_CHECK = {0: 0, 1: 4, 2: 4, 3: 16}  # ZeRO stage -> bytes that are all-reduced to find non-finite gradients
STATISTICS = 11  # fp32 values of a tap that the collapse monitor averages over the ranks


class Traffic(NamedTuple):
    """Bytes that each GPU sends in a step."""

    gradients: float
    prefetch: float  # weights that ZeRO-3 gathers for forward and backward passes
    gather: float  # weights that are gathered after the optimizer step
    teacher: float  # of the teacher's weights that run forward
    small: float  # the betas' gradients, the check of all gradients, the metrics of a log step

    @property
    def total(self) -> float:
        return sum(self)


class Weight(NamedTuple):
    """A parameter as DeepSpeed sends its gradient, and at ZeRO-3 itself."""

    numel: int
    bytes_sent: int  # of one number

    def padded_bytes(self, gpus: int) -> int:
        """Return the bytes of all shards, which have the same size."""
        return ceil(self.numel / gpus) * gpus * self.bytes_sent


def count_traffic(
    config: PretrainConfig, settings: dict[str, Any], stage: int, gpus: int, accumulation: int
) -> Traffic:
    """Return the bytes that each of `gpus` GPUs sends in a step of `accumulation` micro-batches.

    settings: a DeepSpeed JSON, for ZeRO-3's limits. Not counted: what ZeRO-3 gathers for activation checkpointing.
    """
    prefetched, gathered_after = _gather_bytes(config, settings, stage, gpus)
    sizes = (
        _gradient_bytes(config, stage, gpus, accumulation),
        accumulation * prefetched,
        gathered_after,
        _teacher_bytes(config, stage, gpus),
        _small_bytes(config, stage),
    )
    return Traffic(*((gpus - 1) / gpus * size for size in sizes))


def count_collectives(config: PretrainConfig, settings: dict[str, Any], stage: int, accumulation: int) -> Traffic:
    """Return the number of collectives of a step, by purpose.

    At ZeRO-3 the number of gathers of a pass is a lower bound: DeepSpeed gathers as many weights at a time as fit into
    its bucket, and fewer if its limit of live weights is reached.
    """
    zero, counts, weights = settings.get("zero_optimization", {}), count_parameters(config), _weights(config)
    micro_batches = accumulation if stage > 1 else 1
    buckets = micro_batches * ceil(counts.model / zero.get("reduce_bucket_size", BUCKET))
    has_teacher = stage > 0 and config.feature.enabled
    if stage < 3:
        return Traffic(buckets, 0, len(counts.groups) if stage else 0, has_teacher, 4)
    threshold = zero.get("stage3_param_persistence_threshold", PERSISTENT)
    small = [weight.numel for weight in weights if weight.numel <= threshold]
    bucket = zero.get("stage3_prefetch_bucket_size", PREFETCH_BUCKET) or max(weight.numel for weight in weights)
    passes = 2 * micro_batches * ceil((counts.model - sum(small)) / bucket)
    return Traffic(buckets, passes, len(small), has_teacher, 5)


def _gradient_bytes(config: PretrainConfig, stage: int, gpus: int, accumulation: int) -> float:
    """Return the bytes of all gradients, twice if they are all-reduced, as at all stages but 3."""
    weights = _weights(config)
    if stage == 0 or config.engine.reduce_dtype == "fp32":
        weights = [weight._replace(bytes_sent=bytes_per_reduced_number(config)) for weight in weights]
    if stage == 3:
        return accumulation * sum(weight.padded_bytes(gpus) for weight in weights)
    return 2 * sum(weight.numel * weight.bytes_sent for weight in weights) * (accumulation if stage == 2 else 1)


def _gather_bytes(config: PretrainConfig, settings: dict[str, Any], stage: int, gpus: int) -> tuple[float, float]:
    """Return the bytes of the weights that are gathered in a micro-batch, and of those after the optimizer step.

    ZeRO-3 gathers a weight before its forward pass, and again before its backward pass unless it was kept. Each GPU
    keeps the small weights all the time, and gathers them after the optimizer step.
    """
    bytes_of_one = bytes_per_number(config)[0]
    if stage == 0:
        return 0.0, 0.0
    if stage < 3:
        groups = count_parameters(config).of_groups()
        return 0.0, bytes_of_one * sum(ceil(size / (2 * gpus)) * 2 * gpus for size in groups)  # padded by DeepSpeed
    zero = settings.get("zero_optimization", {})
    threshold = zero.get("stage3_param_persistence_threshold", PERSISTENT)
    kept = zero.get("stage3_max_reuse_distance", REUSE_DISTANCE) / 2  # there and back
    if zero.get("stage3_prefetch_bucket_size", PREFETCH_BUCKET) > 0:  # prefetching passes the turn, and keeps these
        kept = max(kept, zero.get("stage3_max_live_parameters", LIVE))
    prefetched, later = 0.0, 0  # later: numbers of the partitioned weights that run after this one
    small = [weight._replace(bytes_sent=bytes_of_one) for weight in _weights(config) if weight.numel <= threshold]
    for weight in reversed([weight for weight in _weights(config) if weight.numel > threshold]):
        prefetched += (1 if later < kept else 2) * weight.padded_bytes(gpus)
        later += weight.numel
    return prefetched, sum(weight.padded_bytes(gpus) for weight in small)


def _teacher_bytes(config: PretrainConfig, stage: int, gpus: int) -> float:
    """Return the bytes that an all-gather of the teacher's weights fills, where the master weights are sharded.

    Each GPU contributes as many numbers as the one that has most of the encoder (distributed/shard_gather.py).
    """
    if stage == 0 or not config.feature.enabled:
        return 0.0
    of_gpus, groups = [0] * gpus, count_parameters(config).groups
    for group in groups:
        if stage == 3:  # each weight is divided among the GPUs
            own = sum(ceil(size / gpus) for size, of_encoder in group if of_encoder)
            of_gpus = [numbers + own for numbers in of_gpus]
            continue
        partition, start = 2 * ceil(sum(size for size, _ in group) / (2 * gpus)), 0
        for size, of_encoder in group:
            for gpu in range(start // partition, ceil((start + size) / partition)) if of_encoder else ():
                of_gpus[gpu] += min(start + size, (gpu + 1) * partition) - max(start, gpu * partition)
            start += size
    return gpus * max(of_gpus) * bytes_per_number(config)[0]


def _small_bytes(config: PretrainConfig, stage: int) -> float:
    """Return twice the bytes of what is all-reduced besides weights and gradients."""
    betas, taps = len(beta_names(config)), sum(len(branch.taps) for branch in config.branches.values())
    metrics = 1 + 2 * (taps + config.token.cls * config.token.enabled)  # the total; loss and error of each tap
    if config.feature.enabled:
        metrics += STATISTICS * config.num_step_taps(config.feature)
    return 2 * (GRADIENT_CHECK[stage] + 4 * (3 * betas + metrics))


@cache
def _weights(config: PretrainConfig) -> list[Weight]:
    """Return the parameters in the order of the forward pass."""
    with torch.device("meta"):
        model = build_uninitialised_model(config)
    in_bf16: set[int] = set()
    if config.engine.precision == "autocast":
        layers = [module for module in model.modules() if type(module) in SENT_IN_BF16]
        in_bf16 = {id(parameter) for layer in layers for parameter in layer.parameters()}
    whole = bytes_per_number(config)[0]
    return [Weight(each.numel(), 2 if id(each) in in_bf16 else whole) for each in model.parameters()]
