"""Replay a step with non-finite gradients from its dump, in one process, on a GPU or a CPU."""

import require_packages  # noqa: F401

from ddae.commands.replay import main
from ddae.errors import run_command

if __name__ == "__main__":
    run_command("replay", main)
