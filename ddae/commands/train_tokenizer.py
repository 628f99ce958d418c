"""Train a tokenizer for the presets beitv2 and dds_beitv2: a codebook that reconstructs the features of a teacher.

deepspeed launch/train_tokenizer.py --ds_config ds_configs/zero1.json --preset demo --vq.teacher runs/demo
deepspeed launch/train_tokenizer.py --ds_config ds_configs/zero1.json --data.train data/imagenet \
    --vq.teacher timm:vit_base_patch16_clip_224.openai
"""

from ddae.config.cli import launch
from ddae.config.tokenizer import TOKENIZING


def main() -> None:
    launch(TOKENIZING, "ddae.train_tokenizer:train_tokenizer")
