"""Cores and threads of the ranks of one machine: each gets its own share."""

import os
from contextlib import suppress
from pathlib import Path

import torch

from ddae.distributed.comm import gather, rank

MIN_CORES = 2  # that a rank is bound to
TOPOLOGY = Path("/sys/devices/system/cpu")
PCI_DEVICES = Path("/sys/bus/pci/devices")


_own_cores: int | None = None  # of this rank, once bind_cores() was called


def num_workers(setting: int | None) -> int:
    """Return how many worker processes this rank starts: the setting, or with None one for each of its cores.

    A rank's cores are those it is bound to; of cores that several ranks use, each has its share.
    """
    if setting is not None:
        return setting
    return len(os.sched_getaffinity(0)) if _own_cores is None else _own_cores


def bind_cores() -> None:
    """Bind each rank to cores of its own, close to its GPU, and let torch use as many threads. All ranks call it.

    Data workers, which a rank starts later, inherit its cores. Ranks that a launcher has bound already keep theirs.
    With fewer than MIN_CORES a rank none is bound: its main thread would wait for its workers, or for another process.
    OMP_NUM_THREADS, if set, is the number of threads.
    """
    global _own_cores
    allowed = os.sched_getaffinity(0)
    near = allowed & cores_near_gpu() or allowed
    of_ranks = gather((os.uname().nodename, sorted(near)))
    same = [number for number, facts in enumerate(of_ranks) if facts == of_ranks[rank()]]
    _own_cores = max(1, len(near) // len(same))
    if len(same) == 1:
        return
    own = share(near, len(same), same.index(rank()))
    for thread in os.listdir("/proc/self/task") if len(own) >= MIN_CORES else ():
        with suppress(OSError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), own)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(own)))


def share(cores: set[int], parts: int, part: int) -> set[int]:
    """Return one of so many equal parts of the cores; hardware threads of one core stay together."""
    ordered = sorted(cores, key=_place)
    size = len(ordered) // parts
    return set(ordered[part * size : (part + 1) * size])


def cores_near_gpu() -> set[int]:
    """Return the cores on the NUMA node of this process's GPU; all that are known where there is no GPU."""
    everything = set(range(os.cpu_count() or 1))
    if not torch.cuda.is_available():
        return everything
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    try:
        return parse_cores((PCI_DEVICES / address / "local_cpulist").read_text())
    except OSError:  # not shown in this container
        return everything


def parse_cores(text: str) -> set[int]:
    """Return the numbers in a list such as 0-3,8-11."""
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores


def _place(core: int) -> tuple[int, int, int]:
    """Return the socket, the physical core, and the number of a hardware thread."""
    try:
        names = ("physical_package_id", "core_id")
        socket, physical = (int((TOPOLOGY / f"cpu{core}" / "topology" / name).read_text()) for name in names)
    except OSError:
        return 0, core, core
    return socket, physical, core
