"""Try what a run leans on: versions, devices, DeepSpeed's ops, image decoders, disk, a checkpoint, an all-reduce.

python launch/doctor.py                                    this machine
deepspeed --hostfile hosts launch/doctor.py                all nodes, before a run is started on them

Exit code 0 where everything works, 1 where something does not.
"""

import argparse
from pathlib import Path

from ddae.config.cli import take_slurm_ranks
from ddae.errors import run_command


def main() -> int:
    take_slurm_ranks()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where runs are to be")
    parser.add_argument("--ds_config", default="ds_configs/zero2.json", help="DeepSpeed JSON to try a checkpoint with")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher's word
    args = parser.parse_args()
    from ddae.distributed.engine import stop_process_group
    from ddae.tools.doctor import check, examine  # seconds to import

    check(args.folder, args.ds_config)
    failed = examine(args.folder, args.ds_config)
    stop_process_group()
    return int(failed > 0)


if __name__ == "__main__":
    run_command("doctor", main)
