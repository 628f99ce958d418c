"""A run's metrics.jsonl, which every tracker writes; tracking.py chooses the tracker."""

import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

from ddae import atomic
from ddae.errors import one_line

RUN_ID = "mlflow_run_id"  # file in the run directory, by which a resumed run continues the same MLflow run
logger = logging.getLogger(__name__)


class Tracker:
    """Appends rows of metrics to the run directory's metrics.jsonl; rows beyond `step` are removed first."""

    def __init__(self, folder: Path, step: int):
        self.path = folder / "metrics.jsonl"
        rows = [row for row in read_metrics(self.path) if row["step"] <= step]
        atomic.write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run
        self._unwritten = b""  # buffered while the disk is full

    def log(self, row: dict[str, float]) -> None:
        """Write one row, which has a `step`. If the disk is full, the row is buffered until the next call."""
        was_full, self._unwritten = bool(self._unwritten), self._unwritten + json.dumps(row).encode() + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not was_full:
                logger.warning("%s cannot be written (%s); its rows are buffered", self.path, error.strerror)

    @property
    def run_id(self) -> str:
        """The server's name of this run, "" if there is none."""
        return ""

    def finish(self, files: list[Path], status: str = "FINISHED", timeout_s: float = 60.0) -> None:
        """End the run with one of MLflow's statuses. files: artifacts. What takes longer than timeout_s is not sent."""
        self._file.close()


class GuardedTracker(Tracker):
    """Base of trackers whose package sends or writes rows by itself: an error of the package ends no training."""

    NAME = ""

    def __init__(self, folder: Path, step: int):
        super().__init__(folder, step)
        self._failed = False

    def _guard(self, call: Callable[[], object]) -> None:
        """Call the package; after its first error, such as a full disk, it gets nothing more."""
        if self._failed:
            return
        try:
            call()
        except Exception as error:  # packages raise many types
            self._failed = True
            logger.warning("%s gets no more of this run: %s. metrics.jsonl is complete", self.NAME, one_line(error))


def run_id_of(folder: Path) -> str:
    """Return the MLflow run of the run directory that this path is or lies in, "" if there is none."""
    for each in (folder, *list(folder.parents)[:2]):
        if (each / RUN_ID).is_file():
            return (each / RUN_ID).read_text().strip()
    return ""


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the rows of a metrics.jsonl; a line that a kill cut off, or that was damaged, is skipped."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            if isinstance(row := json.loads(line), dict):
                rows.append(row)
    return rows
