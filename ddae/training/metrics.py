"""What a run says of itself while it trains: means over the global batch, rates, the progress line."""

import contextlib
import math
import os
import platform
import statistics
import time
from collections import deque
from collections.abc import Iterable
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor

from ddae.config.pretrain import tap_name
from ddae.distributed.comm import device, gather, is_main, mean_over_ranks
from ddae.method.betas import Betas
from ddae.method.model import Losses, Method

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


SPIKE = 8.0  # median absolute deviations above the median
FEWEST = 20  # losses before anything stands out


class Meter:
    """Gathers the losses of one step on the device; they are read at log steps alone."""

    def __init__(self, method: Method):
        self.names = ["loss/total"]
        for name, branch in method.branches.items():
            for kind in ("loss", "error"):
                self.names += [f"{kind}/{name}/{tap_name(tap)}" for tap in branch.taps]  # type: ignore[union-attr]
        self._sums: Tensor | None = None
        self._micro_batches = 0

    def add(self, losses: Losses) -> None:
        """Add one micro-batch of the step."""
        parts = [losses.total.detach()[None]]
        for result in losses.branches.values():
            parts += [result.tap_loss, result.token_error.mean((1, 2))]
        values = torch.cat([part.float() for part in parts])
        self._sums = values if self._sums is None else self._sums + values
        self._micro_batches += 1

    def clear(self) -> None:
        """Begin the next step."""
        self._sums, self._micro_batches = None, 0

    def read(self, betas: Betas) -> dict[str, float]:
        """Means over the global batch, the betas that the step used and their gradient; all ranks call it."""
        assert self._sums is not None
        means = self._sums / self._micro_batches
        means[0] = self._sums[0]  # a share of the step already
        means = mean_over_ranks(means)
        means[0] += betas.regulariser
        values = torch.cat([means, betas.last_values, betas.gradient]).tolist()  # the one look at the device
        names = self.names + [f"beta/{name}" for name in betas.names] + [f"grad/beta/{name}" for name in betas.names]
        return dict(zip(names, values, strict=True))


class Spikes:
    """Tells a loss that stands out from those of the last logged steps."""

    def __init__(self, losses: Iterable[float]):
        self._before = deque((loss for loss in losses if math.isfinite(loss)), maxlen=200)

    def is_one(self, loss: float) -> bool:
        """Whether the loss is no number or lies above the median by SPIKE times what the middle half spreads; then it
        is counted among the losses to come."""
        spike = not math.isfinite(loss)
        if len(self._before) >= FEWEST and not spike:
            middle = statistics.median(self._before)
            spread = statistics.median(abs(each - middle) for each in self._before)
            spike = loss > middle + SPIKE * max(spread, 1e-3 * abs(middle))
        if math.isfinite(loss):
            self._before.append(loss)
        return spike


class Clock:
    """Wall-clock time of the steps since the last reading, and how much of it went into waiting for data and saving."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._start, self._steps = time.perf_counter(), 0
        self._spent = {"data_wait": 0.0, "save": 0.0, "evaluate": 0.0}

    @contextmanager
    def spending(self, on: str):
        """Time within counts as `on`: data_wait, save or evaluate."""
        start = time.perf_counter()
        yield
        self._spent[on] += time.perf_counter() - start

    def count_step(self) -> None:
        self._steps += 1

    def seconds(self) -> float:
        """Since the last reading, without checkpoints and evaluations."""
        return time.perf_counter() - self._start - self._spent["save"] - self._spent["evaluate"]

    def read(self, batch_size: int) -> dict[str, float]:
        """Seconds a step without those spent on checkpoints and evaluations, seconds of it spent waiting for data,
        images/s over all ranks, and seconds that checkpoints took in all; then begin anew."""
        seconds, steps = self.seconds(), max(1, self._steps)
        row = {
            "rate/images_per_s": batch_size * self._steps / seconds,
            "time/step": seconds / steps,
            "time/data_wait": self._spent["data_wait"] / steps,
            "time/save": self._spent["save"],
        }
        self._begin()
        return row


def print_progress(row: dict[str, float], steps: int) -> None:
    """One line: step, loss, images/s, share of time spent waiting for data, time left."""
    if is_main():
        left = int((steps - row["step"]) * row["time/step"])
        wait = row["time/data_wait"] / row["time/step"]
        mfu = f"  MFU {row['rate/mfu']:.0%}" if "rate/mfu" in row else ""
        print(
            f"step {int(row['step'])}/{steps}  loss {row['loss/total']:.4f}  {row['rate/images_per_s']:.0f} images/s"
            f"{mfu}  data wait {wait:.0%}  left {left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d}"
            f"{'  SPIKE' if row['loss/spike'] else ''}",
            flush=True,
        )
