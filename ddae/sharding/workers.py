"""Work spread over processes, with a progress bar; nothing of it outlives this process, whatever ends it."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from ddae.errors import UserError

T = TypeVar("T")
tqdm.set_lock(threading.RLock())  # its own is shared between processes, and stays held by one that is killed
tqdm.monitor_interval = 0  # nor may a thread hold it while workers are forked
_FORK = multiprocessing.get_context("fork")  # what is to be done, and all it knows, is inherited and not sent
_done = _FORK.Value("q", 0)
_work: Callable[..., Any]


def count_one() -> None:
    """One image more is done; called by the work."""
    with _done.get_lock():
        _done.value += 1


def run(work: Callable[..., T], tasks: list[tuple], workers: int, total: int, done: int = 0) -> Iterator[T]:
    """Yield work(*task) of each task as it comes, from worker processes; the bar counts images, `total` in all.

    `work` may be any callable. An error in it ends all workers and is raised here; UserError where one was killed.
    """
    _done.value = done
    start = (work, os.getpid())
    with (
        ProcessPoolExecutor(max(1, min(workers, len(tasks))), _FORK, _be_a_worker, start) as pool,
        tqdm(total=total, initial=done, unit=" images", mininterval=0.3 if sys.stderr.isatty() else 10) as bar,
    ):
        try:
            pending = {pool.submit(_call, *task) for task in tasks}
            while pending:
                finished, pending = wait(pending, timeout=0.3, return_when=FIRST_COMPLETED)
                bar.update(_done.get_obj().value - bar.n)  # without the lock, which a killed worker may hold
                for future in finished:
                    yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker was killed, perhaps for want of memory: try fewer --workers; the same command goes on"
            ) from None
        finally:
            if pending:  # an error, or nobody wants the rest
                for child in multiprocessing.active_children():
                    child.kill()


def _be_a_worker(work: Callable[..., Any], parent: int) -> None:
    """Leave Ctrl-C to the parent, and do not outlive it."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _call(*task: Any) -> Any:
    return _work(*task)
