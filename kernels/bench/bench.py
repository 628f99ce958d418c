"""Time of the losses, forward and backward, beside their byte floor, eager torch and torch.compile.

    python kernels/bench/bench.py [--batch 256 512] [--only mse pixel feature] [--step ddae_vit_b16_100e]

On a GPU: bf16, random data, inputs that rotate through more memory than the L2 cache holds, upstream gradient 1. The
calls are captured in CUDA graphs, so that the device's time is measured and not Python's ("launched" rows are the same
calls as Python launches them), and replayed in turn, one implementation after the other. Rows are appended to
results.csv. Without a GPU the same code runs on tiny shapes and writes only where --out says.
"""

import argparse
import csv
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import ddae_kernels as dk
import torch
from ddae_kernels.implementation import HAS_TRITON
from torch import Tensor

RESULTS = Path(__file__).parent / "results.csv"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
K, PATCH, IMAGE = 4, 16, 224 if CUDA else 64
GRID = IMAGE // PATCH
M = round(0.75 * GRID**2)
LOSSES = ["mse", "feature", "instance", "pixel"]  # instance: features with target_norm instance_layer
WIDTHS = {"S": 384, "B": 768, "L": 1024} if CUDA else {"nano": 48}
ROTATED = 600e6 if CUDA else 0  # bytes: an H200's L2 cache holds 60 MB
ROUNDS = 30 if CUDA else 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Case(NamedTuple):
    """One loss at one size: its calls, one for each set of rotating inputs, and the bytes it cannot avoid."""

    loss: str
    size: str
    batch: int
    width: int
    calls: dict[str, list[Callable[[], Any]]]  # by implementation
    floor_bytes: int
    grad_bytes: int


def build(loss: str, size: str, width: int, batch: int) -> Case:
    """Random inputs as training has them; pred, target and gradient are what must be moved."""
    torch._dynamo.reset()  # each case is compiled for itself
    width = 3 * PATCH**2 if loss == "pixel" else width
    pred_bytes = K * batch * M * width * 2
    target_bytes = {"mse": pred_bytes // K, "pixel": batch * M * width}.get(loss, pred_bytes)
    sets = [inputs(loss, width, batch) for _ in range(1 + int(ROTATED // (2 * pred_bytes + target_bytes)))]
    call = {"mse": dk.dynamic_mse, "pixel": dk.dynamic_pixel_mse}.get(loss, dk.dynamic_feature_mse)
    how: dict[str, Any] = {"patch": PATCH, "mean": MEAN, "std": STD} if loss == "pixel" else {}
    if loss == "instance":
        how = {"target_norm": "instance_layer"}

    def step(impl: str, function: Callable, arguments: tuple[Tensor, ...]) -> Callable[[], Any]:
        pred, beta = arguments[0], arguments[-2]
        return lambda: torch.autograd.grad(function(*arguments, impl=impl, **how).loss, (pred, beta))

    compiled = torch.compile(call, dynamic=False, fullgraph=True)
    kinds = {"eager": ("reference", call), "compiled": ("reference", compiled)}
    if CUDA:
        kinds["triton"] = ("triton", call)
    calls = {name: [step(impl, function, own) for own in sets] for name, (impl, function) in kinds.items()}
    return Case(loss, size, batch, width, calls, 2 * pred_bytes + target_bytes, pred_bytes)


def inputs(loss: str, width: int, batch: int) -> tuple[Tensor, ...]:
    """Arguments of one call: pred first, beta second to last."""
    pred = torch.randn(K, batch, M, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    places = torch.rand(batch, GRID**2, device=DEVICE).argsort(1)
    hidden = torch.ones(batch, GRID**2, dtype=torch.bool, device=DEVICE).scatter_(1, places[:, M:], False)
    masked = places[:, :M].contiguous()
    distance = dk.patch_distance(hidden, (GRID, GRID)).gather(1, masked)
    if loss == "pixel":
        target = (torch.randint(0, 256, (batch, 3, IMAGE, IMAGE), device=DEVICE, dtype=torch.uint8), masked)
    else:
        target = (torch.randn(pred.shape[loss == "mse" :], device=DEVICE, dtype=torch.bfloat16),)
    beta = torch.full((K,), -0.5, device=DEVICE, requires_grad=True)
    return pred, *target, distance, beta, torch.tensor([0.75, 0.75, 0.75, 1.0], device=DEVICE)


def captured(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """All calls as one CUDA graph; its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph.replay


def seconds(run: Callable[[], Any]) -> float:
    """Time of one run, by the device's clock where there is a device."""
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


def alternating(runs: dict[str, Callable[[], Any]], times: int) -> dict[str, tuple[float, float, float]]:
    """p20, p50, p80 in microseconds of one of the `times` calls in each run; the runs take turns."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(ROUNDS + 3):
        for name, run in runs.items():
            spent = seconds(run)
            if number >= 3:
                samples[name].append(1e6 * spent / times)
    quantiles = torch.tensor([0.2, 0.5, 0.8])
    return {name: tuple(torch.tensor(s).quantile(quantiles).tolist()) for name, s in samples.items()}  # type: ignore[misc]


def extra_bytes(call: Callable[[], Any]) -> int | None:
    """Peak memory of a call beyond its inputs."""
    if not CUDA:
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large copy on the device: what the floor is held against."""
    source = torch.randn(int(1e9 if CUDA else 1e7), device=DEVICE)
    destination = torch.empty_like(source)
    p50 = alternating({"copy": lambda: destination.copy_(source)}, 1)["copy"][1]
    return 2 * source.numel() * 4 / (p50 * 1e-6)


def runs_at_all(call: Callable[[], Any]) -> bool:
    """Whether a baseline runs here: one that does not (its memory, its compiler) is named and left out."""
    try:
        call()
    except Exception as error:  # whatever it is, the other rows are wanted
        print(f"left out: {type(error).__name__}: {str(error).splitlines()[0]}")
        return False
    return True


def measure(case: Case, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Rows of one case."""
    sets = max(len(calls) for calls in case.calls.values())
    for name in [name for name, calls in case.calls.items() if name != "triton" and not runs_at_all(calls[0])]:
        del case.calls[name]
    memory = {name: extra_bytes(calls[0]) for name, calls in case.calls.items()}

    def one_after_the_other(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
        return lambda: [call() for call in calls]

    runs = {("launched", name): one_after_the_other(calls) for name, calls in case.calls.items()}
    if CUDA:
        runs |= {("graph", name): captured(calls) for name, calls in case.calls.items()}
    for mode in dict.fromkeys(mode for mode, _ in runs):
        timed = alternating({name: run for (its, name), run in runs.items() if its == mode}, sets)
        for name, (p20, p50, p80) in timed.items():
            floor_us = 1e6 * case.floor_bytes / bandwidth
            extra = memory[name]
            yield {
                **dict(zip(("loss", "size", "batch", "width"), case[:4], strict=True)),
                "impl": name,
                "mode": mode,
                "p20_us": round(p20, 1),
                "p50_us": round(p50, 1),
                "p80_us": round(p80, 1),
                "floor_bytes": case.floor_bytes,
                "copy_gb_per_s": round(bandwidth / 1e9),
                "x_floor": round(p50 / floor_us, 3),
                "peak_extra_bytes": extra,
                "temporary_bytes": None if extra is None else extra - case.grad_bytes,
            }


def step_share(preset: str, batch: int) -> str:
    """What share the losses are of a training step: masks' distances, teacher, student forward and backward, AdamW."""
    from ddae.config import presets
    from ddae.data.masking import sample_mask
    from ddae.method.branches import Inputs
    from ddae.method.distance import masked_distance
    from ddae.method.model import build_model
    from ddae.models.vit import Encoder

    config = presets.preset(preset)
    method, teacher = build_model(config).to(DEVICE, torch.bfloat16), Encoder(config.model).to(DEVICE, torch.bfloat16)
    optimizer = torch.optim.AdamW(method.parameters(), lr=0.0, fused=CUDA)
    images = torch.randint(0, 256, (batch, 3, *[config.model.image_size] * 2), dtype=torch.uint8, device=DEVICE)
    mask = sample_mask(config.mask.kind, torch.arange(batch), config.grid, config.num_masked).to(DEVICE)
    betas = torch.full((len(config.pixel.taps),), -0.5, device=DEVICE, requires_grad=True)
    one = torch.ones((), device=DEVICE)

    def step(kernels: str) -> None:
        distance = masked_distance(mask, config.grid, kernels)
        with torch.no_grad():
            tokens = teacher.features(images.to(torch.bfloat16) / 255, list(config.feature.taps))
            rows = 1 + mask.masked[:, :, None].expand(-1, -1, config.model.width)
            targets = torch.stack([layer.gather(1, rows) for layer in tokens])
        method(Inputs(images, mask, distance, betas, one, 1.0, kernels, targets)).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    kinds = ("reference", "triton") if CUDA else ("reference",)
    steps = {f"{kernels} step": partial(step, kernels) for kernels in kinds}
    distance = masked_distance(mask, config.grid)
    weights = distance, betas, torch.ones(len(betas), device=DEVICE)
    shape = len(betas), batch, config.num_masked
    pixels, features = (
        torch.randn(*shape, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for width in (3 * config.model.patch_size**2, config.model.width)
    )
    how = {"patch": config.model.patch_size, "mean": MEAN, "std": STD}

    def losses(kernels: str) -> None:
        pixel = dk.dynamic_pixel_mse(pixels, images, mask.masked, *weights, impl=kernels, **how)
        norm = config.feature.target_norm
        feature = dk.dynamic_feature_mse(features, features.detach(), *weights, target_norm=norm, impl=kernels)
        torch.autograd.grad(pixel.loss + feature.loss, (pixels, features))

    timed = alternating(steps | {f"{kernels} losses": partial(losses, kernels) for kernels in kinds}, 1)
    lines = [f"{preset}, batch {batch}, one process, no compile; losses as Python launches them"]
    for kernels in kinds:
        whole, part = timed[f"{kernels} step"][1] / 1000, timed[f"{kernels} losses"][1] / 1000
        lines.append(f"  {kernels:9}  step {whole:8.2f} ms  losses {part:7.3f} ms  {part / whole:.1%} of it")
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    commit = os.environ.get("DDAE_COMMIT")  # for a machine that has the code and no git
    if commit is None and shutil.which("git"):
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    triton = metadata.version("triton") if HAS_TRITON else None
    hardware = torch.cuda.get_device_name() if CUDA else "cpu"
    where = {"date": time.strftime("%Y-%m-%d"), "hardware": hardware, "torch": torch.__version__, "triton": triton}
    return {**where, "commit": commit}


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a CSV file, with its header where it is new."""
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Time the losses beside their byte floor, eager torch and torch.compile."
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 512] if CUDA else [2], help="images a call")
    parser.add_argument("--only", nargs="+", default=LOSSES, help="losses to time")
    parser.add_argument("--step", metavar="PRESET", help="also time a training step of this preset with either loss")
    parser.add_argument("--out", type=Path, default=RESULTS if CUDA else None, help="CSV file that rows are added to")
    arguments = parser.parse_args(words)
    torch.manual_seed(0)
    bandwidth, here = copy_bandwidth(), environment()
    print(
        f"{here['hardware']}: copies at {bandwidth / 1e9:.0f} GB/s, read and written; times in us, forward + backward"
    )
    for batch in arguments.batch:
        for loss in arguments.only:
            for size, width in WIDTHS.items() if loss != "pixel" else [("any", 0)]:
                rows = [here | row for row in measure(build(loss, size, width, batch), bandwidth)]
                for row in rows:
                    times = f"{row['p20_us']:9} {row['p50_us']:9} {row['p80_us']:9}  {row['x_floor']:6} x floor"
                    print(f"{loss:8} {size:4} B={batch:4} {row['impl']:9} {row['mode']:9} {times}", flush=True)
                if arguments.out:  # case by case: what is measured is kept, whatever happens next
                    append(arguments.out, rows)
    if arguments.step:
        print(step_share(arguments.step, min(arguments.batch)))
    if not arguments.out:
        print("no GPU: nothing is added to results.csv")


if __name__ == "__main__":
    main()
