"""Metrics of a run: losses over the global batch, spikes, step times, system load."""

import contextlib
import math
import os
import platform
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor

from ddae.distributed.comm import device, gather, max_over_ranks, mean_over_ranks
from ddae.method.betas import Betas

SPIKE = 8.0  # median absolute deviations above the median
MIN_LOSSES = 20  # before a loss can be a spike
MEGABYTE = 10**6


class LossMeter:
    """Accumulates the losses of one step on the device; read() synchronises and belongs to log steps."""

    def __init__(self, names: Iterable[str] = ()):
        """names: of the parts given to add(), after `loss/total`."""
        self.names = ["loss/total", *names]
        self._sums: Tensor | None = None
        self._micro_batches = 0

    def reset(self) -> None:
        """Begin the next step."""
        self._sums, self._micro_batches = None, 0

    def add(self, total: Tensor, parts: Iterable[Tensor] = ()) -> None:
        """Add a micro-batch: total [] is its share of the step's loss, parts are vectors of means over it."""
        values = torch.cat([part.detach().float() for part in (total[None], *parts)])
        self._sums = values if self._sums is None else self._sums + values
        self._micro_batches += 1

    def read(self, betas: Betas | None = None) -> dict[str, float]:
        """Return means over the global batch, the betas that the step used, and their gradient. All ranks call it."""
        assert self._sums is not None
        means = self._sums / self._micro_batches
        means[0] = self._sums[0]
        means, names = mean_over_ranks(means), self.names
        if betas is not None:
            means[0] += betas.regulariser
            means = torch.cat([means, betas.last_values, betas.gradient])
            names = names + [f"beta/{name}" for name in betas.names] + [f"grad/beta/{name}" for name in betas.names]
        row = dict(zip(names, means.tolist(), strict=True))
        # A tap that the step did not supervise has NaN. If NaN is an error, the total is NaN, too, and all is kept.
        keeps_all = math.isnan(row["loss/total"])
        return {name: value for name, value in row.items() if keeps_all or not math.isnan(value)}


class SpikeDetector:
    """Compares each logged loss with the 200 before it."""

    def __init__(self, losses: Iterable[float]):
        self._before = deque((loss for loss in losses if math.isfinite(loss)), maxlen=200)

    def is_spike(self, loss: float) -> bool:
        """Return whether the loss is non-finite, or SPIKE median absolute deviations above the median; then add it."""
        spike = not math.isfinite(loss)
        if len(self._before) >= MIN_LOSSES and not spike:
            median = statistics.median(self._before)
            deviation = statistics.median(abs(each - median) for each in self._before)
            spike = loss > median + SPIKE * max(deviation, 1e-3 * abs(median))
        if math.isfinite(loss):
            self._before.append(loss)
        return spike


class StepTimer:
    """Wall-clock time of the steps since the last read(), and of the waiting, saving and evaluating among them."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._start, self._steps = time.perf_counter(), 0
        self._spent = {"data_wait": 0.0, "save": 0.0, "evaluate": 0.0}

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        """Count the time within the context as `what`: data_wait, save or evaluate."""
        start = time.perf_counter()
        yield
        self._spent[what] += time.perf_counter() - start

    def count_step(self) -> None:
        """End a step."""
        self._steps += 1

    @property
    def seconds(self) -> float:
        """Seconds since the last read(), without saving and evaluating."""
        return time.perf_counter() - self._start - self._spent["save"] - self._spent["evaluate"]

    def read(self, batch_size: int) -> dict[str, float]:
        """Return images/s over all ranks, seconds a step (without saving and evaluating), seconds of it spent waiting
        for data, the largest of both over the ranks, and seconds spent saving; then start anew. All ranks call it."""
        seconds, steps = self.seconds, max(1, self._steps)
        step, data_wait = seconds / steps, self._spent["data_wait"] / steps
        slowest_step, longest_wait = max_over_ranks([step, data_wait])
        row = {
            "throughput/images_per_s": batch_size * self._steps / seconds,
            "time/step": step,
            "time/step_max": slowest_step,
            "time/data_wait": data_wait,
            "time/data_wait_max": longest_wait,
            "time/save": self._spent["save"],
        }
        self._restart()
        return row


def system_metrics() -> dict[str, float]:
    """Return system/NODE/... in MLflow's names: CPU and memory of every node; use, memory, power of every GPU.

    All ranks call it.
    """
    merged: dict[str, float] = {}
    for of_rank in gather(_system_metrics_of_this_rank()):
        merged |= of_rank
    return merged


def _system_metrics_of_this_rank() -> dict[str, float]:
    local, values = int(os.environ.get("LOCAL_RANK", "0")), {}
    if local == 0:  # reports for its node
        memory = psutil.virtual_memory()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),  # since the last call
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": memory.percent,
        }
    if device().type == "cuda":
        values[f"gpu_{local}_memory_usage_megabytes"] = torch.cuda.max_memory_reserved() / MEGABYTE
        with contextlib.suppress(Exception):  # the driver's library may be missing, or not know (a slice of) this GPU
            values[f"gpu_{local}_utilization_percentage"] = torch.cuda.utilization()
            values[f"gpu_{local}_power_usage_watts"] = torch.cuda.power_draw() / 1000
    return {f"system/{platform.node()}/{name}": float(value) for name, value in values.items()}
