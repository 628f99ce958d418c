"""One way to compute a training step, in its own process, which bench_step.py starts.

Each request is a line of standard input, each result a line "RESULT" with JSON on standard output.

    build N      build the model and run N steps; must come first
    time N       seconds of each of N steps
    peak         peak memory of a step in bytes: allocated on the GPU, or resident on a CPU
    gpu          time of the GPU's kernels in a step, in ms; null on a CPU
    host N       CPU time of the training thread in ms by phase of a step (bench_launches.py)
    launches     operators that a step launches, by phase
    count        floating-point operations an image, and host syncs a step
    profile F    write a profiler trace of a step to file F; the result is a table of operators by time
    knn          k-NN accuracy in per cent of the mean patch after the last block, and its baselines
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ddae.config import deepspeed as ds_config
from ddae.config.cli import parse
from ddae.config.pretrain import PretrainConfig, beta_names
from ddae.config.scales import WARMUP_FRACTION, at_scale
from ddae.data.loader import Batch
from ddae.data.masking import Mask
from ddae.data.reader import RankBatch
from ddae.distributed.comm import device, world_size
from ddae.distributed.engine import Engine, plain_deepspeed, start_process_group
from ddae.eval.dataset import ExampleReader
from ddae.method.betas import Betas
from ddae.method.branches import Inputs
from ddae.method.distance import masked_distance
from ddae.method.model import build_model
from ddae.method.naive import NaiveEncoder, NaiveMethod, ema_update, to_pixels
from ddae.method.teacher import MovingAverage
from ddae.tools.launch_count import host_ms, launches, replace_graphs, replace_kernels, start_fake_process_group
from ddae.tools.peers import PEERS, PeerStep, measure_knn
from ddae.training import step as pretraining
from ddae.training.optimizer import build_optimizer
from ddae.training.schedules import warmup_cosine

LR, MOMENTUM = 1e-4, 0.999
PLAIN_IMAGES = 4096  # in the memory of the plain loop
HOST_SYNCS = {  # profiler events, by device
    "cuda": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    "cpu": ("aten::_local_scalar_dense",),
}


class PretrainStep:
    """The step that pretraining runs."""

    def __init__(self, config: PretrainConfig, ds_json: dict[str, Any], lr: Callable[[int], float]):
        stand_ins = config.engine.student_graphs and device().type == "cpu"  # for graphs that a CPU does not have
        if stand_ins:
            config = replace(config, engine=replace(config.engine, student_graphs=False, teacher_graph=False))
        resolved, backend = pretraining.resolve_auto(config, ds_json), pretraining.resolve_loss_backend(config)
        model = build_model(resolved)
        self.engine = Engine(model, build_optimizer(model, config.optim), ds_json, config.engine.gradient_reduction)
        self.targets = pretraining.build_targets(resolved, self.engine)
        if stand_ins:
            replace_graphs(self.engine.module, self.targets)
        elif config.engine.compile:
            pretraining.compile_modules(self.engine.module, self.targets, graphs=config.engine.student_graphs)
        self.betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, self.engine.device)
        self.forward = pretraining.ForwardPass(resolved, self.engine, self.targets, self.betas, 1.0, backend)
        self.lr, self.number = lr, 0  # learning rate by the number of the step, and that number

    def __call__(self, batch: Batch) -> Tensor:
        losses, lr = self.forward(batch, 1.0, step=self.number), self.lr(self.number)
        self.number += 1
        self.engine.backward(losses.total)
        applied = self.engine.step(lr)
        self.betas.step(lr, applied)
        self.targets.update(MOMENTUM, applied)
        return losses.total.detach()


class NaiveStep:
    """The step of naive.py with plain DeepSpeed, or with this project's Engine and EMA update."""

    def __init__(self, config: PretrainConfig, ds_json: dict[str, Any], use_engine: bool):
        self.config, self.use_engine = config, use_engine
        method = NaiveMethod(config)
        method.load_state_dict(build_model(config).state_dict())
        teacher = NaiveEncoder(config).to(device()).requires_grad_(False).eval()
        teacher.load_state_dict(method.encoder.state_dict())
        self.teacher = teacher if config.feature.enabled else None
        if use_engine:
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
        config, module, autocast = self.config, self.engine.module, self.config.engine.precision != "fp32"
        mask = (batch.mask or pretraining.mask_sampler(config)(batch.seeds)).to(device())
        distance = masked_distance(mask, config.grid, "reference", config.dynamic.distance_norm)
        tokens = None
        if self.teacher is not None:
            pixels = to_pixels(batch.images, config.data.normalisation)
            with torch.no_grad(), torch.autocast(device().type, torch.bfloat16, enabled=autocast):
                tokens = self.teacher(pixels.to(self.engine.dtype if self.use_engine else torch.float32))
        self.betas.accumulate_norm(distance)
        loss = self.engine(batch.images, mask.visible, mask.masked, distance, self.betas.clamped(), tokens, 1.0)
        self.engine.backward(loss)
        if self.use_engine:
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


class PlainStep:
    """The step of a plain loop around the same model: no DeepSpeed, no guard, a teacher that follows by lerp."""

    def __init__(self, config: PretrainConfig):
        self.config, self.model = config, build_model(config).to(device())
        self.optimizer = build_optimizer(self.model, config.optim)
        self.teacher = deepcopy(self.model.encoder).requires_grad_(False) if config.feature.enabled else None
        self.betas = torch.full((len(beta_names(config)),), -0.5, requires_grad=True, device=device())

    def __call__(self, batch: Batch) -> Tensor:
        config = self.config
        num_patches = config.grid[0] * config.grid[1]
        order = torch.rand(len(batch.images), num_patches).argsort(1)
        mask = Mask(*order.split([num_patches - config.num_masked, config.num_masked], 1)).to(device())
        tokens = None
        if self.teacher is not None:
            pixels = pretraining.extract_patches(batch.images, mask, config, torch.float32)
            with torch.no_grad():
                tokens = torch.stack(self.teacher(pixels, config.feature.taps, torch.cat(mask, 1)))
            tokens = tokens[:, :, -config.num_masked :]
        losses = self.model(
            Inputs(
                images=batch.images,
                mask=mask,
                distance=masked_distance(mask, config.grid, "reference"),
                betas=self.betas,
                feature_weight=torch.ones((), device=device()),
                share=1.0,
                loss_backend="reference",
                teacher_tokens=tokens,
            )
        )
        losses.total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.teacher is not None:
            weights: Any = [list(each.parameters()) for each in (self.teacher, self.model.encoder)]
            with torch.no_grad():
                torch._foreach_lerp_(weights[0], weights[1], 1 - MOMENTUM)
        return losses.total.detach()


def build_step(kind: str, config: PretrainConfig, num_steps: int = 0) -> Callable[[Batch], Tensor]:
    """Return the step of a kind of bench_step.Variant, plain, naive, engine or ddae, or of one of PEERS.

    num_steps: of a training whose learning rate follows its schedule; 0: it is constant.
    """

    def lr(step: int) -> float:
        return warmup_cosine(step, num_steps, WARMUP_FRACTION * num_steps, config.peak_lr, 0.0) if num_steps else LR

    if kind in PEERS:
        return PeerStep(kind, config, lr)
    if kind == "plain":
        return PlainStep(config)
    ds_json = ds_config.resolve(ds_config.load(config.ds_config), config, world_size()).json
    return PretrainStep(config, ds_json, lr) if kind == "ddae" else NaiveStep(config, ds_json, kind == "engine")


def batches(config: PretrainConfig, plain: bool = False) -> Iterator[Batch]:
    """Yield batches of the loader; without data.train the same batch of random images again and again.

    plain: central crops that were loaded in advance, in random order.
    """
    size, count = config.model.image_size, config.data.batch_size
    if config.data.train and plain:
        reader = ExampleReader(config.data.train, "train", size, labelled=False, max_images=PLAIN_IMAGES)
        images = torch.stack([torch.from_numpy(reader[number][0]) for number in range(len(reader))])
        while True:
            for rows in torch.randperm(len(images)).split(count):
                yield Batch(images[rows].to(device()), rows, rows)
    if config.data.train:
        loader = pretraining.build_loader(config, RankBatch(count, count, 0, 1))
        loader.select_backend()
        yield from loader.batches(0)
    images = torch.randint(0, 256, (count, 3, *config.model.height_width), dtype=torch.uint8, device=device())
    numbers = torch.arange(count)
    mask = pretraining.mask_sampler(config)(numbers)  # in advance, as the loader's workers do
    while True:
        yield Batch(images, numbers, numbers, mask)


def synchronise() -> None:
    """Wait until the GPU, if there is one, is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def step_seconds(step: Callable[[], object], count: int) -> list[float]:
    """Return the seconds of each of `count` steps; on a GPU their mean, `count` times, because steps overlap."""
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
    """Return the peak memory of one step in bytes: allocated on the GPU, or resident on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    step()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure_flops(run: Callable[[], object]) -> int:
    """Return the floating-point operations of matrix products and attention in `run`.

    Attention's backward pass counts twice its forward pass. FlopCounterMode's own formulas ignore the CPU's fused
    attention and count 2.5 times the forward pass for the backward pass of the others.
    """

    def forward_flops(query, key, value, *_, **__) -> int:
        return sdpa_flop_count(query, key, value)

    def backward_flops(_, *inputs, **options) -> int:
        return 2 * forward_flops(*inputs, **options)

    formulas: dict[Any, Any] = {}
    for kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
        formulas[getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}")] = forward_flops
        formulas[getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_backward")] = backward_flops
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return counter.get_total_flops()


def profile_step(step: Callable[[], object]) -> profile:
    """Return the profile of one step, which ends with a synchronisation of the GPU."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiler:
        step()
    return profiler


def count_host_syncs(step: Callable[[], object]) -> int:
    """Return how often one step synchronises host and device.

    On a CPU: how often it reads the value of a tensor that a GPU would have to deliver. AdamW reads its step count from
    a tensor on the CPU, which is not counted.
    """
    synchronise()
    syncs = copies = 0
    for event in profile_step(step).events() or ():
        ancestor = event
        while ancestor is not None and not ancestor.name.startswith("Optimizer.step"):
            ancestor = ancestor.cpu_parent
        syncs += event.name in HOST_SYNCS[device().type] and ancestor is None
        copies += "Pageable -> Device" in event.name  # blocks the host, with or without an event of its own
    return max(syncs - torch.cuda.is_available(), copies)  # without the one that ends the profile


def gpu_ms(step: Callable[[], object]) -> float | None:
    """Return the summed time of the kernels of one step in ms; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    synchronise()
    return sum(event.self_device_time_total for event in profile_step(step).key_averages()) / 1000


def thread_ms(step: Callable[[], object], count: int) -> float:
    """Return the CPU time of the calling thread in ms: the median of `count` steps."""
    times = [time.thread_time()]
    for _ in range(count):
        step()
        times.append(time.thread_time())
    return 1000 * median(end - start for start, end in pairwise(times))


def operator_table(profiler: profile) -> str:
    """Return the 25 operators that take most time, as text."""
    column = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=column, row_limit=25, max_name_column_width=60)


def main() -> None:
    """Serve requests until standard input ends. The task is the first argument, a JSON object.

    Its keys are `kind` and `num_steps` (see build_step()), `scale` and `args`.
    """
    task = json.loads(sys.argv[1])
    config = parse(task["args"])
    if task["scale"]:
        config = replace(at_scale(config, task["scale"]), engine=config.engine)
    train_step: Any = None
    step: Callable[[], object] = lambda: None  # noqa: E731
    for line in sys.stdin:
        request, _, argument = line.strip().partition(" ")
        result: object = None
        if request == "build":
            if task["fake_ranks"]:
                start_fake_process_group()
                replace_kernels()
            else:
                start_process_group()
            torch.manual_seed(0)
            train_step = build_step(task["kind"], config, task["num_steps"])
            own = replace(config, data=replace(config.data, batch_size=config.data.batch_size // world_size()))
            stream = batches(own, task["kind"] == "plain")
            step = lambda train_step=train_step, stream=stream: train_step(next(stream))  # noqa: E731
            step_seconds(step, int(argument))
        elif request == "time":
            result = step_seconds(step, int(argument))
        elif request == "peak":
            result = peak_bytes(step)
        elif request == "count":
            images = config.data.batch_size // world_size()
            result = {"flops": measure_flops(step) / images, "host_syncs": count_host_syncs(step)}
        elif request == "gpu":
            result = gpu_ms(step)
        elif request == "host" and isinstance(train_step, PretrainStep):
            result = host_ms(train_step, next(stream), int(argument))
        elif request == "host":
            result = {"step": thread_ms(step, int(argument))}
        elif request == "launches":
            result = launches(train_step, next(stream))
        elif request == "knn":
            result = measure_knn(train_step, config)
        else:
            profiler = profile_step(step)
            profiler.export_chrome_trace(argument)
            result = operator_table(profiler)
        torch.cuda.empty_cache()  # other variants use the same GPU
        print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
