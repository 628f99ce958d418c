"""Pretrain a Vision Transformer without labels.

deepspeed launch/pretrain.py --ds_config ds_configs/zero2.json --preset demo
deepspeed --hostfile hosts launch/pretrain.py --ds_config ds_configs/zero2.json --data.train /data/imagenet
"""

import require_packages  # noqa: F401

from ddae.config.cli import PRETRAINING, launch

if __name__ == "__main__":
    launch(PRETRAINING, "ddae.train:pretrain")
