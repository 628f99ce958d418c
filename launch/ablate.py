"""Run a table of the paper, at its own scale or smaller, and compare with the paper's numbers."""

import require_packages  # noqa: F401

from ddae.commands.ablate import main
from ddae.errors import run_command

if __name__ == "__main__":
    run_command("ablate", main, ranks=True)
