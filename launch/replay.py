"""Run a step again whose numbers went wrong, from the dump that the run left; on one process, with a GPU or without.

python launch/replay.py runs/NAME/dumps/step_00000123
"""

import argparse
from pathlib import Path

from ddae.errors import run_command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", type=Path, help="folder that the run named when it ended")
    args = parser.parse_args()
    from ddae.tools.replay import replay  # seconds to import

    return replay(args.dump)


if __name__ == "__main__":
    run_command("replay", main)
