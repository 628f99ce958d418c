"""Export an encoder to the format of another library."""

import require_packages  # noqa: F401

from ddae.commands.export import main
from ddae.errors import run_command

if __name__ == "__main__":
    run_command("export", main)
