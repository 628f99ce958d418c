"""Pretrain a Vision Transformer without labels.

deepspeed launch/pretrain.py --ds_config ds_configs/zero2.json --preset demo
deepspeed --hostfile hosts launch/pretrain.py --ds_config ds_configs/zero2.json --data.train /data/imagenet
"""

from ddae.config.cli import run
from ddae.config.pretrain import Config
from ddae.distributed.preemption import Stop


def main(config: Config) -> None:
    stop = Stop()  # listens from here on

    # DeepSpeed takes seconds to import; mistakes in the flags are told before.
    from ddae.distributed.engine import stop_process_group
    from ddae.train import pretrain

    pretrain(config, stop)
    stop_process_group()


if __name__ == "__main__":
    run(main)
