"""User errors: the exception, how commands report it, and error texts that are safe to print."""

import itertools
import re
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake that the user can fix. Its message names what is wrong, what is expected, and the fix.

    Commands print it without a traceback, on one rank, and exit with code 2.
    """


class RankError(UserError):
    """A failure of one rank. Each rank that has it prints it, with its number, and exits with `code`."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def run_command(name: str, main: Callable[[], int | None]) -> None:
    """Run a single-process command and exit with its code: 2 for a UserError, 130 for Ctrl-C."""
    try:
        code = main() or 0
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; run the same command again to resume", file=sys.stderr)
        code = 130
    except SystemExit as end:  # argparse has printed what is wrong
        if end.code == 2 and _has_expanded_pattern(sys.argv[1:]):
            fix = "Put it in quotes, as 'train-{000000..000099}.tar'."
            print(f"{name}: the shell has expanded a pattern to several arguments. {fix}", file=sys.stderr)
        raise
    sys.exit(code)


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
