"""The command `ddae`: one name for all commands. The scripts in launch/ and data_prep/ run the same code."""

import importlib
import os
import sys
from typing import NamedTuple

from ddae.commands.gpus import num_gpus
from ddae.errors import UserError, run_command


class Command(NamedTuple):
    """A command: its module in commands/, and what it does in a few words."""

    module: str
    help: str
    is_distributed: bool = False  # uses all GPUs of the machine
    may_have_ranks: bool = False  # may be started by a launcher, as distributed ones may
    function: str = "main"


COMMANDS = {
    "pretrain": Command(
        "pretrain", "train an encoder on a folder of photos, or on shards", True, function="own_photos"
    ),
    "embed": Command("embed", "write an embedding of each photo, a map of all, and near-duplicates"),
    "report": Command("report", "compare an encoder with untrained weights and raw pixels, without labels"),
    "export": Command("export", "convert an encoder to the format of another library"),
    "shard": Command("shard", "convert a folder or an archive of images to shards"),
    "check": Command("check_shards", "verify shards"),
    "knn": Command("knn", "evaluate an encoder by nearest neighbours, without training"),
    "probe": Command("linear_probe", "evaluate an encoder by linear classifiers", is_distributed=True),
    "finetune": Command("finetune", "fine-tune an encoder on labelled shards", is_distributed=True),
    "segment": Command("segment", "fine-tune an encoder for semantic segmentation", is_distributed=True),
    "predict": Command("predict", "classify or segment images with a fine-tuned model"),
    "figures": Command("figures", "draw the paper's figures of encoders"),
    "plan": Command("plan", "estimate memory, FLOPs, traffic and days of a run"),
    "doctor": Command("doctor", "check that training can run here", may_have_ranks=True),
    "tokenizer": Command("train_tokenizer", "train the codebook of the presets beitv2", is_distributed=True),
    "ablate": Command("ablate", "run a table of the paper", may_have_ranks=True),
    "benchmark": Command("benchmark", "measure the speed of a step, a loader or an evaluation", may_have_ranks=True),
    "replay": Command("replay", "replay a step with non-finite gradients"),
    "ade20k": Command("prepare_ade20k", "convert ADE20K to shards with masks"),
}


def main() -> None:
    """Run the command that the first argument names; exit with its code."""
    name, args = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("--help", "-h"):
        run_command("ddae", lambda: print(_overview()))
    if name == "--version":
        from ddae import __version__

        run_command("ddae", lambda: print(__version__))
    may_have_ranks = name in COMMANDS and (COMMANDS[name].is_distributed or COMMANDS[name].may_have_ranks)
    run_command("ddae", lambda: _run(name, args), may_have_ranks)


def _run(name: str, args: list[str]) -> int | None:
    if name not in COMMANDS:
        import difflib

        nearest = difflib.get_close_matches(name, COMMANDS, 1, 0)[0]
        raise UserError(f"there is no command {name!r}; the nearest is {nearest}. ddae --help lists all.")
    command = COMMANDS[name]
    if command.is_distributed and "RANK" not in os.environ and not {"--help", "-h", "--show"} & set(args):
        gpus = num_gpus()
        if gpus > 1:
            _start_ranks(gpus, [name, *args])
    sys.argv = [f"ddae {name}", *args]
    return getattr(importlib.import_module(f"ddae.commands.{command.module}"), command.function)()


def _start_ranks(gpus: int, args: list[str]) -> None:
    """Replace this process by DeepSpeed's launcher, which starts a rank for each GPU. The ranks are this command."""
    print(f"ddae: {gpus} GPUs: starting as many ranks by DeepSpeed's launcher", flush=True)
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(gpus), "--module", "ddae"]
    os.execv(sys.executable, [sys.executable, *launcher, *args])


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = (f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items())
    first = "ddae pretrain PHOTOS --out runs/mine"
    return "\n".join(["usage: ddae COMMAND ...", f"first run: {first}", "", *rows, "", "ddae COMMAND --help"])


if __name__ == "__main__":
    main()
