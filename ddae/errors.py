"""The one exception that stands for a user's mistake, what commands make of it, and what is not to be told."""

import re
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake that the user can mend; its message is one plain sentence with the field, the value and the mend.

    The commands print it without a traceback, on one rank, and exit with code 2.
    """


def command(name: str, main: Callable[[], int | None]) -> None:
    """Run a command of one process and exit with its code; a user's mistake is a sentence and code 2."""
    try:
        code = main() or 0
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"{name}: stopped; the same command goes on", file=sys.stderr)
        code = 130
    sys.exit(code)


def shown(url: str) -> str:
    """The URL as it may be printed: without user, password and query, which may be secret."""
    return re.sub(r"://[^/]*@", "://", url).partition("?")[0]
