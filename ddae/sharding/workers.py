"""Run tasks in worker processes with a progress bar. No worker outlives the main process, however that ends."""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from ddae.errors import UserError
from ddae.progress import ImageProgress

T = TypeVar("T")
_FORK = multiprocessing.get_context("fork")  # workers inherit the task function and its state, without pickling
_num_done = _FORK.Value("q", 0)  # images
_work: Callable[..., Any]


def count_images(count: int = 1) -> None:
    """Advance the progress bar by so many images; called in a worker."""
    with _num_done.get_lock():
        _num_done.value += count


def run(work: Callable[..., T], tasks: list[tuple], num_workers: int, total: int, done: int = 0) -> Iterator[T]:
    """Yield work(*task) of each task in the order of completion, computed in worker processes.

    `work` may be any callable. The progress bar counts images from `done` to `total`. The first error in a worker ends
    all workers and is raised here. Raise UserError if a worker was killed.
    """
    global _num_done
    if not tasks:
        return
    _num_done = _FORK.Value("q", done)  # a new one: a worker that was killed may hold the lock of the last one
    with (
        ProcessPoolExecutor(max(1, min(num_workers, len(tasks))), _FORK, _init_worker, (work, os.getpid())) as pool,
        ImageProgress(total, done) as progress,
    ):
        try:
            pending = {pool.submit(_call, *task) for task in tasks}
            while pending:
                finished, pending = wait(pending, timeout=0.3, return_when=FIRST_COMPLETED)
                progress.update(_num_done.get_obj().value)  # not locked: a killed worker never releases the lock
                for future in finished:
                    yield future.result()
        except BrokenProcessPool:
            fix = "Pass fewer --workers; the same command resumes."
            raise UserError(f"a worker was killed, possibly because memory ran out. {fix}") from None
        finally:
            if pending:  # an error, or the caller closed the generator
                for child in multiprocessing.active_children():
                    child.kill()


def _init_worker(work: Callable[..., Any], parent: int) -> None:
    """Initialise a worker: ignore Ctrl-C, which the parent handles, and die with the parent."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before prctl()
        os._exit(1)


def _call(*task: Any) -> Any:
    return _work(*task)
