"""A folder of class folders as the data of a supervised task."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ddae.sharding.photos import is_photo_folder, with_shards

DEFAULT_SIZE = 224  # pixels; of an encoder whose image size is not given


def class_folders(config: Any, parse_from: Callable[[Any], Any], show: bool) -> Any:
    """Return the config with data.train replaced by shards if it is a folder of images: its subfolders are classes."""
    if show or not is_photo_folder(config.data.train):
        return config
    labelled = replace(config, data=replace(config.data, labels="folders"))
    return with_shards(labelled, config.image_size or DEFAULT_SIZE)
