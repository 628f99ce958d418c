"""Fine-tune an encoder on labelled shards.

deepspeed launch/finetune.py --ds_config ds_configs/zero1.json --encoder runs/demo --preset demo --data.train data/demo
deepspeed --hostfile hosts launch/finetune.py --ds_config ds_configs/zero1.json --encoder runs/vit_b --data.train /data
"""

from ddae.commands.class_folders import class_folders
from ddae.config.cli import launch
from ddae.config.evaluation import FINETUNING


def main() -> None:
    launch(FINETUNING, "ddae.eval.finetune:finetune", class_folders)
