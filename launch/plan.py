"""Say what a run will cost before anybody pays for it: memory by part at each ZeRO stage, work, traffic, days.

python launch/plan.py --preset ddae_vit_l16_800e --gpus 64 --gpu a100-80g

Any flag of launch/pretrain.py may follow: --data.batch_size 2048, --engine.activation_checkpointing, --ds_config FILE.
"""

import argparse

from ddae.config.cli import parse
from ddae.config.deepspeed import load
from ddae.errors import run_command
from ddae.tools.plan import GPUS, IMAGENET, show


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--gpus", type=int, default=8, help="GPUs in all")
    parser.add_argument("--gpu", default="a100-80g", help=f"kind of GPU: {', '.join(GPUS)}")
    parser.add_argument(
        "--micro_batch", type=int, help="images of a GPU at a time; left out: the JSON's, or batch / GPUs"
    )
    parser.add_argument("--images", type=int, default=IMAGENET, help="images of the data set")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the vendor's TFLOP/s that is reached")
    args, flags = parser.parse_known_args()
    config = parse(flags)
    settings = load(config.ds_config or "ds_configs/zero2.json")
    print(show(config, settings, args.gpus, args.gpu, args.micro_batch, args.images, args.mfu))


if __name__ == "__main__":
    run_command("plan", main)
