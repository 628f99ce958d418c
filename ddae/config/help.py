"""The text of --help: the flags that users set most, by section, with the chosen preset's values.

--help-all, which tyro prints, has every flag.
"""

import dataclasses
import inspect
import re
import sys
from typing import Any, get_args, get_origin

from rich.console import Console
from rich.table import Table

from ddae.config.base import ExperimentType, flatten
from ddae.config.own import Images, own

COMMON = (  # in this order, as far as an experiment has them
    *("data.train", "data.val_share", "data.labels", "encoder", "val", "init", "run_dir", "preset", "ds_config"),
    *("model.width", "model.depth", "model.image_size", "model.patch_size", "mask.ratio", "image_size"),
    *("optim.lr", "optim.base_lr", "optim.warmup_epochs", "tune.layer_decay", "tune.untrained", "probe.layers"),
    *("seg.classes", "vq.teacher", "vq.codes"),
    *("train.epochs", "train.steps", "train.save_every", "train.seed", "probe_every"),
    *("data.batch_size", "data.workers", "data.backend", "engine.precision", "engine.device", "tracker.kind"),
)
TITLES = {"": "run", "data": "data", "model": "model", "mask": "masks", "optim": "optimizer", "train": "training"}


def short_help(experiment: ExperimentType, start: Any, program: str) -> str:
    """Return the help of the common flags. start: the preset's config; program: as the user typed it."""
    console = Console(width=min(110, Console(file=sys.stdout).width), no_color=not sys.stdout.isatty())
    values, helps, choices = flatten(start.to_dict()), field_helps(experiment.config), field_choices(experiment.config)
    chosen_by_data = set_by_data() if start.preset == "own" else set()
    rows: dict[str, list[tuple[str, str, str]]] = {}
    for name in COMMON:
        if name in values and name not in experiment.config.UNUSED:
            value = "by the data" if name in chosen_by_data else _text(values[name])
            help_text = helps[name] + (f" ({', '.join(choices[name])})" if name in choices else "")
            rows.setdefault(name.rpartition(".")[0], []).append((f"--{name}", value, help_text))
    with console.capture() as capture:
        positional = "PHOTOS --out DIR" if program == "ddae pretrain" else "[--FLAG VALUE ...]"
        console.print(f"usage: {program} {positional}\n", markup=False, highlight=False)
        console.print(f"The common flags, with the values of preset {start.preset}:", markup=False, highlight=False)
        for section in sorted(rows, key=lambda each: each != "data"):
            table = Table.grid(padding=(0, 2, 0, 0))
            table.add_column(style="bold", no_wrap=True, min_width=22)
            table.add_column(no_wrap=True, min_width=12)
            table.add_column(style="dim" if sys.stdout.isatty() else "")
            for row in rows[section]:
                table.add_row(*map(_escaped, row))
            console.print(f"\n{TITLES.get(section, section)}", style="bold", highlight=False)
            console.print(table)
        last = "--show: print the resulting settings. --help-all: every flag. --preset NAME --help: another preset."
        console.print(f"\n{last}", markup=False, highlight=False)
    return "".join(line.rstrip() + "\n" for line in capture.get().splitlines())


def field_helps(config: type, prefix: str = "") -> dict[str, str]:
    """Return the comment of each field of a config class, by flag name; a comment stands above the field or beside it.

    Raise OSError where the source is missing.
    """
    helps: dict[str, str] = {}
    names = {field.name for field in dataclasses.fields(config)}
    for base in reversed(config.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        above: list[str] = []
        for line in inspect.getsource(base).splitlines():
            if match := re.match(r"    # ?(.*)", line):
                above.append(match[1])
                continue
            if match := re.match(r"    (\w+): [^#]*(?:# ?(.*))?$", line):
                comment = match[2] or " ".join(above)
                if comment and match[1] in names:
                    helps[prefix + match[1]] = comment.strip()
            above = []
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(field.type):
            helps |= field_helps(field.type, f"{prefix}{field.name}.")  # type: ignore[arg-type]
    return helps


def field_choices(config: type, prefix: str = "") -> dict[str, list[str]]:
    """Return the strings that a field accepts, for those with a fixed choice, by flag name."""
    choices: dict[str, list[str]] = {}
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(field.type):
            choices |= field_choices(field.type, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        elif str(get_origin(field.type)) == "typing.Literal":
            choices[prefix + field.name] = [value for value in get_args(field.type) if value]
    return choices


def set_by_data() -> set[str]:
    """Return the fields that preset own derives from the images or the hardware."""
    cases = [(100, 0, False), (10**4, 0, False), (10**6, 32, False), (10**4, 0, True), (10**7, 0, True)]
    flat = [flatten(own(Images(count, side), has_gpu).to_dict()) for count, side, has_gpu in cases]
    return {name for name in flat[0] if any(other[name] != flat[0][name] for other in flat)}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None or value == "" else str(value)


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
