"""Check that training can run: versions, devices, DeepSpeed's ops, image decoders, disk, checkpoints, all-reduce."""

import require_packages  # noqa: F401

from ddae.commands.doctor import main
from ddae.errors import run_command

if __name__ == "__main__":
    run_command("doctor", main, ranks=True)
