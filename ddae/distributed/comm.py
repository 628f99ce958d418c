"""Ranks: who am I, am I the one that speaks, the mean over all of us."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ddae.errors import UserError

T = TypeVar("T")


def take_slurm_ranks() -> None:
    """Where srun itself starts the ranks, say so in the launchers' words: a task is a rank."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in os.environ or tasks == 1:
        return
    number, local = os.environ["SLURM_PROCID"], int(os.environ["SLURM_LOCALID"])
    os.environ |= {"RANK": number, "WORLD_SIZE": str(tasks)}
    os.environ["LOCAL_RANK"] = str(local % max(1, torch.cuda.device_count()))  # a task may see its own GPU alone
    if missing := {"MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
        raise UserError(
            f"srun started {tasks} ranks, but {' and '.join(sorted(missing))} do not say where they meet: export them "
            "as launch/slurm_pretrain.sh does"
        )


def rank() -> int:
    """This process's rank; before the process group exists, what the launcher says."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def say(text: str) -> None:
    """Print on one rank."""
    if is_main():
        print(text, flush=True)


def device() -> torch.device:
    """The device of this process: its own GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of `values` over the ranks, on all of them; written into `values`."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of `values` over the ranks, on all of them; written into `values`."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather(value: T) -> list[T]:
    """What each rank has, on all of them; any picklable value."""
    if world_size() == 1:
        return [value]
    told: list = [None] * world_size()
    dist.all_gather_object(told, value)
    return told


def from_main(decide: Callable[[], T]) -> T:
    """What the main rank decides, on all of them; what it raises, too."""
    if world_size() == 1:
        return decide()
    told: list = [None, None]
    if is_main():
        try:
            told[0] = decide()
        except Exception as error:  # the others wait for a word
            told[1] = error
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


def agree(**facts: object) -> None:
    """UserError where the ranks do not all say the same: their nodes see other files or other packages."""
    told = gather(facts)
    for name in facts:
        if len({each[name] for each in told}) > 1:
            raise UserError(
                f"the ranks disagree on {name} ({[each[name] for each in told]}): their nodes must see the same "
                "shards, run folder and packages"
            )


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
