"""Where a run's numbers go: metrics.jsonl always, MLflow if wanted. The only import of mlflow.

MLflow is somebody else's server: a thread of its own talks to it, from a queue that holds so many rows. A server that
is slow, down or failing delays nothing; what it missed is sent when it answers again, as far as the queue reaches.
"""

import atexit
import contextlib
import json
import logging
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddae.config.base import TrackerConfig, flatten

logger = logging.getLogger(__name__)

STORE = "sqlite:///mlflow.db"  # unless MLFLOW_TRACKING_URI says otherwise; `mlflow ui` finds it by itself
RUN_ID = "mlflow_run_id"  # file in the run folder, by which a resumed run goes on in the same MLflow run
MARK = "ddae.opened_by"
WAITING = 5000  # rows that wait for a server that does not answer
ROWS_A_CALL = 16  # that are sent together; a call holds 1000 numbers at most
PAUSE = (1.0, 60.0)  # seconds between attempts: the first, and the longest
IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}  # it would try for minutes


class Tracker:
    """Rows of metrics by step, into the run folder's metrics.jsonl; rows beyond `step` are cut first."""

    def __init__(self, folder: Path, step: int):
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(unfinished, self.path)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run
        self._unwritten = b""  # what a full disk has not taken yet

    def log(self, row: dict[str, float]) -> None:
        """One row; it has a key `step`. A disk that is full ends no run: the row waits for the next."""
        waited, self._unwritten = bool(self._unwritten), self._unwritten + json.dumps(row).encode() + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not waited:
                logger.warning("%s cannot be written (%s); its rows are buffered", self.path, error.strerror)

    @property
    def run_id(self) -> str:
        """The run's name at a server; empty where there is none."""
        return ""

    def finish(self, files: list[Path], status: str = "FINISHED", timeout_s: float = 60.0) -> None:
        """The run ends, in one of MLflow's words for it; `files` are what people may want to look at. What cannot be
        sent within `patience` seconds is left."""
        self._file.close()


class MlflowTracker(Tracker):
    """The same, and into one MLflow run: parameters, metrics, files; `run_id` names the one to go on with."""

    def __init__(self, folder: Path, step: int, experiment: str, params: dict[str, Any], run_id: str, parent: str):
        super().__init__(folder, step)
        known = folder / RUN_ID
        self._known, self._experiment, self._params, self._parent = known, experiment, params, parent
        of_folder = known.read_text().strip() if known.exists() else os.environ.get("MLFLOW_RUN_ID", "")
        self._run_id = run_id or of_folder
        self._mark = uuid.uuid4().hex  # of a run that this process opens, to know it by if the answer is lost
        self._client: Any = None
        self._fresh = False  # whether this process made the run, and its parameters are to be sent
        self._queue: queue.Queue[dict[str, float] | None] = queue.Queue(WAITING)  # None: nothing comes after it
        self._ending: tuple[list[Path], str] = ([], "")
        self._leave_by = float("inf")
        self._left_out, self._failing = 0, False
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()
        atexit.register(self._fail)

    @property
    def run_id(self) -> str:
        return self._run_id

    def log(self, row: dict[str, float]) -> None:
        super().log(row)
        self._put(row)

    def finish(self, files: list[Path], status: str = "FINISHED", timeout_s: float = 60.0) -> None:
        super().finish(files)
        atexit.unregister(self._fail)
        self._ending, self._leave_by = (files, status), time.monotonic() + timeout_s
        self._put(None)
        self._thread.join(timeout_s + 1)
        left = self._left_out + sum(row is not None for row in list(self._queue.queue))
        if left or self._thread.is_alive():
            logger.warning("MLflow lacks at least %d rows; metrics.jsonl is complete", left)

    def _fail(self) -> None:
        """The process ends without finish()."""
        self.finish([], "FAILED", timeout_s=5)

    def _put(self, row: dict[str, float] | None) -> None:
        """Queue a row; where there is no room, in the place of the oldest."""
        while True:
            try:
                return self._queue.put_nowait(row)
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._queue.get_nowait()
                    self._left_out += 1

    def _send_all(self) -> None:
        """The thread: open the run, send rows as they come, and what belongs to its end."""
        last = not self._attempt(self._open)
        while not last:
            rows = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while len(rows) < ROWS_A_CALL and rows[-1] is not None:
                    rows.append(self._queue.get_nowait())
            last = rows[-1] is None
            numbers = [row for row in rows if row is not None]
            if numbers and not self._attempt(lambda numbers=numbers: self._send(numbers)):
                self._left_out += len(numbers)
                last = True
        if self._client is not None:
            self._attempt(self._close)

    def _attempt(self, call: Callable[[], None]) -> bool:
        """Make a call until it succeeds or the run has ended and waits no longer. An outage is told once."""
        pause = PAUSE[0]
        while True:
            try:
                call()
            except Exception as error:  # whatever a server, a client or a database may throw
                if not self._failing:
                    reason = re.sub(r"://[^/\s]*@", "://", " ".join(str(error).split()))[:200]
                    logger.warning("MLflow does not answer (%s); training continues, its rows are buffered", reason)
                self._failing = True
                if time.monotonic() + pause > self._leave_by:
                    return False
                self._sleep(pause)
                pause = min(2 * pause, PAUSE[1])
            else:
                if self._failing:
                    logger.warning("MLflow answers again")
                self._failing = False
                return True

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < min(end, self._leave_by):
            time.sleep(0.1)

    def _open(self) -> None:
        """The run to go on with, or a new one."""
        for name, value in IMPATIENT.items():
            os.environ.setdefault(name, value)
        import mlflow  # seconds to import, and not wanted on every rank
        from mlflow.entities import Param

        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        client = mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", STORE))
        if self._run_id and not _goes_on(client, self._run_id):
            logger.warning("MLflow has no run %s any more; a new one is created", self._run_id)
            self._run_id = ""
        if not self._run_id:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", self._experiment)
            experiment = client.get_experiment_by_name(name)
            number = client.create_experiment(name) if experiment is None else experiment.experiment_id
            opened = client.search_runs([number], f"tags.`{MARK}` = '{self._mark}'", max_results=1)
            tags = {MARK: self._mark} | ({"mlflow.parentRunId": self._parent} if self._parent else {})
            run = opened[0] if opened else client.create_run(number, None, tags, self._known.parent.name)
            self._run_id, self._fresh = run.info.run_id, True
        self._known.write_text(self._run_id)
        if self._fresh:
            params = [Param(key, str(value)[:500]) for key, value in self._params.items()]
            for first in range(0, len(params), 100):  # as many as a call may hold
                client.log_batch(self._run_id, params=params[first : first + 100])
        self._client = client

    def _send(self, rows: list[dict[str, float]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        numbers = [
            Metric(key, value, now, int(row["step"])) for row in rows for key, value in row.items() if key != "step"
        ]
        for first in range(0, len(numbers), 1000):
            self._client.log_batch(self._run_id, metrics=numbers[first : first + 1000])

    def _close(self) -> None:
        files, status = self._ending
        self._client.set_terminated(self._run_id, status)
        for file in sorted(files, key=lambda file: file.stat().st_size):  # the largest may take too long
            folder = None if file.parent.name not in ("figures", "encoder", "classifier") else file.parent.name
            self._client.log_artifact(self._run_id, str(file), folder)


def _goes_on(client: Any, run_id: str) -> bool:
    """Set a run to running again; whether the server has it."""
    from mlflow.exceptions import MlflowException

    try:
        if client.get_run(run_id).info.lifecycle_stage != "active":
            return False
        client.update_run(run_id, status="RUNNING")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def start_tracker(
    config: TrackerConfig, folder: Path, step: int, params: dict[str, Any], run_id: str = "", parent: str = ""
) -> Tracker:
    """The tracker of rank 0, which continues a run at `step`; params is the nested config, run_id what the checkpoint
    knows of MLflow's run, parent the one that it is shown under."""
    if config.kind == "mlflow":
        return MlflowTracker(folder, step, config.experiment, flatten(params), run_id, parent)
    return Tracker(folder, step)


def run_id_of(folder: Path) -> str:
    """MLflow's run of the run folder that this path is or lies in; empty where there is none."""
    for each in (folder, *list(folder.parents)[:2]):
        if (each / RUN_ID).is_file():
            return (each / RUN_ID).read_text().strip()
    return ""


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows
