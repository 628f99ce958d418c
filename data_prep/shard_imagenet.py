"""Convert ImageNet's archives, or any folder, archive or shards of images, to verified, shuffled shards."""

import require_packages  # noqa: F401

from ddae.commands.shard import main
from ddae.errors import run_command

if __name__ == "__main__":
    run_command("shard_imagenet", main)
