"""What the machines are busy with: a look at every node and GPU, in the names of MLflow's own system metrics."""

import contextlib
import os
import platform

import psutil
import torch

from ddae.distributed import device, gather

MEGABYTE = 10**6


def system_metrics() -> dict[str, float]:
    """system/NODE/... of all nodes: processors and memory of each, use, memory and power of each GPU. All ranks call
    it."""
    merged: dict[str, float] = {}
    for of_rank in gather(_of_this_rank()):
        merged |= of_rank
    return merged


def _of_this_rank() -> dict[str, float]:
    local, seen = int(os.environ.get("LOCAL_RANK", "0")), {}
    if local == 0:  # speaks for its node
        memory = psutil.virtual_memory()
        seen = {
            "cpu_utilization_percentage": psutil.cpu_percent(),  # since the last look
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": memory.percent,
        }
    if device().type == "cuda":
        seen[f"gpu_{local}_memory_usage_megabytes"] = torch.cuda.max_memory_reserved() / MEGABYTE
        with contextlib.suppress(Exception):  # the driver's library may be missing, or not know (a slice of) this GPU
            seen[f"gpu_{local}_utilization_percentage"] = torch.cuda.utilization()
            seen[f"gpu_{local}_power_usage_watts"] = torch.cuda.power_draw() / 1000
    return {f"system/{platform.node()}/{name}": float(value) for name, value in seen.items()}
