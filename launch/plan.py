"""Estimate the cost of a run before it starts: memory by part at each ZeRO stage, FLOPs, traffic, days."""

import require_packages  # noqa: F401

from ddae.commands.plan import main
from ddae.errors import run_command

if __name__ == "__main__":
    run_command("plan", main)
