"""Log lines with time and rank on the terminal; what other packages say goes to a file of the run."""

import logging
import sys
from logging.handlers import MemoryHandler
from pathlib import Path

from ddae.distributed.comm import is_main, rank

OTHERS = ("DeepSpeed", "py.warnings", "torch")  # loggers of other packages, and of Python's warnings
MAX_HELD = 1000  # records of other packages before the run's folder is known; older ones are dropped


class _Terminal(logging.StreamHandler):
    """Write INFO on rank 0 alone and warnings on every rank to the current sys.stdout, errors to sys.stderr."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self.setFormatter(logging.Formatter("[%(asctime)s rank %(rank)d] %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno > logging.INFO or is_main():
            record.rank, self.stream = rank(), sys.stderr if record.levelno >= logging.ERROR else sys.stdout
            super().emit(record)


class _Others(MemoryHandler):
    """Hold records of other packages until their file is known; errors go to the terminal, too."""

    def __init__(self) -> None:
        super().__init__(MAX_HELD, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self._terminal = _Terminal()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            self._terminal.emit(record)
        if isinstance(self.target, logging.Handler):
            self.target.emit(record)
        else:
            self.buffer = [*self.buffer[1 - MAX_HELD :], record]


_terminal, _others = _Terminal(), _Others()


def configure_logging() -> None:
    """Log this package's messages, each with its time and rank, and hold those of other packages.

    Call it again once a package was imported that adds a handler of its own.
    """
    logger = logging.getLogger("ddae")
    if _terminal not in logger.handlers:
        logger.addHandler(_terminal)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logging.captureWarnings(True)
    for name in OTHERS:
        other = logging.getLogger(name)
        other.handlers, other.propagate = [_others], False


def keep_log_of_others(folder: Path) -> None:
    """Write what other packages have said and will say to a file of this rank. If it cannot be written, drop it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / f"rank_{rank():05d}.txt", encoding="utf-8", errors="replace")
    except OSError:
        return
    file.setFormatter(logging.Formatter("[%(asctime)s %(name)s %(levelname)s] %(message)s"))
    file.handleError = lambda record: None  # type: ignore[method-assign] - a full disk
    held, _others.buffer = _others.buffer, []
    _others.setTarget(file)
    for record in held:
        file.emit(record)
