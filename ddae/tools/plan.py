"""Estimate the cost of a run before it starts: memory of a GPU and time of a step by part, FLOPs, traffic, days."""

from dataclasses import fields, replace
from typing import Any

from ddae.config.pretrain import PretrainConfig
from ddae.errors import UserError
from ddae.tools.step_time import NETWORKS, Assumptions, StepTime, efficiency, predict_step
from ddae.tools.traffic import count_traffic
from ddae.training.collapse import collapse_risks
from ddae.training.flops import GPUS, count_flops
from ddae.training.gpu_memory import (
    GIB,
    USABLE,
    activation_bytes,
    count_parameters,
    estimate_memory,
    largest_micro_batch,
)

TIME_COLUMNS = (
    "compute  update  gradients  prefetch  hidden  gather  teacher   host    data    step   bound  images/s  efficiency"
)
TIME_WIDTHS = 7, 6, 9, 8, 6, 6, 7, 5, 6, 6


def format_plan(
    config: PretrainConfig,
    settings: dict[str, Any],
    gpu_counts: list[int],
    gpu_name: str,
    network_name: str,
    micro: int | None,
    images: int,
    assumed: Assumptions,
) -> str:
    """Return the plan as text. Raise UserError if a name is unknown or the batch cannot be divided.

    gpu_counts: numbers of GPUs, the first one for the memory, all for the time of a step. micro: micro-batch, None for
    the JSON's. images: of the data set.
    """
    gpu_name = gpu_name.lower()
    gpu_name = gpu_name if gpu_name in GPUS else f"{gpu_name}-80g"  # A100, H100
    if gpu_name not in GPUS:
        raise UserError(f"--gpu {gpu_name.removesuffix('-80g')} is unknown. Choose one of {', '.join(GPUS)}.")
    if network_name not in NETWORKS:
        raise UserError(f"--network {network_name} is unknown. Choose one of {', '.join(NETWORKS)}.")
    numbers = [("gpus", count) for count in gpu_counts] + [("images", images)]
    for flag, value in numbers + [(each.name, getattr(assumed, each.name)) for each in fields(assumed)]:
        if value <= 0:
            raise UserError(f"--{flag} is {value}; expected a number above 0.")
    gpus, network = gpu_counts[0], NETWORKS[network_name]
    gpu, batch = GPUS[gpu_name], config.data.batch_size
    micro = int(micro or settings.get("train_micro_batch_size_per_gpu") or batch // gpus)
    if micro < 1 or batch % (micro * gpus):
        problem = f"data.batch_size {batch} is not divisible by {gpus} GPUs x micro-batch {micro}."
        raise UserError(f"{problem} Change --data.batch_size, --gpus or --micro_batch.")
    counts, flops, accumulation = count_parameters(config), count_flops(config), batch // (micro * gpus)
    peak_teraflops = gpu.in_fp32 if config.engine.precision == "fp32" else gpu.teraflops
    max_rate, samples = gpus * peak_teraflops * 1e12 / flops.total, config.num_steps(images) * batch
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    step = predict_step(config, settings, stage, gpus, gpu, network, micro, assumed)
    days = samples / batch * step.total / 86400
    shares = ", ".join(f"{name} {value / flops.total:.0%}" for name, value in flops._asdict().items() if value)
    lines = [
        f"{config.preset} on {gpus} x {gpu_name}, {config.engine.precision}: {counts.model / 1e6:.1f} million "
        f"parameters, {counts.encoder / 1e6:.1f} million in the encoder",
        f"batch      {batch} = {gpus} GPUs x {micro} images x {accumulation}",
        f"compute    {flops.total / 1e9:,.1f} GFLOP an image: {shares}",
        f"speed      {max_rate:,.0f} images/s at the GPUs' peak of {peak_teraflops:g} TFLOP/s; "
        f"{batch / step.total:,.0f} predicted at ZeRO {stage}",
        f"schedule   {samples / images:,.4g} epochs of {images:,} images: {days:.2f} days, "
        f"{24 * days * gpus:,.0f} GPU hours, predicted at ZeRO {stage}",
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
        sent = count_traffic(config, settings, stage, gpus, accumulation).total / GIB
        lines.append(f"{stage:4}  {numbers}  {fits:>4}  {max_micro:5}  {sent:6.2f}")
    checkpointed = replace(config, engine=replace(config.engine, activation_checkpointing=True))
    gib_checkpointed = activation_bytes(checkpointed, micro) / GIB
    lines.append(f"with --engine.activation_checkpointing the activations are {gib_checkpointed:.2f} GiB")
    lines += ["", *_time_lines(config, settings, gpu_counts, gpu_name, network_name, micro, assumed)]
    lines += [f"warning: {risk}" for risk in collapse_risks(config, config.num_steps(images))]
    return "\n".join(lines)


def _time_lines(
    config: PretrainConfig,
    settings: dict[str, Any],
    gpu_counts: list[int],
    gpu_name: str,
    network_name: str,
    micro: int,
    assumed: Assumptions,
) -> list[str]:
    """Return the tables of the predicted step: at each ZeRO stage, and on each number of GPUs if there are several."""
    gpu, network, gpus = GPUS[gpu_name], NETWORKS[network_name], gpu_counts[0]
    connection = f"{network.ports} x {network.gigabits:g} Gb/s a node of 8, {gpu.link:g} GB/s inside"
    lines = [
        f"predicted ms of a step on {gpus} GPUs, {network_name} ({connection})",
        "hidden: of gradients and prefetch, behind forward and backward passes; efficiency: relative to one GPU alone",
        f"ZeRO  {TIME_COLUMNS}",
    ]
    for stage in range(4):
        step = predict_step(config, settings, stage, gpus, gpu, network, micro, assumed)
        lines.append(f"{stage:4}  {_time_row(step, config, stage, gpus)}")
    if len(gpu_counts) > 1:
        stage = settings.get("zero_optimization", {}).get("stage", 0)
        lines += [
            "",
            f"the same at ZeRO {stage}, with the largest micro-batch that fits",
            f"GPUs  micro  {TIME_COLUMNS}",
        ]
        for count in gpu_counts:
            largest = largest_micro_batch(config, settings, stage, count, gpu.memory * GIB)
            if largest == 0:
                lines.append(f"{count:4}  no micro-batch fits, or none divides the batch of {config.data.batch_size}")
                continue
            step = predict_step(config, settings, stage, count, gpu, network, largest, assumed)
            lines.append(f"{count:4}  {largest:5}  {_time_row(step, config, stage, count)}")
    lines += ["", "assumed, not measured on a GPU; each is a flag:"]
    return lines + [
        f"  --{each.name} {getattr(assumed, each.name):g}: {each.metadata['help']}" for each in fields(assumed)
    ]


def _time_row(step: StepTime, config: PretrainConfig, stage: int, gpus: int) -> str:
    numbers = "  ".join(f"{1000 * v:{w}.1f}" for v, w in zip((*step, step.total), TIME_WIDTHS, strict=True))
    share = efficiency(step, config, stage, gpus)
    return f"{numbers}  {step.bound:>6}  {config.data.batch_size / step.total:8,.0f}  {share:10.0%}"
