"""Train a tokenizer for the presets beitv2 and dds_beitv2: a codebook from which a teacher's features can be told.

deepspeed launch/train_tokenizer.py --ds_config ds_configs/zero1.json --preset demo --vq.teacher runs/demo
deepspeed launch/train_tokenizer.py --ds_config ds_configs/zero1.json --data.train data/imagenet \
    --vq.teacher timm:vit_base_patch16_clip_224.openai
"""

from ddae.config.cli import run
from ddae.config.tokenizer import TOKENIZING, TokenizerConfig
from ddae.distributed.preemption import Stop


def main(config: TokenizerConfig) -> None:
    stop = Stop()  # listens from here on

    # These take seconds to import; mistakes in the flags are told before.
    from ddae.distributed.engine import stop_process_group
    from ddae.train_tokenizer import train_tokenizer

    train_tokenizer(config, stop)
    stop_process_group()


if __name__ == "__main__":
    run(main, TOKENIZING)
