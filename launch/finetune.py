"""Fine-tune an encoder on labelled shards.

deepspeed launch/finetune.py --ds_config ds_configs/zero1.json --encoder runs/demo --preset demo --data.train data/demo
deepspeed --hostfile hosts launch/finetune.py --ds_config ds_configs/zero1.json --encoder runs/vit_b --data.train /data
"""

import require_packages  # noqa: F401

from ddae.config.cli import launch
from ddae.config.evaluation import FINETUNING

if __name__ == "__main__":
    launch(FINETUNING, "ddae.eval.finetune:finetune")
