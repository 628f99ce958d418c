"""What a sample is called in a shard: its file's name, in the letters that a shard's index can hold, each key once."""

import hashlib
import re

import numpy as np

from ddae.data.shard_writer import KEY_LENGTH


def unique_keys(names: list[str], groups: list[str | int | None], by_folder: bool) -> tuple[list[str], np.ndarray]:
    """Names and classes of images -> a key for each, and which of them repeat an earlier name: bool [N].

    by_folder: a name stands for an image of its class's folder alone, and the key has the class before it. Else a name
    that begins with a class, as ImageNet's do, repeats any like it, and another one those of its class. Names that only
    look alike once they are written as keys get a number too, but are no repetition.
    """
    classes = {group for group in groups if isinstance(group, str)}
    keys, repeated, seen, used = [], [], set(), {}
    for name, group in zip(names, groups, strict=True):
        head, underscore, _ = name.partition("_")
        begins_with_class = bool(underscore) and head in classes
        identity = (None if begins_with_class and not by_folder else group, name)
        repeated.append(identity in seen)
        seen.add(identity)
        key = plain = _plain(f"{group}_{name}" if by_folder and group is not None and head != group else name)
        while key in used:
            used[plain] += 1
            key = f"{plain}--{used[plain]}"
        used[key] = 1
        keys.append(key)
    return keys, np.array(repeated, bool)


def _plain(name: str) -> str:
    """The name in ASCII letters, digits, _ and -, with room left for a number."""
    plain = re.sub(r"[^0-9A-Za-z_-]", lambda found: "_" if found[0].isascii() else f"x{ord(found[0]):x}", name)
    if len(plain) <= KEY_LENGTH - 10:
        return plain
    return plain[: KEY_LENGTH - 21] + "-" + hashlib.sha1(name.encode(errors="replace")).hexdigest()[:10]
