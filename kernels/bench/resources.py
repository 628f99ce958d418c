"""Registers, stack, spills and load widths of the compiled kernels. Needs no GPU: Triton bundles ptxas and cuobjdump.

    python kernels/bench/resources.py [--arch 80 90] [--json]

Compiles for each architecture the kernels that real calls would launch: the public calls run on CPU tensors while
Triton's driver reports the architecture and launches are skipped.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ddae_kernels as dk
import torch
import triton
from bench import LOSSES, PATCH, random_inputs
from ddae_kernels import implementation, operators
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
B = 2
WIDTHS = (384, 512, 768, 1024)  # of ViT-S, the decoders, ViT-B and ViT-L


def compile_kernels(calls: dict[str, Callable[[], Any]], arch: int) -> Iterator[tuple[str, str, Any]]:
    """Yield (call, kernel, compiled kernel) for every distinct kernel that the calls would launch."""
    driver: Any = SimpleNamespace(  # the parts of a Triton driver that compilation uses
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)
    run, by_kernel, hashes = JITFunction.run, {}, set()

    def only_compile(self, *args, grid, warmup, **options):
        by_kernel[self.__name__] = run(self, *args, grid=grid, warmup=True, **options)

    accept_cpu = mock.patch.object(implementation, "INTERPRETED", True)
    with accept_cpu, mock.patch.object(JITFunction, "run", only_compile):
        for name, call in calls.items():
            by_kernel.clear()
            call()
            for kernel, binary in by_kernel.items():
                if binary.hash not in hashes:  # many calls share the small kernels
                    hashes.add(binary.hash)
                    yield name, kernel, binary


def loss_call(
    call: Callable[..., dk.DynamicLoss], loss: str, width: int, dtype: torch.dtype = torch.bfloat16, **options
) -> Callable[[], None]:
    """Return a forward and backward pass of `call` with bench.py's inputs for `loss`."""
    inputs = random_inputs(loss, width, B, torch.device("cpu"), dtype)
    return lambda: call(*inputs, impl="triton", **options).loss.backward()


def training_calls() -> dict[str, Callable[[], Any]]:
    """Return the calls that training makes, by name, at all WIDTHS."""
    calls: dict[str, Callable[[], Any]] = {}
    for side in (14, 64):
        is_masked = torch.zeros(B, side**2, dtype=torch.bool)
        calls[f"distance {side}x{side}"] = partial(operators.patch_distance, is_masked, side, side)
    for width in WIDTHS:
        calls[f"mse D={width}"] = loss_call(LOSSES["mse"], "mse", width)
        calls[f"feature D={width}"] = loss_call(LOSSES["feature"], "feature", width)
    for width in WIDTHS:
        calls[f"feature standardised D={width}"] = loss_call(LOSSES["instance"], "instance", width)
    dim, half = 3 * PATCH**2, (0.5, 0.5, 0.5)
    pixel = partial(dk.dynamic_pixel_mse, patch=PATCH, mean=half, std=half)
    for norm in ("per_channel", "joint", "none"):
        calls[f"pixel {norm} D={dim}"] = loss_call(pixel, "pixel", dim, norm=norm, unbiased=False)
    for norm in ("per_channel", "joint"):
        options = {"norm": norm, "unbiased": True, "rescale_grad": "detach"}
        calls[f"pixel {norm} unbiased detach D={dim}"] = loss_call(pixel, "pixel", dim, **options)
    for dtype in (torch.float32, torch.float16):  # with the target of "mse", which all taps share
        call = loss_call(dk.dynamic_feature_mse, "mse", 768, dtype, rescale_grad="detach")
        calls[f"feature {str(dtype)[6:]} detach D=768"] = call
    return calls


def resource_row(call: str, kernel: str, binary: Any, arch: int) -> dict[str, Any]:
    """Return the resources of a compiled kernel, and the number of its loads and stores by width in bits."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    keys = {"registers": "REG", "stack": "STACK", "local": "LOCAL"}
    resources = {name: int(re.findall(rf"{key}:(\d+)", usage)[0]) for name, key in keys.items()}
    resources["spills"] = len(re.findall(r"\b(?:LDL|STL)\b", code))
    resources["instructions"] = len(re.findall(r"^\s+/\*[0-9a-f]{4}\*/", code, re.MULTILINE))
    accesses: Counter[str] = Counter()
    for instruction, suffixes in re.findall(r"\b(LDG|STG)\.E([.\w]*)", code):
        bits = re.search(r"\.(U8|U16|S8|S16|64|128)\b", suffixes)
        accesses[f"{'load' if instruction == 'LDG' else 'store'}_{bits[1].lstrip('US') if bits else 32}"] += 1
    warps = binary.metadata.num_warps
    return {"arch": arch, "call": call, "kernel": kernel, "warps": warps} | resources | accesses


def as_text(row: dict[str, Any]) -> str:
    """Return a row as a line of the table."""
    head = f"sm_{row['arch']}  {row['call']:36} {row['kernel']:15} {row['warps']:2} warps"
    accesses = "  ".join(f"{name} x {row[name]}" for name in sorted(row) if name.startswith(("load_", "store_")))
    usage = f"{row['registers']:3} registers  {row['spills']} spills  {row['instructions']:4} instructions"
    return f"{head}  {usage}  {accesses}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Print registers, spills and load widths of the compiled kernels.")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities times ten")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line instead of a table")
    args = parser.parse_args()
    for arch in args.arch:
        for call, kernel, binary in compile_kernels(training_calls(), arch):
            row = resource_row(call, kernel, binary, arch)
            print(json.dumps(row) if args.json else as_text(row), flush=True)


if __name__ == "__main__":
    main()
