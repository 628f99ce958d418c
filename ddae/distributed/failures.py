"""Failures of a rank that end in a sentence: a lost rank, a full GPU or disk, an operator that cannot be compiled."""

import errno
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import cpp_extension

from ddae.distributed.watchdog import EXIT_CODE
from ddae.errors import RankError, UserError, one_line

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # full, over the quota, read-only
GLOO = "gloo/transport"  # in the messages of gloo's connections
BUILD_ERRORS = ("Error building extension", "Ninja is required", "Error compiling objects")  # torch's
BUILD_ERRORS += ("Unable to JIT load",)  # DeepSpeed's, if a library is missing
logger = logging.getLogger(__name__)


@contextmanager
def explained() -> Iterator[None]:
    """Context in which such a failure is raised as a RankError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        fix = "Lower train_micro_batch_size_per_gpu in the DeepSpeed JSON."
        raise RankError(f"the GPU is out of memory ({memory_reason(error)}). {fix}") from None
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        problem = f"{error.filename or 'a file'} cannot be written ({error.strerror})"
        raise RankError(f"{problem}. Free space there; the same command resumes the run.") from None
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and GLOO not in str(error):
            raise
        reason = one_line(str(error).partition(". This is")[0].partition("] ")[2] if GLOO in str(error) else error)
        problem = f"the connection to another rank is lost ({reason}): that rank has ended, or the network failed"
        raise RankError(f"{problem}. The same command resumes the run.", EXIT_CODE) from None


def memory_reason(error: torch.OutOfMemoryError) -> str:
    """Return what torch tried to allocate, and what was in use, without its advice."""
    return one_line(str(error).partition(" If reserved but unallocated")[0], 300).rstrip(".")


@contextmanager
def operators_may_be_built() -> Iterator[None]:
    """Context in which DeepSpeed may compile an operator: Ctrl-C is a KeyboardInterrupt, a failure is a UserError."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if in_main_thread:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    load = cpp_extension.load
    cpp_extension.load = _announced(load)
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(BUILD_ERRORS):
            raise
        if "interrupted" in str(error):  # the compiler received Ctrl-C before this process did
            raise KeyboardInterrupt from None
        fix = "Install g++ and ninja; python launch/doctor.py tries it again."
        raise UserError(f"an operator of DeepSpeed cannot be compiled ({one_line(error, 300)}). {fix}") from None
    finally:
        cpp_extension.load = load
        if in_main_thread:
            signal.signal(signal.SIGINT, before)


def _announced(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch's function that loads an operator, announcing one that it has to build first."""

    def announce_and_load(name: str, *args: Any, **options: Any) -> Any:
        folder = options.get("build_directory") or cpp_extension._get_build_directory(name, False)
        if not os.path.exists(os.path.join(folder, f"{name}.so")):
            logger.info("building DeepSpeed's operator %s for this machine, once", name)
        return load(name, *args, **options)

    return announce_and_load
