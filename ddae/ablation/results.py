"""Results of runs, in a CSV file that may be kept under version control: a run whose row is there is not repeated.

FILE.csv has a row per run. FILE_curves.csv has a row per k-NN evaluation during pretraining, FILE_betas.csv a row per
point of the curves of learnt betas.
"""

import csv
import fcntl
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ddae.ablation.tables import Row
from ddae.config.evaluation import Evaluation
from ddae.config.pretrain import PretrainConfig, tap_name
from ddae.data.shards import Shards
from ddae.training.tracker import read_metrics

# Of the evaluation that a table compares, in per cent. The selection's accuracy is that on the part of train that
# selects the head: what settings are tuned by.
VALUES = ("accuracy", "selection_accuracy", "untrained", "raw_pixels", "chance")
KNN = ("knn_mean", "knn_cls", "effective_rank")  # of the last block; the rank is that of the mean patch
SAME_RUN = ("seed", "steps", "settings", "data")  # fields of a RunKey that are equal if a run's result can be reused
LAST_LOGGED = {  # at the last log step: the extreme over taps of metrics that begin so
    "pixel_error": (min, "error/pixel/"),
    "feature_error": (min, "error/feature/"),
    "position_share": (max, "collapse/target/position/"),  # of the feature targets
}
BETA_POINTS = 20  # of the curves of a run's betas
DIGEST = 12  # characters of the hashes of settings and data


class RunKey(NamedTuple):
    """What a run is called and what determines its result."""

    table: str
    scale: str
    row: str
    seed: int
    steps: int  # of pretraining; 0: as many as the epochs have
    settings: str  # hash of the configs of pretraining and evaluation
    data: str  # hash of the shards


SPEED_ALONE = ("device", "direct_calls", "gradient_reduction", "teacher_graph", "student_graphs")  # of section engine


def run_key(table: str, scale: str, row: Row, seed: int, shards: Shards, evaluation: Evaluation) -> RunKey:
    """Return the key of a row's run on this data set."""
    settings = [row.config.to_dict(), evaluation.to_dict()]
    for each in settings:
        for field in ("seed", "async_save", "profile_steps"):
            each["train"].pop(field)
        for field in SPEED_ALONE:
            each.get("engine", {}).pop(field, None)
        if each.get("engine", {}).get("reduce_dtype") == "auto":  # rows of version 0.2 keep their keys
            each["engine"].pop("reduce_dtype")
        if not each.get("init"):
            each.pop("init", None)
        if each["data"]["workers"] is None:
            each["data"]["workers"] = 4  # the default of version 0.2, whose rows keep their keys
        for field in ("val_share", "labels"):  # of folders of images; shards have neither
            each["data"].pop(field)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    steps = row.config.train.steps or 0
    return RunKey(table, scale, row.name, seed, steps, digest[:DIGEST], shards.fingerprint[:DIGEST])


class ResultsFile:
    """The results of runs. Processes on one machine may append at the same time."""

    def __init__(self, path: Path):
        self.path, self.curves = path, path.with_name(f"{path.stem}_curves.csv")
        self.betas = path.with_name(f"{path.stem}_betas.csv")

    def rows(self) -> list[dict[str, str]]:
        """Return all rows as they stand in the file."""
        return _read(self.path)

    def find(self, key: RunKey) -> dict[str, str] | None:
        """Return the row of a run, the last one if there are several; None if there is none.

        The run may be another table's, under another name: SAME_RUN decides.
        """
        return next((row for row in reversed(self.rows()) if _is_of(row, key)), None)

    def knn_curve(self, key: RunKey) -> list[tuple[int, float]]:
        """Return (images seen, k-NN accuracy of the last block's mean patch) of a run's evaluations, in order."""
        rows = [row for row in _read(self.curves) if _is_of(row, key) and row["knn_mean"]]
        return sorted({int(row["images"]): float(row["knn_mean"]) for row in rows}.items())

    def beta_curve(self, key: RunKey) -> list[tuple[int, float, float]]:
        """Return (step, beta of the first tap, of the last tap) of a run's curve, in order; [] if it has none."""
        rows = [row for row in _read(self.betas) if _is_of(row, key)]
        names = ("after_steps", "beta_first", "beta_last")
        points = ((row[name] for name in names) for row in rows)
        return sorted({(int(step), float(first), float(last)) for step, first, last in points})

    def add(self, key: RunKey, evaluation: dict[str, Any], run: Path, config: PretrainConfig, minutes: float) -> None:
        """Append the results of a run: its evaluation's results.json, and the k-NN evaluations in its folder."""
        points = list(_knn_points(run, config))
        row = {**key._asdict(), **{name: _rounded(evaluation.get(name)) for name in VALUES}}
        row |= {name: _rounded(points[-1][name]) if points else "" for name in KNN}
        untrained = next((point for point in points if point["after_steps"] == 0), {})
        row |= {f"untrained_{name}": _rounded(untrained.get(name)) for name in KNN}
        row |= _last_logged(run) | {"minutes": _rounded(minutes), "warned_at": _first_warning(run)}
        _append(self.path, [row])
        for file, rows in ((self.curves, points), (self.betas, beta_points(run))):
            _append(file, [{**key._asdict(), **{k: _rounded(v) for k, v in each.items()}} for each in rows])


def _is_of(row: dict[str, str], key: RunKey) -> bool:
    return all(row[name] == str(getattr(key, name)) for name in SAME_RUN)


def _read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; none if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _knn_points(run: Path, config: PretrainConfig) -> Iterator[dict[str, float]]:
    """Yield steps, images and KNN of each k-NN evaluation of a run, in order."""
    tap = tap_name(config.model.depth)
    for row in read_metrics(run / "metrics.jsonl"):
        if f"knn/{tap}/mean" in row:
            values = row[f"knn/{tap}/mean"], row[f"knn/{tap}/cls"], row[f"features/effective_rank/{tap}"]
            step = row["step"]
            yield {"after_steps": step, "images": step * config.data.batch_size, **dict(zip(KNN, values, strict=True))}


def beta_points(run: Path) -> list[dict[str, float]]:
    """Return the betas of the first and the last tap at BETA_POINTS + 1 even steps of a run; [] if it has none."""
    logged = []
    for row in read_metrics(run / "metrics.jsonl"):
        if betas := [row[name] for name in sorted(row) if name.startswith("beta/")]:
            logged.append({"after_steps": row["step"], "beta_first": betas[0], "beta_last": betas[-1]})
    chosen = {round(number * (len(logged) - 1) / BETA_POINTS) for number in range(BETA_POINTS + 1)} if logged else ()
    return [logged[number] for number in sorted(chosen)]


def _last_logged(run: Path) -> dict[str, str]:
    """Return LAST_LOGGED of a run; what it has no metrics for is empty."""
    rows, found = read_metrics(run / "metrics.jsonl"), {}
    for name, (extreme, prefix) in LAST_LOGGED.items():
        logged = [[v for key, v in row.items() if key.startswith(prefix)] for row in rows]
        found[name] = _rounded(next((extreme(values) for values in reversed(logged) if values), None))
    return found


def _first_warning(run: Path) -> str:
    """Return the first step at which the collapse monitor warned; "never", or "" for a run without a teacher."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "collapse/warning" in row]
    return next((str(row["step"]) for row in rows if row["collapse/warning"]), "never" if rows else "")


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows, whose names are the file's head. A file of an older version gets the columns that it lacks."""
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        outdated = file.readline() != ",".join(rows[0]) + "\n"
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        if outdated:
            writer.writeheader()
            writer.writerows(_read(path))
        writer.writerows(rows)
        if outdated:
            file.truncate(0)
        file.write(text.getvalue())
