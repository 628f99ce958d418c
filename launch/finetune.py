"""Fine-tune an encoder on labelled shards.

deepspeed launch/finetune.py --ds_config ds_configs/zero1.json --encoder runs/demo --preset demo --data.train data/demo
deepspeed --hostfile hosts launch/finetune.py --ds_config ds_configs/zero1.json --encoder runs/vit_b --data.train /data
"""

from ddae.config.cli import run
from ddae.config.evaluation import FINETUNING, FinetuneConfig
from ddae.distributed.preemption import Stop


def main(config: FinetuneConfig) -> None:
    stop = Stop()  # listens from here on

    # DeepSpeed takes seconds to import; mistakes in the flags are told before.
    from ddae.distributed.engine import stop_process_group
    from ddae.eval.finetune import finetune

    finetune(config, stop)
    stop_process_group()


if __name__ == "__main__":
    run(main, FINETUNING)
