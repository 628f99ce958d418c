"""Predicted time of a training step on GPUs, part by part, and what of it is hidden behind other parts.

Counted: operations (training/flops.py), bytes sent (traffic.py), bytes of the update. Vendors' figures: rates of GPUs
and networks. Assumed: the fields of Assumptions, each of which has a flag. No part has been measured on a GPU.
"""

from dataclasses import dataclass, field
from math import ceil, log2
from typing import Any, NamedTuple

from ddae.config.pretrain import PretrainConfig
from ddae.tools.traffic import count_collectives, count_traffic
from ddae.training.flops import Gpu, count_flops, decoder_branches
from ddae.training.gpu_memory import count_parameters

NODE = 8  # GPUs of a node
ADAM_BYTES, EMA_BYTES = 28, 84  # read and written for a number: by fused AdamW, by the eight calls of teacher.py


class Network(NamedTuple):
    """Connection of a node of 8 GPUs to the others."""

    ports: int
    gigabits: float  # of a port per second and direction


NETWORKS = {  # InfiniBand with one port a GPU, as in DGX and HGX nodes; Ethernet with one port a node
    "infiniband-200": Network(8, 200),
    "infiniband-400": Network(8, 400),
    "infiniband-800": Network(8, 800),
    "ethernet-100": Network(1, 100),
}


def _assumed(default: float, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Assumptions:
    """What the plan assumes; the fields are flags of launch/plan.py."""

    mfu: float = _assumed(0.4, "share of the GPU's peak that the matrix products of a step reach")
    network_share: float = _assumed(0.8, "share of the links' rate that collectives reach")
    memory_share: float = _assumed(0.8, "share of the memory's rate that optimizer and EMA update reach")
    latency_us: float = _assumed(30.0, "microseconds that a collective takes at least, for each doubling of nodes")
    host_ms: float = _assumed(3.0, "host milliseconds to launch a micro-batch, for each trained block")
    loader_rate: float = _assumed(3000.0, "images/s that the loader of one GPU delivers")


class StepTime(NamedTuple):
    """Seconds of a step."""

    compute: float
    update: float  # optimizer and EMA
    gradients: float
    prefetch: float  # ZeRO-3's gathers for forward and backward passes
    hidden: float  # part of gradients and prefetch that runs during forward and backward passes
    gather: float  # of weights, after the optimizer step
    teacher: float  # of the teacher's weights
    host: float  # to launch the step; the GPU waits if it is longer than the device's time
    data: float  # to load the step's images, ahead of the step

    @property
    def device(self) -> float:
        communication = self.gradients + self.prefetch - self.hidden + self.gather + self.teacher
        return self.compute + self.update + communication

    @property
    def total(self) -> float:
        return max(self.device, self.host, self.data)

    @property
    def bound(self) -> str:
        """What the step waits for."""
        return {self.device: "GPU", self.host: "host", self.data: "loader"}[self.total]


def predict_step(
    config: PretrainConfig,
    settings: dict[str, Any],
    stage: int,
    gpus: int,
    gpu: Gpu,
    network: Network,
    micro: int,
    assumed: Assumptions,
) -> StepTime:
    """Predict the step at a ZeRO stage. settings: a DeepSpeed JSON. micro: images of a micro-batch."""
    accumulation = config.data.batch_size // (micro * gpus)
    images, flops, counts = micro * accumulation, count_flops(config), count_parameters(config)
    rate = assumed.mfu * 1e12 * (gpu.in_fp32 if config.engine.precision == "fp32" else gpu.teraflops)
    backward = 2 / 3 * images * (flops.total - flops.teacher) / rate  # twice the operations of the forward pass
    forward = images * flops.total / rate - backward
    shards = gpus if stage > 0 else 1
    updated = ADAM_BYTES * counts.model + EMA_BYTES * counts.encoder * config.feature.enabled
    update = updated / shards / (assumed.memory_share * gpu.memory_rate * 1e9)

    nodes = ceil(gpus / NODE)
    link = gpu.link if nodes == 1 else min(gpu.link, network.ports * network.gigabits / 8)
    latency = assumed.latency_us * 1e-6 * (1 + log2(nodes)) * (gpus > 1)
    sent = count_traffic(config, settings, stage, gpus, accumulation)
    calls = count_collectives(config, settings, stage, accumulation)
    times = [
        size / (assumed.network_share * link * 1e9) + latency * number for size, number in zip(sent, calls, strict=True)
    ]
    gradients, prefetch, gather, teacher, small = times

    overlaps = stage > 0 and settings.get("zero_optimization", {}).get("overlap_comm", stage == 3)
    during = backward / accumulation if stage == 1 else backward  # ZeRO-1 reduces after the last micro-batch
    last = gradients * (accumulation if stage > 1 else 1) / max(calls.gradients, 1)  # the last bucket has to be awaited
    hidden = min(max(gradients - last, 0.0), during) if overlaps else 0.0
    hidden += min(prefetch, forward + backward - hidden) if overlaps else 0.0
    blocks = config.model.depth + sum(branch.decoder_depth for branch in decoder_branches(config))
    host, data = accumulation * assumed.host_ms * 1e-3 * blocks, images / assumed.loader_rate
    compute = forward + backward
    return StepTime(compute, update, gradients, prefetch, hidden, gather, teacher + small, host, data)


def efficiency(step: StepTime, config: PretrainConfig, stage: int, gpus: int) -> float:
    """Return the images/s of a GPU relative to one GPU alone that is limited by its computation alone.

    That GPU computes the whole batch in micro-batches, with one unsharded update.
    """
    shards = gpus if stage > 0 else 1
    return (gpus * step.compute + step.update * shards) / (gpus * step.total)
