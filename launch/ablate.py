"""Run a table of the paper, at its own scale or in miniature, and set it beside the paper's numbers.

python launch/ablate.py --table 3 --scale nano
deepspeed launch/ablate.py --table 3 --scale paper --data data/imagenet --ds_config ds_configs/zero2.json

The same command goes on where it was broken off. --parallel 8 packs eight runs onto a GPU; --only and --seeds share a
table out over machines, with --no_table for all but the last, who draws all of it.
"""

import argparse
from pathlib import Path

from ddae.errors import run_command

ZERO1 = Path(__file__).parent.parent / "ds_configs" / "zero1.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, help="2, 3, 4, 6 or 7 of the paper, gradient_variants or own")
    parser.add_argument("--scale", default="paper", help="nano, micro, tiny or paper")
    parser.add_argument("--out", type=Path, help="folder for runs and table; left out: runs/table_TABLE_SCALE")
    parser.add_argument("--data", default="", help="shards with classes; left out: digits, at the scale nano")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each row is run with each of them")
    parser.add_argument("--only", nargs="+", default=[], help="rows to run, by name")
    parser.add_argument("--steps", type=int, help="of pretraining; left out: as the scale has it")
    parser.add_argument("--tokenizer", default="", help="of BEiT-v2's rows; left out: small runs make one")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time on this machine")
    parser.add_argument("--no_table", action="store_true", help="draw no table: others run beside this one")
    parser.add_argument("--ds_config", default=str(ZERO1), help="DeepSpeed JSON; left out: ds_configs/zero1.json")
    parser.add_argument("--tracker", choices=("mlflow", "jsonl"), default="mlflow", help="where the numbers go, too")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's own word
    args = parser.parse_args()
    from ddae.ablation.format import markdown
    from ddae.ablation.run import Settings, ablate  # seconds to import
    from ddae.distributed.engine import stop_process_group

    given = {name: getattr(args, name) for name in Settings._fields if hasattr(args, name)}
    settings = Settings(**given | {"seeds": tuple(args.seeds), "only": tuple(args.only), "draws": not args.no_table})
    out = args.out or Path(f"runs/table_{args.table}_{args.scale}")
    results = ablate(out, settings)
    if results is not None:
        print(f"\n{markdown(results)}\ntable: {out / 'table.html'}")
    stop_process_group()


if __name__ == "__main__":
    run_command("ablate", main)
