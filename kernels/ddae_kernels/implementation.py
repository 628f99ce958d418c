"""Selection of the implementation (Triton or reference), and of whether argument values are checked."""

import importlib.util
import logging
import os
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "reference", "triton")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read at import, as Triton does
HAS_TRITON = importlib.util.find_spec("triton") is not None
logger = logging.getLogger("ddae_kernels")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError if `value` is not one of `choices`. name: of the argument, for the message."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}.")


def resolve_impl(impl: str, device: torch.device, *dtypes: torch.dtype, quiet: bool = False) -> str:
    """Return "reference" or "triton" for a call with tensors of this device and these dtypes.

    "auto" resolves to Triton for CUDA tensors and to the reference otherwise. The choice is logged once unless `quiet`,
    as a warning if it is the reference. "triton" never falls back to the reference.

    Raise ValueError if `impl` is unknown, or if it is "triton" and Triton cannot run the call.
    """
    check_choice("impl", impl, IMPLEMENTATIONS)
    if impl == "reference":
        return impl
    obstacle = _triton_obstacle(device.type, dtypes)
    if impl == "triton" and obstacle:
        raise ValueError(f"impl='triton' cannot serve this call: {obstacle}. Pass impl='reference'.")
    resolved = "triton" if impl == "triton" or (device.type == "cuda" and not obstacle) else "reference"
    if impl == "auto" and not (quiet or torch.compiler.is_compiling()):
        _log_choice(resolved, device.type, obstacle)
    return resolved


def should_check_values(tensor: Tensor) -> bool:
    """Return whether the values of `tensor` may be checked: on the CPU by default, nowhere with DDAE_CHECK=0.

    On other devices a check synchronises host and device, so it needs DDAE_CHECK=1. Under torch.compile it would break
    the graph, so nothing is checked there.
    """
    if torch.compiler.is_compiling():
        return False
    setting = os.environ.get("DDAE_CHECK", "")
    return setting == "1" or (tensor.device.type == "cpu" and setting != "0")


def is_intercepted(tensor: Tensor) -> bool:
    """Return whether the operators of a call on `tensor` are traced or counted: by torch.compile, by a dispatch mode
    (fake tensors, FLOP counters), or by the class of the tensor.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__  # type: ignore[attr-defined]
    )


def _triton_obstacle(device: str, dtypes: tuple[torch.dtype, ...]) -> str:
    """Return the reason why Triton cannot run on this device and these dtypes, "" if it can."""
    unsupported = [str(dtype) for dtype in dtypes if dtype not in TRITON_DTYPES]
    if unsupported:
        return f"{unsupported[0]} is supported by the reference only"
    if device == "cpu" and not INTERPRETED:
        return "the tensors are on the CPU, where Triton needs TRITON_INTERPRET=1, set before the first import"
    if device not in ("cpu", "cuda"):
        return f"there are no kernels for {device} tensors"
    return "" if HAS_TRITON else "Triton is not installed"


@cache
def _log_choice(resolved: str, device: str, obstacle: str) -> None:
    level = logging.INFO if resolved == "triton" else logging.WARNING
    reason = f" ({obstacle})" if obstacle else ""
    logger.log(level, "impl='auto' uses %s for %s tensors%s", resolved, device, reason)
