"""Failures of a rank that end in a sentence: a lost rank, a full GPU or disk, an operator that cannot be compiled."""

import errno
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ddae.distributed.watchdog import EXIT_CODE
from ddae.errors import RankError, UserError, one_line

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # full, over the quota, read-only
GLOO = "gloo/transport"  # in the messages of gloo's connections
BUILD_ERRORS = ("Error building extension", "Ninja is required", "Error compiling objects")  # torch's
BUILD_ERRORS += ("Unable to JIT load",)  # DeepSpeed's, if a library is missing


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
        if in_main_thread:
            signal.signal(signal.SIGINT, before)
