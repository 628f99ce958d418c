"""Estimate the cost of a run before it starts: memory and time of a step by part at each ZeRO stage, FLOPs, days.

python launch/plan.py --preset ddae_vit_l16_800e --gpus 64 --gpu a100-80g
python launch/plan.py --preset ddae_vit_l16_800e --gpus 8 64 512 --gpu H100 --network infiniband-400

Any flag of launch/pretrain.py may follow: --data.batch_size 2048, --engine.activation_checkpointing, --ds_config FILE.
"""

import argparse
from dataclasses import fields

from ddae.config.cli import parse
from ddae.config.deepspeed import load


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8], help="total number of GPUs; several compare them")
    parser.add_argument("--gpu", default="a100-80g", help="GPU model (default: a100-80g); an unknown one lists all")
    parser.add_argument("--micro_batch", type=int, help="images a GPU and micro-batch (default: the JSON's, else all)")
    parser.add_argument("--images", type=int, default=1_281_167, help="images of the data set (default: ImageNet-1k)")
    parser.add_argument("--network", default="infiniband-200", help="between nodes; an unknown one lists all")
    from ddae.tools.plan import format_plan  # takes seconds
    from ddae.tools.step_time import Assumptions

    for each in fields(Assumptions):
        parser.add_argument(f"--{each.name}", type=float, default=each.default, help=f"assumed {each.metadata['help']}")
    args, pretrain_args = parser.parse_known_args()
    config = parse(pretrain_args)
    settings = load(config.ds_config)
    assumed = Assumptions(**{each.name: getattr(args, each.name) for each in fields(Assumptions)})
    print(format_plan(config, settings, args.gpus, args.gpu, args.network, args.micro_batch, args.images, assumed))
