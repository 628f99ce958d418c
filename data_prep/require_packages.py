"""Imported first by every command: without the packages of ddae it ends with a sentence instead of a traceback."""

import sys
from importlib.util import find_spec

missing = [name for name in ("ddae", "torch", "tyro") if find_spec(name) is None]
if missing:
    command = sys.argv[0]
    print(
        f"{command}: {sys.executable} lacks the package {missing[0]}. "
        f"Run make venv once; then use .venv/bin/python {command}, or activate the environment: . .venv/bin/activate",
        file=sys.stderr,
    )
    sys.exit(2)
