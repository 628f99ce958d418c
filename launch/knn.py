"""Evaluate an encoder by k-nearest neighbours, without training, and measure its features' effective rank."""

import require_packages  # noqa: F401

from ddae.commands.knn import main
from ddae.errors import run_command

if __name__ == "__main__":
    run_command("knn", main)
