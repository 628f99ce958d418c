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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from ddae_kernels import operators
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
K, B, M, PATCH = 4, 2, 147, 16
WIDTHS = (384, 512, 768, 1024)  # of ViT-S, the decoders, ViT-B and ViT-L


class CompileOnlyDriver:
    """The parts of a Triton driver that compilation uses."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_kernels(calls: dict[str, Callable[[], Any]], arch: int) -> Iterator[tuple[str, str, Any]]:
    """Yield (call, kernel, compiled kernel) for every distinct kernel that the calls would launch."""
    driver: Any = CompileOnlyDriver(arch)
    triton.runtime.driver.set_active(driver)
    run, by_kernel, hashes = JITFunction.run, {}, set()

    def only_compile(self, *args, grid, warmup, **options):
        by_kernel[self.__name__] = run(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = only_compile
    try:
        for name, call in calls.items():
            by_kernel.clear()
            call()
            for kernel, binary in by_kernel.items():
                if binary.hash not in hashes:  # many calls share the small kernels
                    hashes.add(binary.hash)
                    yield name, kernel, binary
    finally:
        JITFunction.run = run


def loss_call(
    width: int, target: str, dtype: torch.dtype = torch.bfloat16, rescale_grad: str = "full", **options
) -> Callable[[], None]:
    """Return a forward and backward pass of the loss; target: "shared", "per_tap" or "pixels"."""

    def call() -> None:
        pred = torch.zeros(K, B, M, width, dtype=dtype, requires_grad=True)
        vectors = torch.ones(B, M), torch.zeros(K, requires_grad=True), torch.ones(K)
        if target == "pixels":
            images, masked = torch.zeros(B, 3, 224, 224, dtype=torch.uint8), torch.zeros(B, M, dtype=torch.int64)
            pixel = {"masked": masked, "patch": PATCH, "mean": (0.5,) * 3, "std": (0.5,) * 3, "eps": 1e-5}
            loss, *_ = operators.dynamic_loss(pred, images, *vectors, rescale_grad, **pixel, **options)
        else:
            features = torch.zeros_like(pred[0] if target == "shared" else pred).detach()
            loss, *_ = operators.dynamic_loss(pred, features, *vectors, rescale_grad, **options)
        loss.backward()

    return call


def training_calls() -> dict[str, Callable[[], Any]]:
    """Return the calls that training makes, by name, at all WIDTHS."""
    calls: dict[str, Callable[[], Any]] = {
        f"distance {side}x{side}": lambda side=side: operators.patch_distance(
            torch.zeros(B, side**2).bool(), side, side
        )
        for side in (14, 64)
    }
    for width in WIDTHS:
        calls[f"mse D={width}"] = loss_call(width, "shared")
        calls[f"feature D={width}"] = loss_call(width, "per_tap", norm="layer", norm_pred=True, eps=1e-6)
    standardised = {"norm": "instance_layer", "norm_pred": True, "eps": 1e-6, "standardise_eps": 1e-5}
    for width in WIDTHS:
        calls[f"feature standardised D={width}"] = loss_call(width, "per_tap", **standardised)
    for norm in ("per_channel", "joint", "none"):
        calls[f"pixel {norm} D={3 * PATCH**2}"] = loss_call(3 * PATCH**2, "pixels", norm=norm)
    for norm in ("per_channel", "joint"):
        options = {"norm": norm, "unbiased": True, "rescale_grad": "detach"}
        calls[f"pixel {norm} unbiased detach D={3 * PATCH**2}"] = loss_call(3 * PATCH**2, "pixels", **options)
    for dtype in (torch.float32, torch.float16):
        options = {"dtype": dtype, "rescale_grad": "detach", "norm": "layer", "norm_pred": True, "eps": 1e-6}
        calls[f"feature {str(dtype)[6:]} detach D=768"] = loss_call(768, "shared", **options)
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
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    accesses: dict[str, int] = {}
    for instruction, suffixes in re.findall(r"\b(LDG|STG)\.E([.\w]*)", code):
        bits = re.search(r"\.(U8|U16|S8|S16|64|128)\b", suffixes)
        name = f"{'load' if instruction == 'LDG' else 'store'}_{bits[1].lstrip('US') if bits else 32}"
        accesses[name] = accesses.get(name, 0) + 1
    return {
        "arch": arch,
        "call": call,
        "kernel": kernel,
        "warps": binary.metadata.num_warps,
        "registers": registers,
        "stack": stack,
        "local": local,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4}\*/", code, re.MULTILINE)),
        **accesses,
    }


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
