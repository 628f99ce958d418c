"""Benchmark of the losses (forward + backward) against eager torch, torch.compile and their memory-traffic floor.

    python kernels/bench/bench.py [--batch 256 512] [--only mse pixel feature] [--step ddae_vit_b16_100e]
    python kernels/bench/bench.py --host        host time of a call alone; without a GPU the kernels are empty functions

On a GPU: bf16, random data, upstream gradient 1. The inputs rotate through more memory than the L2 cache holds. Calls
are captured in CUDA graphs, which excludes Python overhead; rows with mode "launched" are the same calls launched from
Python. Implementations are interleaved so that drift of the machine affects all of them. Rows are appended to
results.csv. Without a GPU the same code runs on tiny shapes and writes a file only if --out is given.
"""

import argparse
import csv
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import ddae_kernels as dk
import torch
from ddae_kernels.implementation import HAS_TRITON, INTERPRETED
from torch import Tensor

RESULTS = Path(__file__).parent / "results.csv"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if CUDA else "cpu")
K, PATCH, IMAGE = 4, 16, 224 if CUDA else 64
GRID = IMAGE // PATCH
M = round(0.75 * GRID**2)
WIDTHS = {"S": 384, "B": 768, "L": 1024} if CUDA else {"nano": 48}
ROTATED_BYTES = 600e6 if CUDA else 0  # 10 times the L2 cache of an H200 (60 MB)
ROUNDS = 30 if CUDA else 3
WARMUP_ROUNDS = 3
HOST_ROUNDS, HOST_CALLS = 11, 50  # of host_time()
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOSSES: dict[str, Callable[..., dk.DynamicLoss]] = {
    "mse": dk.dynamic_mse,  # all taps share the target; feature and instance have one per tap
    "feature": dk.dynamic_feature_mse,
    "instance": partial(dk.dynamic_feature_mse, target_norm="instance_layer"),
    "pixel": partial(dk.dynamic_pixel_mse, patch=PATCH, mean=MEAN, std=STD),
}


def random_inputs(
    loss: str, width: int, batch: int, device: torch.device = DEVICE, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, ...]:
    """Return the positional arguments of one call: pred first, beta second to last."""
    pred = torch.randn(K, batch, M, width, device=device, dtype=dtype, requires_grad=True)
    order = torch.rand(batch, GRID**2, device=device).argsort(1)
    is_masked = torch.ones(batch, GRID**2, dtype=torch.bool, device=device).scatter_(1, order[:, M:], False)
    masked = order[:, :M].contiguous()
    distance = dk.patch_distance(is_masked, (GRID, GRID), impl="reference").gather(1, masked)
    if loss == "pixel":
        target = (torch.randint(0, 256, (batch, 3, IMAGE, IMAGE), device=device, dtype=torch.uint8), masked)
    else:
        target = (torch.randn(pred.shape[loss == "mse" :], device=device, dtype=dtype),)
    beta = torch.full((K,), -0.5, device=device, requires_grad=True)
    return pred, *target, distance, beta, torch.tensor([0.75, 0.75, 0.75, 1.0], device=device)


def forward_backward(function: Callable[..., dk.DynamicLoss], impl: str, inputs: tuple[Tensor, ...]) -> Any:
    """Return the gradients of pred and beta."""
    return torch.autograd.grad(function(*inputs, impl=impl).loss, (inputs[0], inputs[-2]))


def capture(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """Capture all calls in one CUDA graph. Return the function that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls * 3:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph.replay


def seconds(run: Callable[[], Any]) -> float:
    """Return the time of one run; on a GPU measured by CUDA events."""
    if not CUDA:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def interleave(runs: dict[str, Callable[[], Any]], calls_per_run: int) -> dict[str, list[float]]:
    """Time the runs in an interleaved order. Return p20, p50 and p80 of one call in microseconds."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(WARMUP_ROUNDS + ROUNDS):
        for name, run in runs.items():
            elapsed = seconds(run)
            if round_number >= WARMUP_ROUNDS:
                samples[name].append(1e6 * elapsed / calls_per_run)
    quantiles = torch.tensor([0.2, 0.5, 0.8])
    return {name: torch.tensor(times).quantile(quantiles).tolist() for name, times in samples.items()}


def extra_bytes(call: Callable[[], Any]) -> int | None:
    """Return the peak memory of a call beyond its inputs, in bytes; None on the CPU."""
    if not CUDA:
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth() -> float:
    """Return the bandwidth of a large device copy in bytes/s, reads plus writes. It turns floor_bytes into a time."""
    source = torch.randn(int(1e9 if CUDA else 1e7), device=DEVICE)
    destination = torch.empty_like(source)
    p50 = interleave({"copy": lambda: destination.copy_(source)}, 1)["copy"][1]
    return 2 * source.numel() * 4 / (p50 * 1e-6)


def can_run(name: str, call: Callable[[], Any]) -> bool:
    """Return whether a baseline runs here. Print why if it does not, for example out of memory or no compiler."""
    try:
        call()
    except Exception as error:  # any failure: the other rows are still wanted
        print(f"skipping {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
        return False
    return True


def measure(loss: str, size: str, width: int, batch: int, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Yield the rows of one loss at one size, one per mode and implementation. bandwidth: of `copy_bandwidth`."""
    torch._dynamo.reset()  # compile every case from scratch
    width = 3 * PATCH**2 if loss == "pixel" else width
    pred_bytes = K * batch * M * width * 2
    target_bytes = {"mse": pred_bytes // K, "pixel": batch * M * width}.get(loss, pred_bytes)
    floor_bytes = 2 * pred_bytes + target_bytes  # pred and target read once, gradient written once
    input_sets = [random_inputs(loss, width, batch) for _ in range(1 + int(ROTATED_BYTES // floor_bytes))]
    compiled = torch.compile(LOSSES[loss], dynamic=False, fullgraph=True)
    variants = {"eager": (LOSSES[loss], "reference"), "compiled": (compiled, "reference")}
    if CUDA:
        variants["triton"] = (LOSSES[loss], "triton")
    calls = {
        name: [partial(forward_backward, *each, inputs) for inputs in input_sets] for name, each in variants.items()
    }
    calls = {name: each for name, each in calls.items() if name == "triton" or can_run(name, each[0])}
    memory = {name: extra_bytes(each[0]) for name, each in calls.items()}

    def run_all(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
        return lambda: [call() for call in calls]

    runs = {"launched": {name: run_all(each) for name, each in calls.items()}}
    if CUDA:
        runs["graph"] = {name: capture(each) for name, each in calls.items()}
    floor_us = 1e6 * floor_bytes / bandwidth
    case = {"loss": loss, "size": size, "batch": batch, "width": width}
    for mode, by_impl in runs.items():
        for name, times in interleave(by_impl, len(input_sets)).items():
            quantiles = {f"p{q}_us": round(time, 1) for q, time in zip((20, 50, 80), times, strict=True)}
            x_floor = round(times[1] / floor_us, 3)
            floor = {"floor_bytes": floor_bytes, "copy_gb_per_s": round(bandwidth / 1e9), "x_floor": x_floor}
            extra = memory[name]
            temporary = None if extra is None else extra - pred_bytes
            peak = {"peak_extra_bytes": extra, "temporary_bytes": temporary}
            yield case | {"impl": name, "mode": mode} | quantiles | floor | peak


def step_share(preset: str, batch: int) -> str:
    """Time a training step and the losses in it: distances, teacher, student forward and backward, AdamW."""
    from ddae.config import presets
    from ddae.data.masking import sample_mask
    from ddae.method.branches import Inputs
    from ddae.method.distance import masked_distance
    from ddae.method.model import build_model
    from ddae.models.vit import Encoder

    config = presets.preset(preset)
    model, teacher = build_model(config).to(DEVICE, torch.bfloat16), Encoder(config.model).to(DEVICE, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=CUDA)
    images = torch.randint(0, 256, (batch, 3, *config.model.height_width), dtype=torch.uint8, device=DEVICE)
    mask = sample_mask(config.mask.kind, torch.arange(batch), config.grid, config.num_masked).to(DEVICE)
    betas = torch.full((len(config.pixel.taps),), -0.5, device=DEVICE, requires_grad=True)
    one = torch.ones((), device=DEVICE)

    def step(impl: str) -> None:
        distance = masked_distance(mask, config.grid, impl)
        with torch.no_grad():
            tokens = teacher.features(images.to(torch.bfloat16) / 255, list(config.feature.taps))
            index = 1 + mask.masked[:, :, None].expand(-1, -1, config.model.width)
            teacher_tokens = torch.stack([layer.gather(1, index) for layer in tokens])
        model(Inputs(images, mask, distance, betas, one, 1.0, impl, teacher_tokens)).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    def pred(width: int) -> Tensor:
        shape = len(betas), batch, config.num_masked, width
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

    weights = masked_distance(mask, config.grid), betas, torch.ones(len(betas), device=DEVICE)
    pixel_pred, feature_pred = pred(3 * config.model.patch_size**2), pred(config.model.width)

    def losses(impl: str) -> None:
        options = {"patch": config.model.patch_size, "mean": MEAN, "std": STD, "impl": impl}
        pixel = dk.dynamic_pixel_mse(pixel_pred, images, mask.masked, *weights, **options)
        norm = config.feature.target_norm
        feature = dk.dynamic_feature_mse(feature_pred, feature_pred.detach(), *weights, target_norm=norm, impl=impl)
        torch.autograd.grad(pixel.loss + feature.loss, (pixel_pred, feature_pred))

    impls = ("reference", "triton") if CUDA else ("reference",)
    times = interleave({f"{impl} {run.__name__}": partial(run, impl) for run in (step, losses) for impl in impls}, 1)
    lines = [f"{preset}, batch {batch}, one process, without torch.compile; losses launched from Python"]
    for impl in impls:
        step_ms, losses_ms = (times[f"{impl} {name}"][1] / 1000 for name in ("step", "losses"))
        share = f"{losses_ms / step_ms:.1%} of the step"
        lines.append(f"  {impl:9}  step {step_ms:8.2f} ms  losses {losses_ms:7.3f} ms  {share}")
    return "\n".join(lines)


def host_time(losses: list[str], batch: int) -> Iterator[str]:
    """Yield a line per loss: host time of forward + backward, launched directly and through torch.library's operators.

    It is the CPU time of the process (autograd has a thread per GPU), medians over alternating rounds. Without a GPU
    the kernels do nothing.
    """
    from ddae_kernels import implementation, operators

    from ddae.tools.launch_count import replace_kernels

    replace_kernels()
    accept_cpu = mock.patch.object(implementation, "INTERPRETED", True)
    without_checks = mock.patch.dict(os.environ, {"DDAE_CHECK": "0"})  # of values, which do not run on a GPU
    with accept_cpu, without_checks:
        for loss in losses:
            inputs = random_inputs(loss, 3 * PATCH**2 if loss == "pixel" else min(WIDTHS.values()), batch)
            samples: dict[str, list[float]] = {"direct": [], "operators": []}
            for round_number in range(WARMUP_ROUNDS + HOST_ROUNDS):
                for name, times in samples.items():
                    is_intercepted = operators.is_intercepted if name == "direct" else lambda tensor: True
                    with mock.patch.object(operators, "is_intercepted", is_intercepted):
                        start = time.process_time()
                        for _ in range(HOST_CALLS):
                            forward_backward(LOSSES[loss], "triton", inputs)
                        elapsed = time.process_time() - start
                    if CUDA:
                        torch.cuda.synchronize()  # so that the launch queue does not fill up
                    if round_number >= WARMUP_ROUNDS:
                        times.append(1e6 * elapsed / HOST_CALLS)
            direct, operator = (median(times) for times in samples.values())
            ratio = median(one / other for one, other in zip(*samples.values(), strict=True))
            yield f"{loss:8} direct {direct:6.0f} us  operators {operator:6.0f} us  ratio {ratio:.2f}"


def environment() -> dict[str, Any]:
    """Return the columns that describe where a row was measured."""
    # DDAE_COMMIT is set on machines that have the code without git.
    commit = os.environ.get("DDAE_COMMIT") or subprocess.getoutput("git rev-parse --short HEAD 2>/dev/null") or None
    hardware = torch.cuda.get_device_name() if CUDA else "cpu"
    triton = metadata.version("triton") if HAS_TRITON else None
    software = {"torch": torch.__version__, "triton": triton, "commit": commit}
    return {"date": time.strftime("%Y-%m-%d"), "hardware": hardware} | software


def append_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a CSV file. A new file gets a header."""
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    description = "Time the losses against eager torch, torch.compile and their memory-traffic floor."
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 512] if CUDA else [2], help="images per call")
    parser.add_argument("--only", nargs="+", default=list(LOSSES), choices=LOSSES, help="losses to time")
    parser.add_argument("--step", metavar="PRESET", help="also time a training step of this preset, with each loss")
    parser.add_argument("--host", action="store_true", help="measure the host time of a call instead")
    parser.add_argument("--out", type=Path, default=RESULTS if CUDA else None, help="CSV file to append rows to")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.host:
        kernels = "" if CUDA else ", kernels replaced by empty functions"
        print(f"{environment()['hardware']}: host time of a forward and backward pass{kernels}")
        for line in host_time(options.only, min(options.batch)):
            print(line, flush=True)
        return
    bandwidth, facts = copy_bandwidth(), environment()
    print(f"{facts['hardware']}: copy bandwidth {bandwidth / 1e9:.0f} GB/s (read + write). ", end="")
    print("Columns: p20, p50, p80 of forward + backward in us; p50 over floor.")
    for batch in options.batch:
        for loss in options.only:
            for size, width in WIDTHS.items() if loss != "pixel" else [("any", 0)]:
                rows = [facts | row for row in measure(loss, size, width, batch, bandwidth)]
                for row in rows:
                    times = f"{row['p20_us']:9} {row['p50_us']:9} {row['p80_us']:9}  {row['x_floor']:6} x floor"
                    print(f"{loss:8} {size:4} B={batch:4} {row['impl']:9} {row['mode']:9} {times}", flush=True)
                if options.out:  # after each case, so that an interrupted benchmark keeps its rows
                    append_csv(options.out, rows)
    if options.step:
        print(step_share(options.step, min(options.batch)))
    if not options.out:
        print("No GPU: results.csv is unchanged.")


if __name__ == "__main__":
    main()
