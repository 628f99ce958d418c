"""Pretrain a Vision Transformer without labels.

ddae pretrain PHOTOS --out runs/mine                     a folder of images; all GPUs of this machine, or its CPU
deepspeed launch/pretrain.py --ds_config ds_configs/zero2.json --preset demo
deepspeed --hostfile hosts launch/pretrain.py --ds_config ds_configs/zero2.json --data.train /data/imagenet
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ddae.config.cli import PRETRAINING, launch
from ddae.config.own import Images, describe, own
from ddae.config.pretrain import PretrainConfig
from ddae.data.cache import open_cache
from ddae.data.shards import open_shards
from ddae.errors import UserError
from ddae.sharding.photos import is_photo_folder, scan_photos, typical_side, with_shards


def main() -> None:
    launch(PRETRAINING, "ddae.train:pretrain", prepare)


def own_photos() -> None:
    """`ddae pretrain PHOTOS`: the folder may come first, without a flag, and the preset is own by default."""
    args = sys.argv[1:]
    if args and not args[0].startswith("-"):
        args = ["--data.train", *args]
    if not any(arg.split("=")[0] == "--preset" for arg in args):
        args = ["--preset", "own", *args]
    sys.argv[1:] = args
    main()


def prepare(config: PretrainConfig, parse_from: Callable[[PretrainConfig], PretrainConfig], show: bool):
    """Choose the settings of preset own, and make shards of a folder of images unless the config is only shown."""
    if config.preset == "own" and not config.data.train:
        raise UserError("no images are given. Pass a folder: ddae pretrain PHOTOS --out runs/mine.")
    is_folder = is_photo_folder(config.data.train)
    if config.preset == "own":
        images, has_gpu = count_images(config, is_folder), uses_gpu(config)
        config = parse_from(started_with(config) or own(images, has_gpu))
        if os.environ.get("RANK", "0") == "0" and not show:
            print(describe(config, images, has_gpu), flush=True)
    return with_shards(config, config.model.image_size) if is_folder and not show else config


def count_images(config: PretrainConfig, is_folder: bool) -> Images:
    """Return the number and size of the training images, before shards are made of them."""
    if is_folder:
        index = scan_photos(config.data).train
        return Images(len(index), typical_side(index))
    shards = open_shards(config.data.sources, open_cache(config.data))
    return Images(len(shards), int(np.median(np.minimum(shards.width, shards.height))))


def started_with(config: PretrainConfig) -> PretrainConfig | None:
    """Return the settings with which the run was started, so that it resumes on other hardware; None: it was not."""
    file = Path(config.folder) / "config.json"
    if not file.is_file():
        return None
    started = PretrainConfig.read(file)
    return started if started.preset == "own" else None


def uses_gpu(config: PretrainConfig) -> bool:
    """Return whether training will use a GPU."""
    if config.engine.device == "cpu" or not any(name.startswith("nvidia") for name in os.listdir("/dev")):
        return False
    import torch  # takes seconds

    return torch.cuda.is_available()
