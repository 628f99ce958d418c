"""A table of the paper, run: each row is pretrained and judged with every seed, and set beside the paper's number.

Rows are runs like any other: a table that was broken off goes on, and one that is complete is shown again. They run one
after the other, or several at a time on one machine.
"""

import html
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ddae.ablations import Row, rows
from ddae.data.digits import write_digits
from ddae.data.shards import MANIFEST
from ddae.distributed import from_main, is_main, say
from ddae.engine import start_process_group
from ddae.errors import UserError
from ddae.eval.finetune import finetune
from ddae.eval.linear_probe import linear_probe
from ddae.eval.packed import Job, run_packed
from ddae.eval.recipes import FinetuneConfig, ProbeConfig, probe_recipe, recipe
from ddae.experiment import TrackerConfig
from ddae.stopping import Stop
from ddae.train import pretrain

JUDGED = {"nano": "probe", "micro": "probe", "tiny": "probe", "paper": "finetune"}  # by what
NOISE = 2.0  # standard errors of a difference, within which two rows are not told apart


class Settings(NamedTuple):
    """What is not of the rows."""

    table: str
    scale: str
    seeds: tuple[int, ...]
    only: tuple[str, ...]  # rows; empty: all
    data: str  # shards with classes; empty: digits, at the scale nano
    ds_config: str
    tracker: str
    steps: int | None  # of pretraining; None: as the scale has it


def ablate(out: Path, settings: Settings, parallel: int = 1) -> None:
    """Run what is left to run into `out`, `parallel` runs at a time.

    SystemExit with code 75 where it is told to stop before, and with another where a run of several fails. UserError
    where a table, a scale or a row does not exist, or a run cannot go on.
    """
    table = rows(settings.table, settings.scale)
    names = [row.name for row in table]
    for name in settings.only:
        if name not in names:
            raise UserError(f"table {settings.table} has no row {name!r}: there are {', '.join(map(repr, names))}")
    if not settings.data and settings.scale != "nano":
        raise UserError(f"the scale {settings.scale} wants --data with shards that have classes")
    wanted = [name for name in names if not settings.only or name in settings.only]
    if parallel > 1:
        settings = settings._replace(data=settings.data or str(_digits(out)))
        out.mkdir(parents=True, exist_ok=True)
        run_packed([_job(names.index(n), n, s, out, settings) for s in settings.seeds for n in wanted], parallel)
        return
    stop = Stop()
    start_process_group()
    data = settings.data or str(from_main(lambda: _digits(out)))
    for seed in settings.seeds:
        for name in wanted:
            number = names.index(name)
            folder = _folder(out, number, seed)
            say(f"--- {name}, seed {seed}: {folder}")
            _run(table[number], seed, folder, data, settings, stop)


def draw(out: Path, settings: Settings) -> dict[str, Any]:
    """table.md, table.html and results.json in `out`, of what has been run by now; what the last one holds."""
    results = _results(rows(settings.table, settings.scale), out, settings)
    if is_main():
        (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (out / "table.md").write_text(markdown(results))
        (out / "table.html").write_text(page(results))
    return results


def _folder(out: Path, number: int, seed: int) -> Path:
    return out / f"row_{number}_seed_{seed}"


def _job(number: int, name: str, seed: int, out: Path, settings: Settings) -> Job:
    """One row with one seed as a command of its own."""
    script = Path(__file__).parents[2] / "launch" / "ablate.py"
    words = {
        "table": settings.table,
        "scale": settings.scale,
        "only": name,
        "seeds": seed,
        "out": out,
        "data": settings.data,
        "ds_config": settings.ds_config,
        "tracker": settings.tracker,
    }
    if settings.steps:
        words["steps"] = settings.steps
    command = [sys.executable, str(script), *(word for k, v in words.items() for word in (f"--{k}", str(v)))]
    return Job(f"{name}, seed {seed}", [*command, "--no_table"], Path(f"{_folder(out, number, seed)}.log"))


def _digits(out: Path) -> Path:
    folder = out / "digits"
    return folder if (folder / MANIFEST).exists() else write_digits(folder)


def _run(row: Row, seed: int, folder: Path, data: str, settings: Settings, stop: Stop) -> None:
    config = row.config
    tracker = TrackerConfig(kind=settings.tracker, experiment=f"table {settings.table}")  # type: ignore[arg-type]
    shared = {"ds_config": settings.ds_config, "tracker": tracker}
    steps = settings.steps
    length = {"steps": steps, "save_every": steps, "log_every": max(1, steps // 100)} if steps else {}
    pretrain(
        replace(
            config,
            **shared,
            preset=row.name,
            run_dir=str(folder),
            data=replace(config.data, train=data),
            train=replace(config.train, seed=seed, **length),
        ),
        stop,
    )
    if JUDGED[settings.scale] == "finetune":
        tuning = recipe("paper")
        small = {"data": replace(tuning.data, train=data), "train": replace(tuning.train, seed=seed)}
        finetune(replace(tuning, **shared, **small, encoder=str(folder)), stop)
        return
    linear_probe(probe_of(str(folder), data, seed, tracker), stop)


def probe_of(encoder: str, data: str, seed: int, tracker: TrackerConfig) -> ProbeConfig:
    """A linear probe of small encoders, on features that are kept."""
    probe = probe_recipe("demo")
    train = replace(probe.train, seed=seed, report=False, epochs=15.0)
    return replace(probe, encoder=encoder, tracker=tracker, data=replace(probe.data, train=data), train=train)


def _results(table: list[Row], out: Path, settings: Settings) -> dict[str, Any]:
    """Of all seeds that have been run, now or before."""
    task = "linear_probe" if JUDGED[settings.scale] == "probe" else FinetuneConfig.TASK
    found = []
    for number, row in enumerate(table):
        by_seed = {}
        for file in sorted(out.glob(f"row_{number}_seed_*/{task}/results.json")):
            results = json.loads(file.read_text())
            top = results["top1"] if "top1" in results else results["last"]["top1"]
            by_seed[file.parent.parent.name.rpartition("_")[2]] = top
        values = list(by_seed.values())
        mean = statistics.mean(values) if values else None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        found.append({"row": row.name, "paper": row.paper, "mean": mean, "deviation": deviation, "seeds": by_seed})
    return {
        "task": "ablation",
        "table": settings.table,
        "scale": settings.scale,
        "judged": "linear probe, best of its heads, top-1 in %" if task == "linear_probe" else "fine-tuned, top-1 in %",
        "rows": found,
        "best": best(found),
    }


def best(found: list[dict[str, Any]]) -> str:
    """The row with the highest mean, where NOISE standard errors of the difference tell it from all others; else why
    none is named."""
    measured = [row for row in found if row["mean"] is not None]
    if any(row["deviation"] is None for row in measured) or len(measured) < 2:
        return "not said: more than one seed is wanted"
    first = max(measured, key=lambda row: row["mean"])

    def error(row: dict[str, Any]) -> float:
        return row["deviation"] ** 2 / len(row["seeds"])

    for row in measured:
        if row is not first and first["mean"] - row["mean"] < NOISE * (error(first) + error(row)) ** 0.5:
            return "none: the best rows do not differ beyond noise"
    return first["row"]


def _cells(row: dict[str, Any]) -> list[str]:
    spread = "" if row["deviation"] is None else f" ± {row['deviation']:.2f}"
    measured = "" if row["mean"] is None else f"{row['mean']:.2f}{spread}"
    return [row["row"], measured, str(len(row["seeds"])), "" if row["paper"] is None else f"{row['paper']:.1f}"]


HEAD = ("row", "here", "seeds", "paper (ImageNet, fine-tuned)")


def markdown(results: dict[str, Any]) -> str:
    """The table, and what may be said of it."""
    lines = [HEAD, ("---", "--:", "--:", "--:"), *map(_cells, results["rows"])]
    title = f"Table {results['table']}, {results['scale']}: {results['judged']}, mean ± standard deviation over seeds"
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{title}\n\n{table}\n\nBest: {results['best']}.\n"


def page(results: dict[str, Any]) -> str:
    """The same as a page."""
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
        for line in (HEAD, *map(_cells, results["rows"]))
    )
    title = html.escape(f"Table {results['table']}, {results['scale']}: {results['judged']}")
    style = "body{font:15px system-ui,sans-serif;margin:2em}td{padding:3px 14px 3px 0;border-bottom:1px solid #ddd}"
    head = f'<meta charset="utf-8"><title>{title}</title><style>{style}</style>'
    return (
        f'<!doctype html><html lang="en"><head>{head}</head>'
        f"<body><h1>{title}</h1><table>{body}</table><p>Best: {html.escape(results['best'])}.</p></body></html>\n"
    )
