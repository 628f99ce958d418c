"""Run a table of the paper, at its own scale or smaller, and compare with the paper's numbers.

python launch/ablate.py --table 3 --scale nano
deepspeed launch/ablate.py --table 3 --scale paper --data data/imagenet --ds_config ds_configs/zero2.json

The same command resumes an interrupted table; a run with a row in --results is not repeated. --parallel 8 runs eight
rows at a time on this machine. To distribute a table over machines, give each its own --only or --seeds, and --no_table
to all but the last, which writes the table.
"""

import argparse
from pathlib import Path
from typing import get_args

from ddae.config.base import TrackerKind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, help="1, 2, 3, 4, 6 or 7 of the paper; an unknown one lists all")
    parser.add_argument("--scale", default="paper", help="nano, micro, small, tiny or paper (default: paper)")
    parser.add_argument("--out", type=Path, help="folder for runs and table (default: runs/table_TABLE_SCALE)")
    parser.add_argument("--data", default="", help="shards with classes (default: digits, at the scale nano)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of each row (default: 0)")
    parser.add_argument("--only", nargs="+", default=[], help="rows to run, by name (default: all)")
    parser.add_argument("--steps", type=int, help="pretraining steps (default: the scale's)")
    parser.add_argument("--tokenizer", default="", help="for BEiT-v2's rows (default: small scales train one)")
    parser.add_argument("--results", default="", help="CSV with the results of all runs (default: OUT/results.csv)")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time on this machine (default: 1)")
    parser.add_argument("--no_table", action="store_true", help="train and evaluate, but write no table")
    parser.add_argument("--ds_config", default="zero1", help="DeepSpeed JSON (default: zero1)")
    parser.add_argument("--tracker", choices=get_args(TrackerKind), default="mlflow", help="default: mlflow")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by the deepspeed launcher
    args = parser.parse_args()
    from ddae.ablation.format import to_markdown  # takes seconds
    from ddae.ablation.run import AblationSettings, ablate
    from ddae.distributed.engine import stop_process_group

    fields = {name: getattr(args, name) for name in AblationSettings._fields if hasattr(args, name)}
    fields |= {"seeds": tuple(args.seeds), "only": tuple(args.only), "write_table": not args.no_table}
    out = args.out or Path(f"runs/table_{args.table}_{args.scale}")
    results = ablate(out, AblationSettings(**fields))
    if results is not None:
        print(f"\n{to_markdown(results)}\ntable: {out / 'table.html'}")
    stop_process_group()
