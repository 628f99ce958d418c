"""The command line of training programs: flags -> config -> program. The only import of tyro.

--preset NAME picks the starting point, every other flag sets one field, --show prints the resulting config. A user's
mistake is reported in one sentence, on one rank, with exit code 2. Nothing here imports torch, so that mistakes in the
flags are reported at once.
"""

import atexit
import contextlib
import dataclasses
import difflib
import importlib
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

from ddae.config.base import ExperimentType
from ddae.config.help import short_help
from ddae.config.presets import preset
from ddae.config.pretrain import PretrainConfig, check
from ddae.errors import RankError, UserError, expand_home, flush_output, report

ALIASES = {
    "--deepspeed_config": "--ds_config",
    "--out": "--run_dir",
    "--labels": "--data.labels",
    "--val_share": "--data.val_share",
}
# Completes a config that depends on the data. Arguments: the config as parsed; a function that parses the same
# arguments again, from another starting point than the preset; whether the config is to be printed only.
Prepare = Callable[[Any, Callable[[Any], Any], bool], Any]
COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
LAUNCHER_FLAGS = ("--local_rank", "--local-rank")  # added by launchers, not read
PRETRAINING = ExperimentType(PretrainConfig, preset, check)


def launch(experiment: ExperimentType, program: str, prepare: Prepare | None = None) -> None:
    """Parse this process's arguments and run `program`, "MODULE:FUNCTION", which takes the config and a StopSignal.

    prepare: see Prepare.
    """
    # Huge pages for large CPU tensors: otherwise torch maps them anew, page by page, at every allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        take_slurm_ranks()
        args = normalise(sys.argv[1:])
        if {"--help", "-h", "--help_all"} & set(args):
            print_help(args, experiment)
        given, show = [arg for arg in args if arg != "--show"], "--show" in args
        config = parse(given, experiment)
        if prepare is not None:
            config = prepare(config, lambda start: parse(given, experiment, start), show)
        if show:
            if _rank() == 0:
                print(json.dumps({"folder": config.folder, "peak_lr": config.peak_lr, **config.to_dict()}, indent=2))
            return
        _run(program, config)
        flush_output()
    except KeyboardInterrupt:  # before StopSignal listens
        if _rank() == 0:
            report("ddae: interrupted before training began", 130)
        os._exit(130)
    except BrokenPipeError:  # --help | head
        flush_output()
    except UserError as error:
        code = error.code if isinstance(error, RankError) else 2
        is_first_of_node = os.environ.get("LOCAL_RANK") == "0"  # which may lack what the first node has
        if _rank() == 0 and not isinstance(error, RankError):
            report(f"ddae: {error}", code)
        elif isinstance(error, RankError) or is_first_of_node:
            report(f"ddae: rank {_rank()} on {platform.node()}: {error}", code)
        else:
            time.sleep(3)  # a launcher ends all ranks when the first has exited: let the one that reports go first
        atexit._run_exitfuncs()  # but not the interpreter's own shutdown, which would wait for other ranks
        flush_output()
        os._exit(code)


def _run(program: str, config: Any) -> None:
    if config.engine.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for GPUs
    from ddae.distributed.logs import configure_logging  # imports torch
    from ddae.distributed.preemption import StopSignal

    configure_logging()
    stop = StopSignal()  # listens from here on, while the rest is imported
    module, _, function = program.partition(":")
    run = getattr(importlib.import_module(module), function)
    from ddae.distributed.engine import stop_process_group
    from ddae.distributed.failures import explained

    try:
        with explained():
            run(config, stop)
            stop_process_group()
    finally:
        stop.close()


def _rank() -> int:
    rank = os.environ.get("RANK") or "0"
    return int(rank) if rank.isdecimal() else 0  # take_slurm_ranks() refuses others


def take_slurm_ranks() -> None:
    """Set RANK, WORLD_SIZE and LOCAL_RANK where srun itself started the ranks: one task, one rank.

    Raise UserError if a launcher's variables are incomplete, or if one that should be a number is not.
    """
    for name in (*COUNTS, "RANK", "LOCAL_RANK", "MASTER_PORT", "SLURM_PROCID", "SLURM_LOCALID"):
        value = os.environ.get(name)
        if value == "":
            del os.environ[name]
        elif value is not None and not (value.isdecimal() and (int(value) or name not in COUNTS)):
            expected = "a number of at least 1" if name in COUNTS else "a number"
            raise UserError(
                f"{name} is {value!r}; expected {expected}. Start the ranks with deepspeed, torchrun or srun."
            )
    tasks, size = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")), int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" in os.environ:
        missing = {"MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"} - os.environ.keys()
        if missing and size != 1:
            names, verb = " and ".join(sorted(missing)), "are" if len(missing) > 1 else "is"
            fix = "Start the ranks with deepspeed, torchrun or srun, or unset RANK for a single process."
            raise UserError(f"RANK is set but {names} {verb} not. {fix}")
        return
    if tasks == 1:
        if size > 1:
            fix = "Start the ranks with deepspeed, torchrun or srun, or unset WORLD_SIZE for a single process."
            raise UserError(f"WORLD_SIZE is {size} but RANK is not set. {fix}")
        return
    if missing := {"SLURM_PROCID", "SLURM_LOCALID"} - os.environ.keys():
        problem = f"SLURM_STEP_NUM_TASKS is {tasks} but {min(missing)} is not set"
        raise UserError(f"{problem}. Start the ranks with deepspeed, torchrun or srun, or unset the variable.")
    os.environ |= {"RANK": os.environ["SLURM_PROCID"], "WORLD_SIZE": str(tasks)}
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    if missing := {"MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
        raise UserError(
            f"srun started {tasks} ranks without {' and '.join(sorted(missing))}, by which they connect. "
            "Export them as launch/slurm_pretrain.sh does."
        )


def print_help(args: list[str], experiment: ExperimentType) -> None:
    """Print the common flags with the values of the preset in `args`, or all flags, on rank 0, and exit."""
    start = experiment.preset(take_preset(args, experiment.config.preset)[0])
    with contextlib.redirect_stdout(sys.stdout if _rank() == 0 else io.StringIO()):
        if "--help_all" in args:
            tyro.cli(experiment.config, default=start, args=["--help"], use_underscores=True)
        print(short_help(experiment, start, program_name()), end="")
    sys.exit()


def program_name() -> str:
    """Return how the user started this program, without its folder: ddae pretrain, launch/pretrain.py."""
    return sys.argv[0] if sys.argv[0].startswith("ddae ") else os.path.relpath(sys.argv[0])


def parse(args: list[str], experiment: ExperimentType = PRETRAINING, start: Any = None) -> Any:
    """Return the config of these arguments, without --show. Raise UserError for anything wrong with them.

    start: the starting point, instead of the preset.
    """
    args = normalise(args)
    name, args = take_preset(args, experiment.config.preset)
    start = experiment.preset(name) if start is None else start
    known = flags(experiment.config)
    for arg in args:
        flag = arg.split("=")[0]
        if flag.startswith("--") and flag not in known:
            raise UserError(f"unknown flag {flag}; the nearest is {_nearest(flag, known)}. --help-all lists all flags.")
        if flag.removeprefix("--").replace(".no_", ".") in experiment.config.UNUSED:
            raise UserError(f"{flag} has no effect here. Leave it out.")
    given = {arg.split("=")[0] for arg in args}
    if "--train.epochs" in given and "--train.steps" not in given:  # which a preset may have
        start = dataclasses.replace(start, train=dataclasses.replace(start.train, steps=None))
    report = io.StringIO()
    try:
        with contextlib.redirect_stdout(report), contextlib.redirect_stderr(report):
            config = tyro.cli(experiment.config, default=start, args=args, use_underscores=True)
    except SystemExit:
        raise UserError(_first_sentence(report.getvalue())) from None
    experiment.check(config)
    return config


def _nearest(flag: str, known: list[str]) -> str:
    """Return the known flag most like this one; one of the same name in another section comes first."""
    name = flag.removeprefix("--").rpartition(".")[2]
    same_name = [each for each in known if each.removeprefix("--").rpartition(".")[2] == name]
    return difflib.get_close_matches(flag, same_name or known, 1, 0)[0]


def normalise(args: list[str]) -> list[str]:
    """Remove launchers' flags, replace hyphens in flags by underscores, resolve aliases, expand ~ in quoted paths."""
    normalised = []
    for arg in args:
        if arg.startswith(LAUNCHER_FLAGS):
            continue
        if arg.startswith("--"):
            flag, equals, value = arg.partition("=")
            flag = "--" + flag[2:].replace("-", "_")
            arg = ALIASES.get(flag, flag) + equals + expand_home(value)
        normalised.append(expand_home(arg))
    return normalised


def take_preset(args: list[str], default: str) -> tuple[str, list[str]]:
    """Return the preset's name, and the arguments without it."""
    if sum(arg == "--preset" or arg.startswith("--preset=") for arg in args) > 1:
        raise UserError("--preset is given more than once. Name one starting point.")
    for i, arg in enumerate(args):
        if arg == "--preset" and i + 1 < len(args):
            return args[i + 1], args[:i] + args[i + 2 :]
        if arg.startswith("--preset="):
            return arg.split("=", 1)[1], args[:i] + args[i + 1 :]
        if arg == "--preset":
            raise UserError(f"--preset lacks a name, such as demo or {default}. README.md lists all presets.")
    return default, args


def flags(config: type, prefix: str = "--") -> list[str]:
    """Return every flag of a config class: --optim.lr, --train.report and --train.no_report, ..."""
    found = []
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(field.type):
            found += flags(field.type, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            found.append(prefix + field.name)
            if field.type is bool:
                found.append(f"{prefix}no_{field.name}")
    return found


def _first_sentence(report: str) -> str:
    """Return tyro's boxed report as one line, without the help text that it quotes."""
    text = re.split(r"Argument helptext|For full helptext", report)[0]
    text = re.sub(r"[─│╭╮╰╯┌┐└┘]+|-{5,}", " ", text)
    return re.sub(r"\s+", " ", text).strip() or "the flags cannot be read. --help-all lists them."
