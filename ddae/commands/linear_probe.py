"""Train linear classifiers on a frozen encoder's features: several blocks and both poolings in one run.

deepspeed launch/linear_probe.py --encoder runs/demo --preset demo --data.train data/demo
deepspeed --hostfile hosts launch/linear_probe.py --encoder runs/vit_b --data.train data/imagenet
"""

from ddae.commands.class_folders import class_folders
from ddae.config.cli import launch
from ddae.config.evaluation import PROBING


def main() -> None:
    launch(PROBING, "ddae.eval.linear_probe:linear_probe", class_folders)
