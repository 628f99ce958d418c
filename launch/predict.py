"""Classify images with a fine-tuned classifier, or segment them."""

import require_packages  # noqa: F401

from ddae.commands.predict import main
from ddae.errors import run_command

if __name__ == "__main__":
    run_command("predict", main)
