"""System errors of storage: retried, then reported as what they are. They say nothing about an image.

A network file system may answer ESTALE or EIO for seconds, and a process may have too many files open.
"""

import errno
import logging
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ddae.errors import UserError

T = TypeVar("T")
RETRY_DELAYS_S = (0.1, 1.0, 5.0, 20.0)  # before the second to fifth attempt
PERMANENT = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
FIXES = {
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
    errno.ENFILE: "Raise the machine's limit of open files (fs.file-max).",
    errno.ENOENT: "Restore the file.",
    errno.EACCES: "Change its permissions.",
}
logger = logging.getLogger(__name__)


def retry_system_errors(action: Callable[[], T], path: str | Path, recover: Callable[[], None] = lambda: None) -> T:
    """Return action(). Retry it after a system error, which recover() may do something about.

    path: of the file, for messages. Raise UserError if the error persists. Errors without a number, which decoders
    raise, are not system errors: they are raised at once.
    """
    for delay_s in (*RETRY_DELAYS_S, None):
        try:
            return action()
        except OSError as error:
            if error.errno is None:
                raise
            if delay_s is None or error.errno in PERMANENT:
                attempts = "" if delay_s is not None else f" in {len(RETRY_DELAYS_S) + 1} attempts"
                fix = FIXES.get(error.errno, "Check the storage; the same command resumes.")
                raise UserError(f"{path} cannot be read ({os.strerror(error.errno)}){attempts}. {fix}") from None
            logger.warning("%s: %s; next attempt in %g s", path, os.strerror(error.errno), delay_s)
        recover()
        time.sleep(delay_s)
    raise AssertionError("the last attempt returns or raises")


def read_file(path: Path) -> bytes:
    """Return the content of a file. Raise UserError if that fails."""
    return retry_system_errors(path.read_bytes, path)


def read_range(path: Path, offset: int, length: int) -> bytes:
    """Return up to `length` bytes of a file from `offset` on. Raise UserError if that fails."""

    def read() -> bytes:
        with open(path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), length, offset)

    return retry_system_errors(read, path)


def raise_open_file_limit() -> None:
    """Let this process open as many files as the system permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
