"""Run a table of the paper: pretrain and evaluate each row with every seed, and compare with the paper's numbers.

Rows are ordinary runs: an interrupted table resumes, and a run with a row in the results file (results.py) is not
repeated. Rows run one after the other, or several at a time on one machine.
"""

import json
import logging
import re
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ddae import atomic
from ddae.ablation.format import CURVES, best_row, has_curves, to_html, to_markdown
from ddae.ablation.jobs import Job, require_no_launcher, run_jobs
from ddae.ablation.results import ResultsFile, RunKey, run_key
from ddae.ablation.tables import Row, table_rows
from ddae.config.base import ShardsConfig, TrackerConfig
from ddae.config.evaluation import FinetuneConfig, ProbeConfig, probe_recipe, recipe
from ddae.config.pretrain import PretrainConfig
from ddae.config.scales import WARMUP_FRACTION, change
from ddae.config.tokenizer import QuantizerConfig, TokenizerConfig
from ddae.data.cache import open_cache
from ddae.data.digits import write_digits
from ddae.data.manifest import MANIFEST
from ddae.data.shards import Shards, open_shards
from ddae.distributed.comm import broadcast_from_main, is_main
from ddae.distributed.engine import start_process_group
from ddae.distributed.logs import configure_logging
from ddae.distributed.preemption import EXIT_CODE, StopSignal
from ddae.errors import UserError
from ddae.eval.dataset import ExampleReader, val_location
from ddae.eval.finetune import finetune
from ddae.eval.linear_probe import linear_probe
from ddae.export.encoder import load_tokenizer
from ddae.train import pretrain
from ddae.train_tokenizer import train_tokenizer
from ddae.training.tracker import Tracker, run_id_of
from ddae.training.tracking import check_installed, start_tracker

logger = logging.getLogger(__name__)
JUDGED = {  # what the rows are compared by
    ProbeConfig.TASK: "linear probe, head selected on a part of train, top-1 in %",
    FinetuneConfig.TASK: "fine-tuned, top-1 in %",
}
MAX_PROBE_STEPS = 2000  # of a small run's linear probe
KNN_EVALUATIONS = 4  # during a small run, besides that of the untrained encoder
BASELINES = ("raw_pixels", "chance")  # keys of a row's results.json that do not depend on the row
MLFLOW_TIMEOUT_S = 30.0  # for MLflow to create the table's run


class AblationSettings(NamedTuple):
    """What to run, apart from the rows' own configs."""

    table: str
    scale: str
    seeds: tuple[int, ...]
    only: tuple[str, ...]  # names of rows; empty: all
    data: str  # shards with classes; "": digits, at the scale nano
    ds_config: str
    tracker: str
    steps: int | None  # of pretraining; None: the scale's
    tokenizer: str  # for BEiT-v2's rows; "": train one, except at the paper's scale
    parallel: int  # runs at a time
    write_table: bool  # False: train only, while another process writes the table
    results: str  # CSV file with the results of all runs; "": results.csv in the table's folder

    def results_file(self, out: Path) -> ResultsFile:
        """Return the file with the results; out: the table's folder."""
        return ResultsFile(Path(self.results) if self.results else out / "results.csv")


def ablate(out: Path, settings: AblationSettings) -> dict[str, Any] | None:
    """Run the rows that are not complete, and write table.md, table.html and results.json of all complete ones.

    Return the content of results.json on the main rank, None elsewhere and without a table. Raise SystemExit with code
    75 if a signal stops it, with another code if one of several parallel runs fails. Raise UserError for an unknown
    table, scale or row, or if a run cannot be resumed.
    """
    configure_logging()
    rows = table_rows(settings.table, settings.scale, settings.steps)
    _check(rows, settings)
    numbered = [(number, row) for number, row in enumerate(rows) if not settings.only or row.name in settings.only]
    out.mkdir(parents=True, exist_ok=True)
    tracker = None
    try:
        if settings.parallel > 1:
            settings = settings._replace(data=settings.data or str(_digits(out)))
            tracker = _start_tracker(out, settings) if settings.write_table else None
            missing = _missing_runs(numbered, out, settings.data, settings)
            jobs = [_job(number, row.name, seed, out, settings) for seed, number, row in missing]
            run_jobs(jobs, settings.parallel)
        else:
            stop = StopSignal()
            start_process_group()
            data = settings.data or str(broadcast_from_main(lambda: _digits(out)))
            tracker = _start_tracker(out, settings) if settings.write_table and is_main() else None
            for seed, number, row in broadcast_from_main(lambda: _missing_runs(numbered, out, data, settings)):
                logger.info("%s, seed %d: %s", row.name, seed, _run_folder(out, number, seed))
                _run_row(row, number, seed, out, data, settings, stop)
    except SystemExit as end:
        if tracker is not None:
            tracker.finish([], "KILLED" if end.code == EXIT_CODE else "FAILED", timeout_s=3)
        raise
    if not settings.write_table or not is_main():
        return None
    results = _collect_results(rows, out, settings)
    atomic.write_json(out / "results.json", results)
    atomic.write_text(out / "table.md", to_markdown(results))
    atomic.write_text(out / "table.html", to_html(results))
    for name, draw in CURVES.items():
        if has_curves(results, name):
            draw(results).savefig(out / f"{name}.png", dpi=110)
    assert tracker is not None
    means = {f"top1/{row['row']}": row["mean"] for row in results["rows"] if row["mean"] is not None}
    means |= {f"top1/{name}": value for name, value in results["baselines"].items()}
    tracker.log({"step": 0, **{re.sub(r"[^\w/. -]", "_", name): mean for name, mean in means.items()}})
    tracker.finish([out / name for name in ("results.json", "table.md", "table.html")])
    return results


def _check(rows: list[Row], settings: AblationSettings) -> None:
    """Raise UserError if the settings contradict each other, name a row that does not exist, or data without classes
    or without the splits train and val."""
    check_installed(TrackerConfig(kind=settings.tracker))  # type: ignore[arg-type]
    image_size = rows[0].config.model.image_size
    names, scale = [row.name for row in rows], settings.scale
    for flag, value in {"steps": settings.steps, "parallel": settings.parallel}.items():
        if value is not None and value < 1:
            raise UserError(f"--{flag} is {value}; expected a number >= 1.")
    if settings.steps and scale == "paper":
        raise UserError("--steps is for small scales; the scale paper has the paper's epochs. Leave it out.")
    if settings.parallel > 1:
        require_no_launcher()
    for name in settings.only:
        if name not in names:
            raise UserError(f"table {settings.table} has no row {name!r}. Its rows are {', '.join(map(repr, names))}.")
    if not settings.data and scale != "nano":
        raise UserError(f"--data is missing; the scale {scale} needs shards with classes.")
    token_rows = [row.name for row in rows if row.config.token.enabled and row.name in (settings.only or names)]
    can_train_one = scale != "paper" and settings.parallel == 1 and settings.write_table
    if token_rows and not settings.tokenizer and not can_train_one:
        problem = f"--tokenizer is missing, which the row {token_rows[0]!r} needs at this scale or with these flags."
        raise UserError(f"{problem} Pass a run of launch/train_tokenizer.py, or a published file.")
    if settings.data:  # before hours of pretraining
        for source, split in ((settings.data, "train"), (val_location(settings.data), "val")):
            ExampleReader(source, split, image_size, open_cache(ShardsConfig()), max_images=1)
    if settings.tokenizer:
        load_tokenizer(settings.tokenizer)


def _start_tracker(out: Path, settings: AblationSettings) -> Tracker:
    """Return the tracker of the table's own run, once MLflow has created it: the rows' runs are nested under it."""
    config = TrackerConfig(kind=settings.tracker, experiment=f"table {settings.table}")  # type: ignore[arg-type]
    tracker = start_tracker(config, out, 0, {"table": settings.table, "scale": settings.scale})
    deadline = time.monotonic() + MLFLOW_TIMEOUT_S
    while settings.tracker == "mlflow" and not tracker.run_id and time.monotonic() < deadline:
        time.sleep(0.1)
    return tracker


def _run_folder(out: Path, number: int, seed: int) -> Path:
    return out / f"row_{number}_seed_{seed}"


def _missing_runs(
    rows: list[tuple[int, Row]], out: Path, data: str, settings: AblationSettings
) -> list[tuple[int, int, Row]]:
    """Return (seed, number, row) of the runs without results; rows: with their numbers."""
    file, shards, missing = settings.results_file(out), open_shards(data, open_cache(ShardsConfig())), []
    for seed, (number, row) in product(settings.seeds, rows):
        if file.find(_key(row, seed, shards, settings)) is None:
            missing.append((seed, number, row))
        else:
            logger.info("%s, seed %d: its results are in %s", row.name, seed, file.path)
    return missing


def _job(number: int, name: str, seed: int, out: Path, settings: AblationSettings) -> Job:
    """Return the command that runs one row with one seed."""
    script = Path(__file__).parents[2] / "launch" / "ablate.py"
    flags = {"table": settings.table, "scale": settings.scale, "only": name, "seeds": seed, "out": out}
    flags |= {"data": settings.data, "ds_config": settings.ds_config, "tracker": settings.tracker}
    optional = {"steps": settings.steps, "tokenizer": settings.tokenizer, "results": settings.results}
    flags |= {name: value for name, value in optional.items() if value}
    command = [sys.executable, str(script), *(arg for flag, v in flags.items() for arg in (f"--{flag}", str(v)))]
    return Job(f"{name}, seed {seed}", [*command, "--no_table"], Path(f"{_run_folder(out, number, seed)}.log"))


def _digits(out: Path) -> Path:
    folder = out / "digits"
    return folder if (folder / MANIFEST).exists() else write_digits(folder)


def _run_row(
    row: Row, number: int, seed: int, out: Path, data: str, settings: AblationSettings, stop: StopSignal
) -> None:
    """Pretrain one row with one seed, evaluate it, and add its results to the file."""
    start = time.monotonic()
    folder = str(_run_folder(out, number, seed))
    tracker = TrackerConfig(settings.tracker, f"table {settings.table}", run_id_of(out))  # type: ignore[arg-type]
    shared: dict[str, Any] = {"ds_config": settings.ds_config, "tracker": tracker}
    config = replace(row.config, **shared, preset=row.name, run_dir=folder)
    config = change(change(config, "data", train=data), "train", seed=seed)
    shards = open_shards(data, open_cache(config.data))
    if settings.scale != "paper":
        epochs = config.num_steps(0) * config.data.batch_size / len(shards)
        config = change(config, "optim", warmup_epochs=WARMUP_FRACTION * epochs)
        config = replace(config, probe_every=epochs / KNN_EVALUATIONS)
    if config.token.enabled:
        config = change(
            config, "token", tokenizer=settings.tokenizer or _train_small_tokenizer(config, out, seed, stop)
        )
    pretrain(config, stop)
    evaluation = evaluation_recipe(row, settings.scale, len(shards))
    evaluation = change(change(evaluation, "data", train=data), "train", seed=seed)
    if isinstance(evaluation, FinetuneConfig):
        finetune(replace(evaluation, **shared, encoder=folder), stop)
    else:
        linear_probe(replace(evaluation, encoder=folder, tracker=tracker), stop)
    if is_main():
        results = json.loads((Path(folder) / evaluation.TASK / "results.json").read_text())
        minutes = (time.monotonic() - start) / 60
        settings.results_file(out).add(_key(row, seed, shards, settings), results, Path(folder), config, minutes)


def evaluation_recipe(row: Row, scale: str, num_images: int) -> FinetuneConfig | ProbeConfig:
    """Return how a row is evaluated: fine-tuning at the scale paper, otherwise a linear probe.

    num_images: of the training split; a probe has at most MAX_PROBE_STEPS.
    """
    if scale == "paper":
        tuning = recipe("beitv2" if row.config.token.enabled else "paper")
        return change(tuning, "tune", untrained=True)  # cached after the first row of an architecture and seed
    probe = change(probe_recipe("demo"), "train", report=False)
    longest = MAX_PROBE_STEPS * probe.data.batch_size / num_images  # epochs
    if probe.train.epochs > longest:
        probe = change(change(probe, "train", epochs=longest), "optim", warmup_epochs=WARMUP_FRACTION * longest)
    return probe


def _key(row: Row, seed: int, shards: Shards, settings: AblationSettings) -> RunKey:
    """Return the key of a run in the results file."""
    evaluation = evaluation_recipe(row, settings.scale, len(shards))
    return run_key(settings.table, settings.scale, row, seed, shards, evaluation)


def _train_small_tokenizer(config: PretrainConfig, out: Path, seed: int, stop: StopSignal) -> str:
    """Train a small tokenizer on the features of the table's first row. Return its folder.

    Raise UserError if the first row has not been trained.
    """
    teacher, folder, model = _run_folder(out, 0, seed), str(out / f"tokenizer_seed_{seed}"), config.model
    if not (teacher / "encoder").is_dir():
        problem = f"{teacher} is missing: without --tokenizer this row's tokenizer learns from the table's first row."
        raise UserError(f"{problem} Run the first row, too, or pass --tokenizer.")
    decoder = {"decoder_depth": 1, "decoder_width": model.width, "decoder_heads": model.heads}
    fields: dict[str, Any] = {
        **{name: getattr(config, name) for name in ("preset", "ds_config", "data", "train", "engine", "tracker")},
        "optim": replace(config.optim, lr=1e-3, clip_grad=0.0),
        "model": replace(
            model, depth=4, positions="rowfirst", relative_positions="none", layer_scale=0.0, init="bootmae"
        ),
        "vq": QuantizerConfig(str(teacher), config.token.codes, code_width=16, **decoder),
    }
    train_tokenizer(TokenizerConfig(run_dir=folder, **fields), stop)
    return folder


def _collect_results(rows: list[Row], out: Path, settings: AblationSettings) -> dict[str, Any]:
    """Return the results of all seeds that were run, now or before, with these settings on the same data."""
    task = FinetuneConfig.TASK if settings.scale == "paper" else ProbeConfig.TASK
    shards = open_shards(settings.data or str(out / "digits"), open_cache(ShardsConfig()))
    file = settings.results_file(out)
    all_runs = file.rows()
    of_table = [each for each in all_runs if (each["table"], each["scale"]) == (settings.table, settings.scale)]
    collected, used = [], []
    baselines: dict[str, float] = {}
    for row in rows:
        found, knn, betas = {}, {}, {}
        for seed in sorted({int(each["seed"]) for each in all_runs}):
            key = _key(row, seed, shards, settings)
            if (result := file.find(key)) is not None:
                found[str(seed)] = result
                knn[str(seed)], betas[str(seed)] = file.knn_curve(key), file.beta_curve(key)
        used += found.values()
        mean, deviation = _mean_and_deviation(float(each["accuracy"]) for each in found.values())
        accuracies = {seed: float(each["accuracy"]) for seed, each in found.items()}
        result = {"row": row.name, "paper": row.paper, "mean": mean, "deviation": deviation, "seeds": accuracies}
        for name in ("untrained", "knn_mean", "untrained_knn_mean"):
            values = [float(each[name]) for each in found.values() if each[name]]
            result[name], result[f"{name}_deviation"] = _mean_and_deviation(values)
        result["knn_curves"] = knn  # by seed: (images seen, accuracy)
        result["beta_curves"] = betas  # by seed: (step, first tap, last tap)
        baselines |= {name: float(each[name]) for each in found.values() for name in BASELINES}  # equal for all rows
        collected.append(result)
    left_out = [f"{each['row']}, seed {each['seed']}, {each['steps']} steps" for each in of_table if each not in used]
    return {
        "task": "ablation",
        "table": settings.table,
        "scale": settings.scale,
        "judged": JUDGED[task],
        "steps": rows[0].config.train.steps,
        "data": settings.data or "digits",
        "rows": collected,
        "baselines": baselines,
        "best": best_row(collected),
        "left_out": left_out,  # runs with other settings or on other data
    }


def _mean_and_deviation(measured: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Return the mean, None without values, and the standard deviation, None for fewer than two. Skip None."""
    values = [value for value in measured if value is not None]
    mean = statistics.mean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None
