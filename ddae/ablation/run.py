"""A table of the paper, run: each row is pretrained and judged with every seed, and set beside the paper's number.

Rows are runs like any other: a table that was broken off goes on, and one that is complete is shown again. They run one
after the other, or several at a time on one machine.
"""

import json
import logging
import os
import re
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ddae.ablation.format import best, markdown, page
from ddae.ablation.jobs import Job, refuse_launchers, run_packed
from ddae.ablation.tables import WARM, Row, rows
from ddae.config.base import ShardsConfig, TrackerConfig
from ddae.config.evaluation import FinetuneConfig, ProbeConfig, probe_recipe, recipe
from ddae.config.pretrain import PretrainConfig
from ddae.config.tokenizer import QuantizerConfig, TokenizerConfig
from ddae.data.cache import open_cache
from ddae.data.digits import write_digits
from ddae.data.shards import MANIFEST, open_shards
from ddae.distributed.comm import broadcast_from_main, is_main
from ddae.distributed.engine import start_process_group
from ddae.distributed.preemption import EXIT_CODE, StopSignal
from ddae.errors import UserError
from ddae.eval.finetune import finetune
from ddae.eval.linear_probe import linear_probe
from ddae.export.encoder import load_tokenizer
from ddae.train import pretrain
from ddae.train_tokenizer import train_tokenizer
from ddae.training.tracker import Tracker, run_id_of, start_tracker

logger = logging.getLogger(__name__)
JUDGED = {"nano": "probe", "micro": "probe", "tiny": "probe", "paper": "finetune"}  # by what
BASELINES = ("raw_pixels", "chance")  # of results.json, below a table's rows; untrained weights are each row's own
OPENED = 30.0  # seconds within which MLflow may open the table's own run


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
    tokenizer: str  # of BEiT-v2's rows; empty: one is trained, but at the paper's scale
    parallel: int  # runs at a time
    draws: bool  # whether the table is drawn; otherwise others run beside this one


def ablate(out: Path, settings: Settings) -> dict[str, Any] | None:
    """Run what is left to run into `out`, then write table.md, table.html and results.json of all that has been run by
    now; what the last one holds, on the main rank.

    SystemExit with code 75 where it is told to stop before, and with another where a run of several fails. UserError
    where a table, a scale or a row does not exist, or a run cannot go on.
    """
    table = rows(settings.table, settings.scale, settings.steps)
    _check(table, settings)
    names = [row.name for row in table]
    wanted = [name for name in names if not settings.only or name in settings.only]
    out.mkdir(parents=True, exist_ok=True)
    tracker = None
    try:
        if settings.parallel > 1:
            settings = settings._replace(data=settings.data or str(_digits(out)))
            tracker = _table_run(out, settings) if settings.draws else None
            jobs = [_job(names.index(name), name, seed, out, settings) for seed in settings.seeds for name in wanted]
            run_packed(jobs, settings.parallel)
        else:
            stop = StopSignal()
            start_process_group()
            data = settings.data or str(broadcast_from_main(lambda: _digits(out)))
            tracker = _table_run(out, settings) if settings.draws and is_main() else None
            for seed in settings.seeds:
                for name in wanted:
                    number = names.index(name)
                    logger.info("--- %s, seed %d: %s", name, seed, _folder(out, number, seed))
                    _run(table[number], number, seed, out, data, settings, stop)
    except SystemExit as end:
        if tracker is not None:
            tracker.finish([], "KILLED" if end.code == EXIT_CODE else "FAILED", timeout_s=3)
        raise
    if not settings.draws or not is_main():
        return None
    results = _results(table, out, settings)
    files = [out / name for name in ("results.json", "table.md", "table.html")]
    for file, text in zip(files, (json.dumps(results, indent=2) + "\n", markdown(results), page(results)), strict=True):
        file.write_text(text)
    assert tracker is not None
    means = {f"top1/{row['row']}": row["mean"] for row in results["rows"] if row["mean"] is not None}
    means |= {f"top1/{name}": value for name, value in results["baselines"].items()}
    tracker.log({"step": 0, **{re.sub(r"[^\w/. -]", "_", name): mean for name, mean in means.items()}})
    tracker.finish(files)
    return results


def _check(table: list[Row], settings: Settings) -> None:
    names, scale = [row.name for row in table], settings.scale
    for name, value in {"steps": settings.steps, "parallel": settings.parallel}.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}: give 1 or more")
    if settings.steps and scale == "paper":
        raise UserError("--steps is for small runs, the scale paper has the paper's epochs: leave it out")
    if settings.parallel > 1:
        refuse_launchers()
    for name in settings.only:
        if name not in names:
            raise UserError(f"table {settings.table} has no row {name!r}: there are {', '.join(map(repr, names))}")
    if not settings.data and scale != "nano":
        raise UserError(f"the scale {scale} wants --data with shards that have classes")
    told = [row.name for row in table if row.config.token.enabled and (not settings.only or row.name in settings.only)]
    if told and not settings.tokenizer and (scale == "paper" or settings.parallel > 1 or not settings.draws):
        raise UserError(f"the row {told[0]!r} wants --tokenizer here: a run of launch/train_tokenizer.py, or a file")
    if settings.data:
        open_shards(settings.data, open_cache(ShardsConfig()))
    if settings.tokenizer:
        load_tokenizer(settings.tokenizer)


def _table_run(out: Path, settings: Settings) -> Tracker:
    """The table's own run in MLflow, under which its rows are shown."""
    config = TrackerConfig(kind=settings.tracker, experiment=f"table {settings.table}")  # type: ignore[arg-type]
    tracker = start_tracker(config, out, 0, {"table": settings.table, "scale": settings.scale})
    patience = time.monotonic() + OPENED
    while settings.tracker == "mlflow" and not tracker.run_id and time.monotonic() < patience:
        time.sleep(0.1)
    return tracker


def _folder(out: Path, number: int, seed: int) -> Path:
    return out / f"row_{number}_seed_{seed}"


def _job(number: int, name: str, seed: int, out: Path, settings: Settings) -> Job:
    """One row with one seed as a command of its own."""
    script = Path(__file__).parents[2] / "launch" / "ablate.py"
    words = {"table": settings.table, "scale": settings.scale, "only": name, "seeds": seed, "out": out}
    words |= {"data": settings.data, "ds_config": settings.ds_config, "tracker": settings.tracker}
    words |= {k: v for k, v in {"steps": settings.steps, "tokenizer": settings.tokenizer}.items() if v}
    command = [sys.executable, str(script), *(word for k, v in words.items() for word in (f"--{k}", str(v)))]
    return Job(f"{name}, seed {seed}", [*command, "--no_table"], Path(f"{_folder(out, number, seed)}.log"))


def _digits(out: Path) -> Path:
    folder = out / "digits"
    return folder if (folder / MANIFEST).exists() else write_digits(folder)


def _run(row: Row, number: int, seed: int, out: Path, data: str, settings: Settings, stop: StopSignal) -> None:
    """Pretrain one row with one seed, and judge it."""
    config, folder, small = row.config, _folder(out, number, seed), settings.scale != "paper"
    tracker = TrackerConfig(settings.tracker, f"table {settings.table}", run_id_of(out))  # type: ignore[arg-type]
    shared: dict[str, Any] = {"ds_config": settings.ds_config, "tracker": tracker}
    config = replace(
        config,
        **shared,
        preset=row.name,
        run_dir=str(folder),
        data=replace(config.data, train=data),
        train=replace(config.train, seed=seed),
    )
    if small:
        epochs = config.num_steps(0) * config.data.batch_size / len(open_shards(data, open_cache(config.data)))
        config = replace(config, optim=replace(config.optim, warmup_epochs=WARM * epochs))
    if config.token.enabled:
        where = settings.tokenizer or _tokenizer(config, _folder(out, 0, seed), out / f"tokenizer_seed_{seed}", stop)
        config = replace(config, token=replace(config.token, tokenizer=where))
    pretrain(config, stop)
    if JUDGED[settings.scale] == "finetune":
        tuning = recipe("beitv2" if config.token.enabled else "paper")
        tuned: dict[str, Any] = {"data": replace(tuning.data, train=data), "train": replace(tuning.train, seed=seed)}
        tuned["tune"] = replace(tuning.tune, untrained=True)  # once an architecture and seed: then it is remembered
        finetune(replace(tuning, **shared, **tuned, encoder=str(folder)), stop)
        return
    linear_probe(probe_of(str(folder), data, seed, tracker), stop)


def _tokenizer(config: PretrainConfig, teacher: Path, folder: Path, stop: StopSignal) -> str:
    """A small tokenizer for a small run, of the table's first row's encoder; where it is."""
    if not (teacher / "encoder").is_dir():
        raise UserError(
            f"this row's tokenizer is of the table's first row, which {teacher} lacks: run it, or --tokenizer"
        )
    vq = QuantizerConfig(
        teacher=str(teacher),
        codes=config.token.codes,
        code_width=16,
        decoder_depth=1,
        decoder_width=config.model.width,
        decoder_heads=config.model.heads,
    )
    train_tokenizer(
        TokenizerConfig(
            preset=config.preset,
            run_dir=str(folder),
            ds_config=config.ds_config,
            data=config.data,
            optim=replace(config.optim, lr=1e-3, clip_grad=0.0),
            train=config.train,
            engine=config.engine,
            tracker=config.tracker,
            model=replace(
                config.model, depth=4, positions="rowfirst", relative_positions="none", layer_scale=0.0, init="bootmae"
            ),
            vq=vq,
        ),
        stop,
    )
    return str(folder)


def probe_of(encoder: str, data: str, seed: int, tracker: TrackerConfig) -> ProbeConfig:
    """A linear probe of small encoders, on features that are kept."""
    probe = probe_recipe("demo")
    train = replace(probe.train, seed=seed, report=False)
    return replace(probe, encoder=encoder, tracker=tracker, data=replace(probe.data, train=data), train=train)


def _results(table: list[Row], out: Path, settings: Settings) -> dict[str, Any]:
    """Of all seeds that have been run, now or before, for as many steps and on the same data; others are named."""
    task = "linear_probe" if JUDGED[settings.scale] == "probe" else FinetuneConfig.TASK
    found, unlike, where = [], [], os.path.abspath(settings.data or out / "digits")
    beside: dict[str, float] = {}
    for number, row in enumerate(table):
        by_seed, untrained = {}, []
        for file in sorted(out.glob(f"row_{number}_seed_*/{task}/results.json")):
            results, run = json.loads(file.read_text()), json.loads((file.parents[1] / "config.json").read_text())
            other = run["train"]["steps"] != row.config.train.steps or os.path.abspath(run["data"]["train"]) != where
            if other or "accuracy" not in results:  # which an earlier version did not compare with baselines
                unlike.append(file.parents[1].name)
                continue
            by_seed[file.parents[1].name.rpartition("_")[2]] = results["accuracy"]
            untrained += [] if results["untrained"] is None else [results["untrained"]]
            beside |= {name: results[name] for name in BASELINES}  # alike in all rows
        values = list(by_seed.values())
        mean = statistics.mean(values) if values else None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        measured = {"row": row.name, "paper": row.paper, "mean": mean, "deviation": deviation, "seeds": by_seed}
        measured["untrained"] = statistics.mean(untrained) if untrained else None
        measured["untrained_deviation"] = statistics.stdev(untrained) if len(untrained) > 1 else None
        found.append(measured)
    return {
        "task": "ablation",
        "table": settings.table,
        "scale": settings.scale,
        "judged": "linear probe, head chosen on a part of train, top-1 in %"
        if task == "linear_probe"
        else "fine-tuned, top-1 in %",
        "steps": table[0].config.train.steps,
        "data": settings.data or "digits",
        "rows": found,
        "baselines": beside,
        "best": best(found),
        "left_out": unlike,  # of other steps or on other data
    }
