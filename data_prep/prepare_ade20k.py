"""Convert the zip of ADE20K to shards of images and masks for segmentation. The zip is not unpacked to disk."""

import require_packages  # noqa: F401

from ddae.commands.prepare_ade20k import main
from ddae.errors import run_command

if __name__ == "__main__":
    run_command("prepare_ade20k", main)
