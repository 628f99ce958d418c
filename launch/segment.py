"""Fine-tune an encoder with UperNet for semantic segmentation, on shards with masks.

deepspeed launch/segment.py --ds_config ds_configs/zero1.json --encoder runs/demo --preset demo --data.train data/scenes
deepspeed launch/segment.py --ds_config ds_configs/zero1.json --encoder runs/vit_b --data.train data/ade20k
"""

import require_packages  # noqa: F401

from ddae.config.cli import launch
from ddae.config.segmentation import SEGMENTATION

if __name__ == "__main__":
    launch(SEGMENTATION, "ddae.eval.segmentation:segment")
