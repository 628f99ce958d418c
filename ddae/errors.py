"""User errors: the exception, how commands report it, and error texts that are safe to print."""

import errno
import itertools
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO


class UserError(ValueError):
    """A mistake that the user can fix. Its message names what is wrong, what is expected, and the fix.

    Commands print it without a traceback, on one rank, and exit with code 2.
    """


class RankError(UserError):
    """A failure of one rank. Each rank that has it prints it, with its number, and exits with `code`."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


MEMORY_ERRORS = ("OutOfMemoryError", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator")  # of torch


def run_command(name: str, main: Callable[[], int | None], ranks: bool = False) -> None:
    """Run a command and exit with its code: 2 for a UserError, a full disk or memory, 130 for Ctrl-C.

    ranks: whether launchers may start it as several processes. A path that starts with ~/ is expanded.
    """
    sys.argv[1:] = map(_expand_argument, sys.argv[1:])
    try:
        size = os.environ.get("WORLD_SIZE", "1")
        if not ranks and size not in ("", "1"):
            raise UserError(f"WORLD_SIZE is {size}, but this command is one process. Start it without a launcher.")
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        code = report(f"{name}: {error}", 2)
    except KeyboardInterrupt:
        code = report(f"{name}: interrupted; run the same command again to resume", 130)
    except BrokenPipeError:  # the output goes to a command that has ended, such as head
        code = 0
    except (OSError, RuntimeError) as error:
        if (sentence := _explain(error)) is None:
            raise
        code = report(f"{name}: {sentence}", 2)
    except SystemExit as end:  # argparse has printed what is wrong
        if end.code == 2 and _has_expanded_pattern(sys.argv[1:]):
            fix = "Put it in quotes, as 'train-{000000..000099}.tar'."
            report(f"{name}: the shell has expanded a pattern to several arguments. {fix}", 2)
        code = end.code
    flush_output()
    sys.exit(code)


def report(message: str, code: int) -> int:
    """Print an error, if there is where to print it. Return the exit code."""
    say(message, sys.stderr)
    return code


def say(message: str, stream: TextIO | None = None) -> None:
    """Print a message to standard output or `stream`; one that is closed or on a full disk ends nothing."""
    with suppress(OSError, AttributeError, ValueError):
        print(message, file=stream or sys.stdout, flush=True)


def flush_output() -> None:
    """Flush standard output; drop what it cannot take, so that the interpreter's exit does not fail on it."""
    try:
        sys.stdout.flush()
    except (OSError, AttributeError, ValueError):
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def expand_home(value: str) -> str:
    """Return a path with its leading ~/ expanded, unless a file has that literal name."""
    return os.path.expanduser(value) if value.startswith("~/") and not os.path.exists(value) else value


def _expand_argument(arg: str) -> str:
    flag, equals, value = arg.partition("=") if arg.startswith("--") else (arg, "", "")
    return flag + equals + expand_home(value) if equals else expand_home(arg)


def _explain(error: OSError | RuntimeError) -> str | None:
    """Return a full disk, a missing permission or a lack of memory as a sentence; None for other errors."""
    if isinstance(error, OSError):
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            return None
        return f"{error.filename or 'a file'} cannot be used ({error.strerror}). Free space, or change its permissions."
    text = f"{type(error).__name__}: {error}"
    if any(each in text for each in MEMORY_ERRORS):
        return f"memory ran out ({one_line(str(error), 120)}). Pass a smaller --batch, or use another device."
    return None


def _has_expanded_pattern(args: list[str]) -> bool:
    """Return whether two arguments that follow each other are tars or zips."""
    is_archive = [arg.endswith((".tar", ".tar.gz", ".tgz", ".zip")) for arg in args]
    return any(first and second for first, second in itertools.pairwise(is_archive))


def one_line(error: object, length: int = 200) -> str:
    """Return the text of an error on one line, cut to `length` characters."""
    return " ".join(str(error).split())[:length]


def redact_url(url: str) -> str:
    """Return the URL without user name, password and query, which may be secret."""
    return re.sub(r"://[^/]*@", "://", url).partition("?")[0]
