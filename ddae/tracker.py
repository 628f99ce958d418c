"""Where a run's numbers go: metrics.jsonl always, MLflow if wanted. The only import of mlflow.

MLflow is somebody else's server: when it fails the run goes on, and says so once.
"""

import contextlib
import io
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddae.config import TrackerConfig, flatten

STORE = "sqlite:///mlflow.db"  # unless MLFLOW_TRACKING_URI says otherwise; `mlflow ui` finds it by itself
RUN_ID = "mlflow_run_id"  # file in the run folder, by which a resumed run goes on in the same MLflow run


class Tracker:
    """Rows of metrics by step, into the run folder's metrics.jsonl; rows beyond `step` are cut first."""

    def __init__(self, folder: Path, step: int):
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(unfinished, self.path)
        self._file = open(self.path, "a")  # noqa: SIM115 - open as long as the run

    def log(self, row: dict[str, float]) -> None:
        """One row; it has a key `step`."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def finish(self, files: list[Path]) -> None:
        """The run is complete; `files` are what people may want to look at."""
        self._file.close()


class MlflowTracker(Tracker):
    """The same, and into MLflow: parameters, metrics, system metrics, files."""

    def __init__(self, folder: Path, step: int, experiment: str, params: dict[str, Any]):
        super().__init__(folder, step)
        self._failed = False
        self._attempt(lambda: self._start(folder, experiment, params))

    def _start(self, folder: Path, experiment: str, params: dict[str, Any]) -> None:
        import mlflow  # seconds to import, and not wanted on every rank

        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", STORE))
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", experiment))
        known = folder / RUN_ID
        run_id = known.read_text().strip() if known.exists() else None
        run = mlflow.start_run(run_id=run_id, run_name=folder.name, log_system_metrics=True)
        known.write_text(run.info.run_id)
        if run_id is None:
            mlflow.log_params({key: str(value)[:500] for key, value in params.items()})
        self._mlflow = mlflow

    def log(self, row: dict[str, float]) -> None:
        super().log(row)
        numbers = {key: value for key, value in row.items() if key != "step"}
        self._attempt(lambda: self._mlflow.log_metrics(numbers, step=int(row["step"]), synchronous=False))

    def finish(self, files: list[Path]) -> None:
        super().finish(files)

        def upload() -> None:
            self._mlflow.flush_async_logging()
            for file in files:
                folder = None if file.parent.name not in ("figures", "encoder") else file.parent.name
                self._mlflow.log_artifact(str(file), folder)
            self._mlflow.end_run()

        self._attempt(upload)

    def _attempt(self, call: Callable[[], object]) -> None:
        """Run a call to MLflow; the first failure is told, and none are tried after it."""
        if self._failed:
            return
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                call()
        except Exception as error:  # whatever a server, a client or a database may throw
            self._failed = True
            print(f"MLflow is left out from here on: {error}; metrics.jsonl goes on", flush=True)


def start_tracker(config: TrackerConfig, folder: Path, step: int, params: dict[str, Any]) -> Tracker:
    """The tracker of rank 0, which continues a run at `step`; params is the nested config."""
    if config.kind == "mlflow":
        return MlflowTracker(folder, step, config.experiment, flatten(params))
    return Tracker(folder, step)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows
