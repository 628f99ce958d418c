"""Draw the paper's figures of one encoder, or of several side by side."""

import require_packages  # noqa: F401

from ddae.commands.figures import main
from ddae.errors import run_command

if __name__ == "__main__":
    run_command("figures", main)
