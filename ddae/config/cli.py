"""Words of the command line -> Config. The only import of tyro.

--preset NAME picks the starting point, every other flag overrides one field, --show prints the result. Whatever the
user gets wrong is one sentence on one rank, and exit code 2.
"""

import atexit
import contextlib
import dataclasses
import difflib
import io
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import tyro

from ddae.config.base import Kind
from ddae.config.presets import preset
from ddae.config.pretrain import Config, check
from ddae.distributed.comm import is_main, rank, take_slurm_ranks
from ddae.errors import UserError

ALIASES = {"--deepspeed_config": "--ds_config"}
LAUNCHER = ("--local_rank",)  # the launcher's own word, which is not ours to read


PRETRAINING = Kind(Config, preset, check)


def run(main: Callable[[Any], None], kind: Kind = PRETRAINING) -> None:
    """Parse this process's words, run `main`, and turn a user's mistake into a sentence."""
    # Huge pages for large tensors on the CPU, which else are mapped anew, page by page, whenever torch makes one.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        take_slurm_ranks()
        words = normalise(sys.argv[1:])
        show = "--show" in words
        if {"--help", "-h"} & set(words):
            print_help(kind)
        config = parse([word for word in words if word != "--show"], kind)
        if not show:
            main(config)
        elif is_main():
            print(json.dumps({"folder": config.folder, "peak_lr": config.peak_lr, **config.to_dict()}, indent=2))
    except UserError as error:
        if is_main():
            print(f"ddae: {error}", file=sys.stderr, flush=True)
        elif os.environ.get("LOCAL_RANK") == "0":  # of another node, which may lack what the first one has
            print(f"ddae: rank {rank()} on {platform.node()}: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # a launcher ends all ranks when the first has left: let the one that speaks speak
        # Past the interpreter's own shutdown, which would wait for other ranks.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(2)


def print_help(kind: Kind) -> None:
    """All flags with their help and defaults, on one rank."""
    with contextlib.redirect_stdout(sys.stdout if is_main() else io.StringIO()):
        start = kind.preset(kind.config.preset)
        tyro.cli(kind.config, default=start, args=["--help"], use_underscores=True)


def parse(words: list[str], kind: Kind = PRETRAINING) -> Any:
    """Words without --show -> a config that fits together; UserError for anything else."""
    words = normalise(words)
    name, words = take_preset(words, kind.config.preset)
    start = kind.preset(name)
    known = flags(kind.config)
    for word in words:
        flag = word.split("=")[0]
        if flag.startswith("--") and flag not in known:
            nearest = difflib.get_close_matches(flag, known, 1, 0)[0]
            raise UserError(f"unknown flag {flag}: the nearest is {nearest}, --help lists them all")
        if flag.removeprefix("--").replace(".no_", ".") in kind.config.UNUSED:
            raise UserError(f"{flag} changes nothing here: leave it out")
    given = {word.split("=")[0] for word in words}
    if "--train.epochs" in given and "--train.steps" not in given:  # which a preset may have
        start = dataclasses.replace(start, train=dataclasses.replace(start.train, steps=None))
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            config = tyro.cli(kind.config, default=start, args=words, use_underscores=True)
    except SystemExit:
        raise UserError(_sentence(told.getvalue())) from None
    kind.check(config)
    return config


def normalise(words: list[str]) -> list[str]:
    """Words with the launcher's taken out, hyphens in flags as underscores, and aliases by their own name."""
    kept = []
    for word in words:
        if word.startswith(LAUNCHER) or word.startswith("--local-rank"):
            continue
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            flag = "--" + flag[2:].replace("-", "_")
            word = ALIASES.get(flag, flag) + equals + value
        kept.append(word)
    return kept


def take_preset(words: list[str], default: str) -> tuple[str, list[str]]:
    """The preset's name, and the words without it."""
    if sum(word == "--preset" or word.startswith("--preset=") for word in words) > 1:
        raise UserError("--preset is given more than once: name one starting point")
    for i, word in enumerate(words):
        if word == "--preset" and i + 1 < len(words):
            return words[i + 1], words[:i] + words[i + 2 :]
        if word.startswith("--preset="):
            return word.split("=", 1)[1], words[:i] + words[i + 1 :]
        if word == "--preset":
            raise UserError(f"--preset wants a name: demo or {default}, README lists them all")
    return default, words


def flags(config: type, prefix: str = "--") -> list[str]:
    """Every flag of a config class: --optim.lr, --train.extend and --train.no_extend, ..."""
    found = []
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(field.type):
            found += flags(field.type, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            found.append(prefix + field.name)
            if field.type is bool:
                found.append(f"{prefix}no_{field.name}")
    return found


def _sentence(report: str) -> str:
    """tyro's boxed report as one line: its title, then what it says before it quotes the help."""
    text = re.split(r"Argument helptext|For full helptext", report)[0]
    text = re.sub(r"[─│╭╮╰╯┌┐└┘]+|-{5,}", " ", text)
    return re.sub(r"\s+", " ", text).strip() or "the flags cannot be read, --help lists them"
