"""Measure the speed of the training step, the image loaders, sharding, or evaluations, each relative to a baseline."""

import require_packages  # noqa: F401

from ddae.commands.benchmark import main
from ddae.errors import run_command

if __name__ == "__main__":
    run_command("benchmark", main, ranks=True)
