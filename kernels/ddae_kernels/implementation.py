"""Which implementation serves a call, and whether its arguments' values may be looked at."""

import importlib.util
import logging
import os
from functools import cache

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "reference", "triton")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton asks as early
HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose(impl: str, device: torch.device, *dtypes: torch.dtype, quiet: bool = False) -> str:
    """ "reference" or "triton" for a call on tensors like these; ValueError where `impl` can be neither.

    "auto" takes Triton for CUDA tensors and the reference elsewhere, and logs it once unless `quiet`: as a warning
    where it is the reference. "triton" is never exchanged for the reference: where Triton cannot serve, it is an error.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "reference":
        return impl
    obstacle = _obstacle(device.type, dtypes)
    if impl == "triton":
        if obstacle:
            raise ValueError(f"impl='triton' cannot serve this call: {obstacle}; use impl='reference'")
        return impl
    chosen = "triton" if device.type == "cuda" and not obstacle else "reference"
    if not (quiet or torch.compiler.is_compiling()):
        _say(chosen, device.type, obstacle)
    return chosen


def values_are_checked(tensor: Tensor) -> bool:
    """Whether values may be looked at: on CPU, or anywhere under DDAE_CHECK=1 (on a GPU a look stalls the stream), or
    nowhere under DDAE_CHECK=0.

    Never under torch.compile, where a look breaks the graph.
    """
    if torch.compiler.is_compiling():
        return False
    wish = os.environ.get("DDAE_CHECK", "")
    return wish == "1" or (tensor.device.type == "cpu" and wish != "0")


def _obstacle(device: str, dtypes: tuple[torch.dtype, ...]) -> str:
    """Why Triton cannot serve, in words; empty where it can."""
    foreign = [str(dtype) for dtype in dtypes if dtype not in KERNEL_DTYPES]
    if foreign:
        return f"{foreign[0]} is the reference's alone"
    if device == "cpu" and not INTERPRETED:
        return "the tensors are on the CPU, where Triton runs only with TRITON_INTERPRET=1 set beforehand"
    if device not in ("cpu", "cuda"):
        return f"no kernel is written for {device} tensors"
    return "" if HAS_TRITON else "Triton is not installed"


@cache
def _say(chosen: str, device: str, obstacle: str) -> None:
    level = logging.INFO if chosen == "triton" else logging.WARNING
    reason = f" ({obstacle})" if obstacle else ""
    logging.getLogger("ddae_kernels").log(level, "impl='auto' takes %s for %s tensors%s", chosen, device, reason)
