"""Verify shards against their manifest. Exit code 0: no problems; 1: problems, which are listed."""

import require_packages  # noqa: F401

from ddae.commands.check_shards import main
from ddae.errors import run_command

if __name__ == "__main__":
    run_command("check_shards", main)
