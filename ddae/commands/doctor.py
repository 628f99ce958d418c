"""Check that training can run: versions, devices, DeepSpeed's ops, image decoders, disk, checkpoints, all-reduce.

python launch/doctor.py                                    this machine
deepspeed --hostfile hosts launch/doctor.py                all nodes

Exit code 0 if all checks pass, 1 if one fails.
"""

import argparse
from pathlib import Path

from ddae.config.cli import take_slurm_ranks


def main() -> int:
    take_slurm_ranks()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="folder for runs (default: runs)")
    parser.add_argument("--ds_config", default="zero2", help="DeepSpeed JSON (default: zero2)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # added by the deepspeed launcher
    args = parser.parse_args()
    from ddae.distributed.engine import stop_process_group  # takes seconds
    from ddae.tools.doctor import check_flags, run_checks

    check_flags(args.folder, args.ds_config)
    num_failed = run_checks(args.folder, args.ds_config)
    stop_process_group()
    return int(num_failed > 0)
