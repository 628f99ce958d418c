"""Fine-tune an encoder to tell every pixel's class, with UperNet, on shards with masks.

deepspeed launch/segment.py --ds_config ds_configs/zero1.json --encoder runs/demo --preset demo --data.train data/scenes
deepspeed launch/segment.py --ds_config ds_configs/zero1.json --encoder runs/vit_b --data.train data/ade20k
"""

from ddae.config.cli import run
from ddae.config.segmentation import SEGMENTATION, SegmentConfig
from ddae.distributed.preemption import Stop


def main(config: SegmentConfig) -> None:
    stop = Stop()  # listens from here on

    # DeepSpeed takes seconds to import; mistakes in the flags are told before.
    from ddae.distributed.engine import stop_process_group
    from ddae.eval.segmentation import segment

    segment(config, stop)
    stop_process_group()


if __name__ == "__main__":
    run(main, SEGMENTATION)
