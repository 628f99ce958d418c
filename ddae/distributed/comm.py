"""Ranks: who am I, collectives over all ranks."""

import contextlib
import glob
import os
import platform
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from ddae.errors import UserError

T = TypeVar("T")
Group = dist.ProcessGroup | None  # ranks that communicate; None: the group of training
GPU_FILES = "/dev/nvidia[0-9]*"
DRIVER_FILE = "/proc/driver/nvidia/version"
MIN_DRIVER = {"12": "525 or newer", "13": "580 or newer"}  # by CUDA's major version


def rank() -> int:
    """Return this process's rank; before the process group exists, the one that the launcher assigned."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Return whether this process is rank 0, which writes files and logs."""
    return rank() == 0


def device() -> torch.device:
    """Return the device of this process: its own GPU, or the CPU where there is none.

    Raise UserError if there is a GPU that torch cannot use.
    """
    if not torch.cuda.is_available():
        _require_no_gpu()
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if os.environ.get("SLURM_PROCID") == os.environ.get("RANK", "none"):  # started by srun, not by a launcher inside it
        local %= torch.cuda.device_count()  # srun may show a task its own GPU alone
    return torch.device("cuda", local)


def device_memory() -> int:
    """Return the bytes of memory of this process's GPU, or of the machine where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(device()).total_memory
    return psutil.virtual_memory().total


def _require_no_gpu() -> None:
    """Raise UserError if this machine has a GPU that is not hidden on purpose: torch was built for a newer driver."""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    if is_hidden or not glob.glob(GPU_FILES):
        return
    text = ""
    with contextlib.suppress(OSError):
        text = Path(DRIVER_FILE).read_text()
    found = re.search(r"\s(\d+\.[\d.]+)\s", text)
    driver = f"driver {found[1]}" if found else "a driver of unknown version"
    cuda, fix = torch.version.cuda, "Update the driver."
    if cuda is not None and cuda.startswith("13") and (found is None or int(found[1].partition(".")[0]) >= 525):
        fix = "Update the driver, or install a torch for CUDA 12 with make venv CUDA=cu12."
    if cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA, and the machine has {driver}"
        fix = "Install a torch that is built with CUDA."
    else:
        needed = MIN_DRIVER.get(cuda.partition(".")[0], "of a later version")
        reason = f"torch is built for CUDA {cuda}, which needs driver {needed}, and the machine has {driver}"
        least = re.match(r"\d+", needed)
        if found is not None and least is not None and int(found[1].partition(".")[0]) >= int(least[0]):
            reason = f"torch finds no GPU although {driver} supports its CUDA {cuda}"
            fix = "See whether nvidia-smi lists it, and whether the container was started with access to GPUs."
    raise UserError(
        f"{platform.node()} has a GPU that cannot be used: {reason}. {fix} "
        "For the CPU set CUDA_VISIBLE_DEVICES= or, in training, pass --engine.device cpu."
    )


def record_collectives() -> None:
    """Turn on torch's flight recorder of collectives, before the process group exists, unless it is configured."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")


def last_collectives() -> bytes:
    """Return the last collectives of this rank, and their state, as torch's flight recorder pickles them."""
    from torch._C import _distributed_c10d

    is_nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return getattr(_distributed_c10d, "_dump_nccl_trace" if is_nccl else "_dump_fr_trace")()


def mean_over_ranks(values: Tensor) -> Tensor:
    """Replace `values` by their mean over the ranks, and return them."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def sum_over_ranks(values: Tensor) -> Tensor:
    """Replace `values` by their sum over the ranks, and return them."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def max_over_ranks(values: list[float]) -> list[float]:
    """Return the largest of each value over the ranks."""
    if world_size() == 1:
        return values
    largest = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def gather(value: T, group: Group = None) -> list[T]:
    """Return the value of every rank, in the order of the ranks; any picklable value."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group)
    return values


def new_cpu_group(timeout_s: float) -> Group:
    """Return a new gloo group of all ranks' CPUs: of another thread, or for messages that do not synchronise devices.

    timeout_s: seconds after which a rank that waits for another gives up. All ranks call it.
    """
    if world_size() == 1:
        return None
    timeout = timedelta(seconds=timeout_s)
    return dist.new_group(backend="gloo", timeout=timeout)  # type: ignore[return-value] - all ranks are members


def broadcast_from_main(compute: Callable[[], T], group: Group = None) -> T:
    """Return on all ranks what rank 0 computes, or raise on all ranks what it raises."""
    if world_size() == 1:
        return compute()
    outcome: list[Any] = [None, None]  # result, error
    if is_main():
        try:
            outcome[0] = compute()
        except Exception as error:  # the other ranks wait for the broadcast
            outcome[1] = error
    dist.broadcast_object_list(outcome, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def assert_equal_across_ranks(**facts: object) -> None:
    """Raise UserError on all ranks if one of the facts differs between ranks."""
    of_ranks = gather(facts)
    for name in facts:
        values = [each[name] for each in of_ranks]
        if any(value != values[0] for value in values):
            raise UserError(
                f"{name} differs between ranks: {values}. "
                "Give all nodes the same shards, the same run directory and the same packages."
            )


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()
