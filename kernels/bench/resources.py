"""What the compiled kernels ask of a GPU: registers, stack, width of their loads. Needs no GPU: Triton brings ptxas.

    python kernels/bench/resources.py [--arch 80 90] [--json]

Compiles, for each architecture, exactly what a call would launch: the public calls run on CPU tensors, with Triton's
driver told which GPU to take and its launches left out.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from ddae_kernels import operators
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
K, B, M, PATCH = 4, 2, 147, 16
WIDTHS = (384, 512, 768, 1024)


class Architecture:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(calls: dict[str, Any], arch: int) -> Iterator[tuple[str, str, Any]]:
    """(call, kernel, what Triton compiled for it) of every kernel that the calls would launch."""
    driver: Any = Architecture(arch)
    triton.runtime.driver.set_active(driver)
    run, found, seen = JITFunction.run, {}, set()

    def only_compile(self, *arguments, grid, warmup, **options):
        found[self.__name__] = run(self, *arguments, grid=grid, warmup=True, **options)

    JITFunction.run = only_compile
    try:
        for name, call in calls.items():
            found.clear()
            call()
            for kernel, binary in found.items():
                if binary.hash not in seen:  # the small kernels are the same for every call
                    seen.add(binary.hash)
                    yield name, kernel, binary
    finally:
        JITFunction.run = run


def loss_call(width: int, target: str, dtype: torch.dtype = torch.bfloat16, rescale_grad: str = "full", **options):
    """A forward and backward of the loss: target "shared", "per_tap" or "pixels"."""

    def call() -> None:
        pred = torch.zeros(K, B, M, width, dtype=dtype, requires_grad=True)
        vectors = torch.ones(B, M), torch.zeros(K, requires_grad=True), torch.ones(K)
        if target == "pixels":
            images, masked = torch.zeros(B, 3, 224, 224, dtype=torch.uint8), torch.zeros(B, M, dtype=torch.int64)
            how = {"masked": masked, "patch": PATCH, "mean": (0.5,) * 3, "std": (0.5,) * 3, "eps": 1e-5}
            loss, *_ = operators.dynamic_loss(pred, images, *vectors, rescale_grad, **how, **options)
        else:
            given = torch.zeros_like(pred[0] if target == "shared" else pred).detach()
            loss, *_ = operators.dynamic_loss(pred, given, *vectors, rescale_grad, **options)
        loss.backward()

    return call


def calls() -> dict[str, Any]:
    """What training launches, at the widths of ViT-S, B, L and a decoder between."""
    named: dict[str, Any] = {"distance 14x14": lambda: operators.patch_distance(torch.zeros(B, 196).bool(), 14, 14)}
    named["distance 64x64"] = lambda: operators.patch_distance(torch.zeros(B, 4096).bool(), 64, 64)
    for width in WIDTHS:
        named[f"mse D={width}"] = loss_call(width, "shared")
        named[f"feature D={width}"] = loss_call(width, "per_tap", norm="layer", norm_pred=True, eps=1e-6)
    standardised = {"norm": "instance_layer", "norm_pred": True, "eps": 1e-6, "standardise_eps": 1e-5}
    for width in WIDTHS:
        named[f"feature standardised D={width}"] = loss_call(width, "per_tap", **standardised)
    for norm in ("per_channel", "joint", "none"):
        named[f"pixel {norm} D={3 * PATCH**2}"] = loss_call(3 * PATCH**2, "pixels", norm=norm)
    for norm, unbiased in (("per_channel", True), ("joint", True)):
        options = {"norm": norm, "unbiased": unbiased, "rescale_grad": "detach"}
        named[f"pixel {norm} unbiased detach D={3 * PATCH**2}"] = loss_call(3 * PATCH**2, "pixels", **options)
    for dtype in (torch.float32, torch.float16):
        options = {"dtype": dtype, "rescale_grad": "detach", "norm": "layer", "norm_pred": True, "eps": 1e-6}
        named[f"feature {str(dtype)[6:]} detach D=768"] = loss_call(768, "shared", **options)
    return named


def row(call: str, kernel: str, binary: Any, arch: int) -> dict[str, Any]:
    """Resources of one compiled kernel; loads and stores counted by their instruction's width in bits."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOL, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    widths: dict[str, int] = {}
    for kind, suffixes in re.findall(r"\b(LDG|STG)\.E([.\w]*)", code):
        bits = re.search(r"\.(U8|U16|S8|S16|64|128)\b", suffixes)
        name = f"{'load' if kind == 'LDG' else 'store'}_{bits[1].lstrip('US') if bits else 32}"
        widths[name] = widths.get(name, 0) + 1
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
        **widths,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Registers, spills and load widths of the compiled kernels.")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities times ten")
    parser.add_argument("--json", action="store_true", help="a row a line, instead of a table")
    arguments = parser.parse_args()
    for arch in arguments.arch:
        for call, kernel, binary in compiled(calls(), arch):
            found = row(call, kernel, binary, arch)
            head = f"sm_{arch}  {call:36} {kernel:15} {found['warps']:2} warps  {found['registers']:3} registers"
            widths = "  ".join(
                f"{name} x {found[name]}" for name in sorted(found) if name.startswith(("load_", "store_"))
            )
            table = f"{head}  {found['spills']} spills  {found['instructions']:4} instructions  {widths}"
            print(json.dumps(found) if arguments.json else table, flush=True)


if __name__ == "__main__":
    main()
