"""Pretrain a Vision Transformer without labels.

ddae pretrain PHOTOS --out runs/mine                     a folder of images; all GPUs of this machine, or its CPU
ddae pretrain PHOTOS --out runs/mine --init timm:vit_base_patch16_224.mae       further, from published weights
deepspeed launch/pretrain.py --ds_config ds_configs/zero2.json --preset demo
deepspeed --hostfile hosts launch/pretrain.py --ds_config ds_configs/zero2.json --data.train /data/imagenet
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddae.commands.gpus import num_gpus
from ddae.config.cli import PRETRAINING, launch
from ddae.config.own import Images, describe, own
from ddae.config.pretrain import PretrainConfig
from ddae.data.cache import open_cache
from ddae.data.shards import open_shards
from ddae.errors import UserError, say
from ddae.sharding.photos import is_photo_folder, scan_photos, typical_side, with_shards

if TYPE_CHECKING:
    from ddae.models.vit import Encoder


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
    lines, started = [], started_with(config) if config.preset == "own" or config.init else None
    if config.preset == "own":
        images, has_gpu = count_images(config, is_folder), uses_gpu(config)
        start = started if started is not None and started.preset == "own" else own(images, has_gpu)
        config = parse_from(start)
        if config.init and started is None:
            config = parse_from(shaped_as(start, config.init))
        lines.append(describe(config, images, has_gpu))
    if config.init:
        if started is not None and started.init == config.init:  # what it started from may be gone
            taken = {"positions": started.model.positions, "layer_scale": started.model.layer_scale}
            data = replace(config.data, normalisation=started.data.normalisation)
            config = replace(config, model=replace(config.model, **taken), data=data)
        else:
            from ddae.training import initial  # takes seconds, as torch does

            encoder = load(config.init)
            config = initial.with_initial(config, encoder)
            lines.append(initial.describe(config.init, encoder, config))
    if lines and os.environ.get("RANK", "0") == "0" and not show:
        say("\n".join(lines))
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
    try:
        return PretrainConfig.read(file) if file.is_file() else None
    except (KeyError, TypeError, AttributeError):  # a run of another kind, which the run directory's check reports
        return None


def shaped_as(start: PretrainConfig, init: str) -> PretrainConfig:
    """Return preset own's settings for a model of the shape of the encoder that it starts from."""
    shape = load(init).shape
    taps = tuple(shape.depth * i // 4 for i in (1, 2, 3, 4))
    if taps[0] < 1:
        raise UserError(f"--init {init} has {shape.depth} blocks; expected at least 4, for as many taps.")
    fields = ("width", "depth", "heads", "patch_size", "image_size")
    return replace(
        start,
        model=replace(start.model, **{name: getattr(shape, name) for name in fields}),
        pixel=replace(start.pixel, taps=taps),
        feature=replace(start.feature, taps=taps),
    )


@cache
def load(init: str) -> "Encoder":
    """Load the encoder of --init, once."""
    from ddae.training.initial import load_initial  # takes seconds, as torch does

    return load_initial(init)


def uses_gpu(config: PretrainConfig) -> bool:
    """Return whether training will use a GPU."""
    return config.engine.device != "cpu" and num_gpus() > 0
