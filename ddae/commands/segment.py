"""Fine-tune an encoder with UperNet for semantic segmentation, on shards with masks.

deepspeed launch/segment.py --ds_config ds_configs/zero1.json --encoder runs/demo --preset demo --data.train data/scenes
deepspeed launch/segment.py --ds_config ds_configs/zero1.json --encoder runs/vit_b --data.train data/ade20k
"""

from ddae.config.cli import launch
from ddae.config.segmentation import SEGMENTATION


def main() -> None:
    launch(SEGMENTATION, "ddae.eval.segmentation:segment")
