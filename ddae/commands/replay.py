"""Replay a step with non-finite gradients from its dump, in one process, on a GPU or a CPU.

python launch/replay.py runs/NAME/dumps/step_00000123

Prints the largest absolute output and gradient of each layer. Exit code 1 if a value is non-finite, 0 otherwise.
"""

import argparse
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", type=Path, help="dump folder, named in the run's error message")
    args = parser.parse_args()
    from ddae.tools.replay import replay  # takes seconds

    return replay(args.dump)
