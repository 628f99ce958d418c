"""Estimate the cost of a run before it starts: memory of a GPU by part, FLOPs an image, traffic of a step, days."""

from dataclasses import replace
from typing import Any

from ddae.config.pretrain import PretrainConfig
from ddae.errors import UserError
from ddae.training.collapse import collapse_risks
from ddae.training.flops import GPUS, count_flops
from ddae.training.gpu_memory import (
    GIB,
    USABLE,
    activation_bytes,
    bytes_per_number,
    bytes_per_reduced_number,
    count_parameters,
    estimate_memory,
    largest_micro_batch,
)


def bytes_sent(config: PretrainConfig, stage: int, gpus: int, accumulation: int) -> float:
    """Return the bytes that a GPU sends in a step by ring collectives: gradients, weights, the teacher's copy."""
    counts, (weight_bytes, _) = count_parameters(config), bytes_per_number(config)
    n, ring_share = counts.model, (gpus - 1) / gpus
    # Passes over all numbers: at stages 1 and 2, too, DeepSpeed all-reduces gradients (2), then gathers weights (1).
    gradients = {0: 2, 1: 2, 2: 2 * accumulation, 3: accumulation}[stage] * bytes_per_reduced_number(config)
    weights = {0: 0, 1: 1, 2: 1, 3: 2 * accumulation}[stage] * weight_bytes
    teacher = 2 * weight_bytes * counts.encoder if stage > 0 and config.feature.enabled else 0
    return ring_share * ((gradients + weights) * n + teacher)


def format_plan(
    config: PretrainConfig,
    settings: dict[str, Any],
    gpus: int,
    gpu_name: str,
    micro: int | None,
    images: int,
    mfu: float,
) -> str:
    """Return the plan as text. Raise UserError if the GPU is unknown or the batch cannot be divided.

    micro: micro-batch, None for the JSON's. images: of the data set. mfu: assumed model FLOPs utilisation, 0 to 1.
    """
    if gpu_name not in GPUS:
        raise UserError(f"--gpu {gpu_name} is unknown. Choose one of {', '.join(GPUS)}.")
    for flag, value in {"gpus": gpus, "images": images, "mfu": mfu}.items():
        if value <= 0:
            raise UserError(f"--{flag} is {value}; expected a number above 0.")
    gpu, batch = GPUS[gpu_name], config.data.batch_size
    micro = int(micro or settings.get("train_micro_batch_size_per_gpu") or batch // gpus)
    if micro < 1 or batch % (micro * gpus):
        problem = f"data.batch_size {batch} is not divisible by {gpus} GPUs x micro-batch {micro}."
        raise UserError(f"{problem} Change --data.batch_size, --gpus or --micro_batch.")
    counts, flops, accumulation = count_parameters(config), count_flops(config), batch // (micro * gpus)
    peak_teraflops = gpu.in_fp32 if config.engine.precision == "fp32" else gpu.teraflops
    max_rate, samples = gpus * peak_teraflops * 1e12 / flops.total, config.num_steps(images) * batch
    days = samples / (mfu * max_rate) / 86400
    shares = ", ".join(f"{name} {value / flops.total:.0%}" for name, value in flops._asdict().items() if value)
    lines = [
        f"{config.preset} on {gpus} x {gpu_name}, {config.engine.precision}: {counts.model / 1e6:.1f} million "
        f"parameters, {counts.encoder / 1e6:.1f} million in the encoder",
        f"batch      {batch} = {gpus} GPUs x {micro} images x {accumulation}",
        f"compute    {flops.total / 1e9:,.1f} GFLOP an image: {shares}",
        f"speed      {max_rate:,.0f} images/s at the GPUs' peak of {peak_teraflops:g} TFLOP/s; "
        f"{mfu * max_rate:,.0f} at {mfu:.0%} of it",
        f"schedule   {samples / images:,.4g} epochs of {images:,} images at {mfu:.0%}: {days:.2f} days, "
        f"{24 * days * gpus:,.0f} GPU hours",
        "",
        f"GiB on a GPU with {gpu.memory:g} GiB; max: largest micro-batch that fits; sent: GiB a GPU sends in a step",
        "ZeRO  weights  gradients  optimizer  teacher  activations  buffers     peak  fits    max    sent",
    ]
    for stage in range(4):
        memory = estimate_memory(config, settings, stage, gpus, micro)
        fits = "yes" if memory.peak < USABLE * gpu.memory * GIB else "no"
        max_micro = largest_micro_batch(config, settings, stage, gpus, gpu.memory * GIB)
        gib = [value / GIB for value in (*memory[:6], memory.peak)]
        numbers = "  ".join(f"{v:{w}.2f}" for v, w in zip(gib, (7, 9, 9, 7, 11, 7, 7), strict=True))
        sent = bytes_sent(config, stage, gpus, accumulation) / GIB
        lines.append(f"{stage:4}  {numbers}  {fits:>4}  {max_micro:5}  {sent:6.2f}")
    checkpointed = replace(config, engine=replace(config.engine, activation_checkpointing=True))
    gib_checkpointed = activation_bytes(checkpointed, micro) / GIB
    lines.append(f"with --engine.activation_checkpointing the activations are {gib_checkpointed:.2f} GiB")
    lines += [f"warning: {risk}" for risk in collapse_risks(config, config.num_steps(images))]
    return "\n".join(lines)
