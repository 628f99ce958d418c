"""One way to compute a training step, in a process of its own (ladder.py starts it): what it is asked on its standard
input it answers on its standard output, in JSON.

    build        (first) makes two steps
    time N       seconds of each of N steps
    peak         bytes that a step takes at most: of the GPU, or resident
    count        floating-point operations an image, and how often the host waits for the device in a step
    profile F    writes a trace of a step to F; a table of where its time goes
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ddae.config import deepspeed as ds_config
from ddae.config.cli import parse
from ddae.config.pretrain import PretrainConfig, beta_names
from ddae.data.loader import Batch
from ddae.data.reader import RankBatch
from ddae.distributed.comm import device
from ddae.distributed.engine import Engine, plain_deepspeed, start_process_group
from ddae.method.betas import Betas
from ddae.method.distance import masked_distance
from ddae.method.model import build_model
from ddae.method.naive import NaiveEncoder, NaiveMethod, ema_update, to_pixels
from ddae.method.teacher import MovingAverage
from ddae.training.optimizer import build_optimizer
from ddae.training.step import (
    ForwardPass,
    build_loader,
    build_targets,
    compile_modules,
    mask_sampler,
    resolve_auto,
    resolve_loss_backend,
)

LR, MOMENTUM = 1e-4, 0.999
WAITS = {
    "cuda": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    "cpu": ("aten::_local_scalar_dense",),
}


class OwnStep:
    """This project's step, as pretraining runs it."""

    def __init__(self, config: PretrainConfig, ds_json: dict[str, Any]):
        resolved, backend = resolve_auto(config, ds_json), resolve_loss_backend(config)
        model = build_model(resolved)
        self.engine = Engine(model, build_optimizer(model, config.optim), ds_json)
        self.targets = build_targets(resolved, self.engine)
        if config.engine.compile:
            compile_modules(self.engine.module, self.targets)
        self.betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, self.engine.device)
        self.forward = ForwardPass(resolved, self.engine, self.targets, self.betas, 1.0, backend)

    def __call__(self, batch: Batch) -> Tensor:
        losses = self.forward(batch, 1.0)
        self.engine.backward(losses.total)
        applied = self.engine.step(LR)
        self.betas.step(LR, applied)
        self.targets.update(MOMENTUM, applied)
        return losses.total.detach()


class NaiveStep:
    """naive.py under DeepSpeed as it comes, or, with `own_engine`, under this project's engine and average."""

    def __init__(self, config: PretrainConfig, ds_json: dict[str, Any], own_engine: bool):
        self.config, self.own = config, own_engine
        method = NaiveMethod(config)
        method.load_state_dict(build_model(config).state_dict())
        teacher = NaiveEncoder(config).to(device()).requires_grad_(False).eval()
        teacher.load_state_dict(method.encoder.state_dict())
        self.teacher = teacher if config.feature.enabled else None
        if own_engine:
            self.engine: Any = Engine(method, build_optimizer(method, config.optim), ds_json)
            masters = self.engine.masters(self.engine.module.encoder)
            if self.teacher is not None:
                self.average = MovingAverage(teacher.to(self.engine.dtype), masters, self.engine.sharded)
        else:
            zero = {"stage": ds_json.get("zero_optimization", {}).get("stage", 0)}
            keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping", "torch_autocast")
            plain = {key: ds_json[key] for key in keys} | {"zero_optimization": zero, "bf16": ds_json["bf16"]}
            optimizer = torch.optim.AdamW(build_optimizer(method, config.optim).param_groups, betas=(0.9, 0.95))
            for group in optimizer.param_groups:
                group["fused"] = None
            self.engine = plain_deepspeed(method, optimizer, plain)
        self.betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, device())
        self.applied = torch.ones((), device=device())

    def __call__(self, batch: Batch) -> Tensor:
        config, module, low = self.config, self.engine.module, self.config.engine.precision != "fp32"
        mask = (batch.mask or mask_sampler(config)(batch.seeds)).to(device())
        distance = masked_distance(mask, config.grid, "reference", config.dynamic.distance_norm)
        tokens = None
        if self.teacher is not None:
            pixels = to_pixels(batch.images, config.data.normalisation)
            with torch.no_grad(), torch.autocast(device().type, torch.bfloat16, enabled=low):
                tokens = self.teacher(pixels.to(self.engine.dtype if self.own else torch.float32))
        self.betas.add_norm(distance)
        loss = self.engine(batch.images, mask.visible, mask.masked, distance, self.betas.used(), tokens, 1.0)
        self.engine.backward(loss)
        if self.own:
            applied = self.engine.step(LR)
            self.betas.step(LR, applied)
            if self.teacher is not None:
                self.average.update(MOMENTUM, applied)
            return loss.detach()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = LR
        self.engine.step()
        self.betas.step(LR, self.applied)
        if self.teacher is not None:
            ema_update(self.teacher, module.encoder.named_parameters(), MOMENTUM)
        loss.item()
        return loss.detach()


def build(kind: str, config: PretrainConfig) -> Callable[[Batch], Tensor]:
    ds_json = ds_config.resolve(ds_config.load(config.ds_config), config, 1).json
    return OwnStep(config, ds_json) if kind == "own" else NaiveStep(config, ds_json, kind == "engine")


def batches(config: PretrainConfig) -> Iterator[Batch]:
    """Of the loader, or, without data, the same random images again and again."""
    size, count = config.model.image_size, config.data.batch_size
    if config.data.train:
        loader = build_loader(config, RankBatch(count, count, 0, 1))
        loader.select_backend()
        yield from loader.batches(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=device())
    numbers = torch.arange(count)
    mask = mask_sampler(config)(numbers)  # by readers, as the images
    while True:
        yield Batch(images, numbers, numbers, mask)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(step: Callable[[], object], count: int) -> list[float]:
    """Of each of `count` steps; on a GPU their mean, for they overlap."""
    synchronise()
    times = [time.perf_counter()]
    for _ in range(count):
        step()
        if not torch.cuda.is_available():
            times.append(time.perf_counter())
    synchronise()
    if torch.cuda.is_available():
        return [(time.perf_counter() - times[0]) / count] * count
    return [end - start for start, end in pairwise(times)]


def peak_bytes(step: Callable[[], object]) -> int:
    """Of one step: allocated on the GPU, or resident in memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    step()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure_flops(work: Callable[[], object]) -> int:
    """Of matrix products and attention, whose backward pass counts twice its forward pass; torch's counter takes the
    CPU's fused attention for nothing, and others' backward pass for two and a half."""
    aten = torch.ops.aten
    forwards = [
        *(aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention),
        *(aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention),
    ]
    backwards = [
        *(aten._scaled_dot_product_flash_attention_for_cpu_backward, aten._scaled_dot_product_flash_attention_backward),
        *(aten._scaled_dot_product_efficient_attention_backward, aten._scaled_dot_product_cudnn_attention_backward),
    ]

    def attention(query, key, *_, out_shape=None, **__) -> int:
        *batch, length, width = query
        return 4 * int(torch.tensor(batch).prod()) * length * key[-2] * width

    def backward(_, query, key, *more, **options) -> int:
        return 2 * attention(query, key)

    formulas: dict[Any, Any] = dict.fromkeys(forwards, attention) | dict.fromkeys(backwards, backward)
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        work()
    return counter.get_total_flops()


def profiled(step: Callable[[], object]) -> profile:
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=kinds) as seen:
        step()
    return seen  # its end waits for the device


def host_syncs(step: Callable[[], object]) -> int:
    """How often the host waits for the device in a step. On a CPU: how often it looks at a number that a GPU would have
    to deliver; AdamW's own count of its steps is no such number."""
    synchronise()
    waits = copies = 0
    for event in profiled(step).events() or ():
        above = event
        while above is not None and not above.name.startswith("Optimizer.step"):
            above = above.cpu_parent
        waits += event.name in WAITS[device().type] and above is None
        copies += "Pageable -> Device" in event.name  # for which the host waits, whether or not it says so as well
    return max(waits - torch.cuda.is_available(), copies)  # less the one that ends the profile


def table(seen: profile) -> str:
    column = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return seen.key_averages().table(sort_by=column, row_limit=25, max_name_column_width=60)


def main() -> None:
    asked = json.loads(sys.argv[1])
    config = parse(asked["words"])
    step: Callable[[], object] = lambda: None  # noqa: E731
    for line in sys.stdin:
        request, _, argument = line.strip().partition(" ")
        answer: object = None
        if request == "build":
            start_process_group()
            torch.manual_seed(0)
            run, coming = build(asked["kind"], config), batches(config)
            step = lambda run=run, coming=coming: run(next(coming))  # noqa: E731
            seconds(step, 2)
        elif request == "time":
            answer = seconds(step, int(argument))
        elif request == "peak":
            answer = peak_bytes(step)
        elif request == "count":
            answer = {"flops": measure_flops(step) / config.data.batch_size, "waits": host_syncs(step)}
        else:
            seen = profiled(step)
            seen.export_chrome_trace(argument)
            answer = table(seen)
        torch.cuda.empty_cache()  # other variants use the same GPU
        print("ANSWER", json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
