"""Tracking by MLflow. The only import of mlflow.

A thread sends rows to MLflow from a bounded queue. A server that is slow, down or failing delays nothing; rows that it
missed are sent when it answers again, as far as the queue reaches: MLflow's own asynchronous logging drops them. After
a permanent error, such as a deleted experiment, nothing more is sent.
"""

import atexit
import contextlib
import logging
import os
import queue
import re
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddae.config.base import flatten
from ddae.errors import UserError, one_line
from ddae.training.tracker import RUN_ID, Tracker

STORE = "sqlite:///mlflow.db"  # unless MLFLOW_TRACKING_URI is set; `mlflow ui` finds it by itself
SQLITE = "sqlite:///"
PROCESS_TAG = "ddae.opened_by"
QUEUE_ROWS = 5000  # buffered for a server that does not answer
ROWS_PER_CALL = 16  # sent together; a call holds 1000 numbers at most
CREATION_S = 120.0  # after a change of an incomplete store: its creation may go on
RETRY_PAUSE_S = (1.0, 60.0)  # between attempts: the first, and the longest
TIMEOUTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}  # defaults retry for minutes
FOLDERS = ("figures", "encoder", "classifier")  # of a run directory that are kept as folders of artifacts
logger = logging.getLogger(__name__)


class MlflowTracker(Tracker):
    """Also sends parameters, metrics and artifacts to one MLflow run; run_id: the one to continue."""

    def __init__(self, folder: Path, step: int, experiment: str, params: dict[str, Any], run_id: str, parent: str):
        super().__init__(folder, step)
        self._run_id_file = folder / RUN_ID
        self._experiment, self._params, self._parent = experiment, flatten(params), parent
        known = self._run_id_file.read_text().strip() if self._run_id_file.exists() else ""
        self._run_id = run_id or known or os.environ.get("MLFLOW_RUN_ID", "")
        self._tag = uuid.uuid4().hex  # identifies a run that this process created, if the server's answer is lost
        self._client: Any = None
        self._is_new = False  # whether this process created the run, and sends its parameters
        self._queue: queue.Queue[dict[str, float] | None] = queue.Queue(QUEUE_ROWS)  # None: the last item
        self._ending: tuple[list[Path], str] = ([], "")
        self._deadline = float("inf")
        self._dropped, self._failing, self._refused = 0, False, False
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
        self._ending, self._deadline = (files, status), time.monotonic() + timeout_s
        self._put(None)
        self._thread.join(timeout_s + 1)
        missing = self._dropped + sum(row is not None for row in list(self._queue.queue))
        if missing or self._thread.is_alive():
            logger.warning("MLflow lacks at least %d rows; metrics.jsonl is complete", missing)

    def _fail(self) -> None:
        """End the run of a process that exits without finish()."""
        self.finish([], "FAILED", timeout_s=5)

    def _put(self, row: dict[str, float] | None) -> None:
        """Queue a row; if the queue is full, in place of the oldest."""
        while True:
            try:
                return self._queue.put_nowait(row)
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._queue.get_nowait()
                    self._dropped += 1

    def _send_all(self) -> None:
        """Thread: open the run, send rows as they come, then artifacts and status."""
        last = not self._retry(self._open)
        while not last:
            items = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while len(items) < ROWS_PER_CALL and items[-1] is not None:
                    items.append(self._queue.get_nowait())
            last = items[-1] is None
            rows = [row for row in items if row is not None]
            if rows and not self._retry(lambda rows=rows: self._send(rows)):
                self._dropped += len(rows)
                last = True
        if self._client is not None and not self._refused:
            self._retry(self._close)

    def _retry(self, call: Callable[[], None]) -> bool:
        """Repeat a call until it succeeds, cannot succeed, or the run has ended and its deadline passed.

        Return whether it succeeded. Log an outage once.
        """
        pause = RETRY_PAUSE_S[0]
        while True:
            try:
                call()
            except Exception as error:  # of the server, the client or the database
                reason = re.sub(r"://[^/\s]*@", "://", one_line(error, 10_000))[:200]
                if is_permanent(error):
                    cause = reason.partition(" [SQL")[0].rstrip(".")
                    logger.warning("MLflow gets no more of this run: %s. metrics.jsonl is complete", cause)
                    self._refused = True
                    return False
                if not self._failing:
                    logger.warning("MLflow does not answer (%s); training continues, its rows are buffered", reason)
                self._failing = True
                if time.monotonic() + pause > self._deadline:
                    return False
                self._sleep(pause)
                pause = min(2 * pause, RETRY_PAUSE_S[1])
            else:
                if self._failing:
                    logger.warning("MLflow answers again")
                self._failing = False
                return True

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < min(end, self._deadline):
            time.sleep(0.1)

    def _open(self) -> None:
        """Continue the run, or create one."""
        for name, value in TIMEOUTS.items():
            os.environ.setdefault(name, value)
        import mlflow  # takes seconds, and is needed on rank 0 alone
        from mlflow.entities import Param

        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        uri = os.environ.get("MLFLOW_TRACKING_URI", STORE)
        create_store(uri)
        client = mlflow.MlflowClient(uri)
        if self._run_id and not _continue_run(client, self._run_id):
            logger.warning("MLflow has no run %s any more; a new one is created", self._run_id)
            self._run_id = ""
        if not self._run_id:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", self._experiment)
            experiment = client.get_experiment_by_name(name)
            experiment_id = client.create_experiment(name) if experiment is None else experiment.experiment_id
            if experiment is not None and experiment.lifecycle_stage != "active":
                restore = f"restore it with mlflow experiments restore -x {experiment_id}"
                raise UserError(f"its experiment {name} is deleted; {restore}, or choose another --tracker.experiment")
            created = client.search_runs([experiment_id], f"tags.`{PROCESS_TAG}` = '{self._tag}'", max_results=1)
            tags = {PROCESS_TAG: self._tag} | ({"mlflow.parentRunId": self._parent} if self._parent else {})
            run_name = self._run_id_file.parent.name
            run = created[0] if created else client.create_run(experiment_id, None, tags, run_name)
            self._run_id, self._is_new = run.info.run_id, True
        self._run_id_file.write_text(self._run_id)
        if self._is_new:
            params = [Param(key, str(value)[:500]) for key, value in self._params.items()]
            for first in range(0, len(params), 100):  # the most that a call may hold
                client.log_batch(self._run_id, params=params[first : first + 100])
        self._client = client

    def _send(self, rows: list[dict[str, float]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(key, value, now, int(row["step"])) for row in rows for key, value in row.items() if key != "step"
        ]
        for first in range(0, len(metrics), 1000):
            self._client.log_batch(self._run_id, metrics=metrics[first : first + 1000])

    def _close(self) -> None:
        files, status = self._ending
        self._client.set_terminated(self._run_id, status)
        for file in sorted(files, key=lambda file: file.stat().st_size):  # the largest may take too long
            folder = file.parent.name if file.parent.name in FOLDERS else None
            self._client.log_artifact(self._run_id, str(file), folder)


def create_store(uri: str) -> None:
    """Create MLflow's SQLite file, unless it exists or the URI names another store.

    MLflow would create it table by table under its name: a second process, or a kill, would leave it unusable. Raise
    RuntimeError while another process, such as `mlflow ui`, creates it.
    """
    if not uri.startswith(SQLITE):
        return
    import mlflow

    path = Path(uri.removeprefix(SQLITE))
    if not path.exists():
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")  # a new name: MLflow caches stores by name
        try:
            mlflow.MlflowClient(f"{SQLITE}{partial}").search_experiments()
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.link(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    if time.time() - path.stat().st_mtime < CREATION_S and not _is_complete(path):
        raise RuntimeError(f"another process is creating {path}")


def _is_complete(path: Path) -> bool:
    """Return whether an SQLite file has all of MLflow's tables, or is no SQLite file."""
    from mlflow.store.db.utils import _get_latest_schema_revision

    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            revisions = database.execute("SELECT version_num FROM alembic_version").fetchall()
    except sqlite3.OperationalError:  # no such table, or locked
        return False
    except sqlite3.DatabaseError:
        return True
    return revisions == [(_get_latest_schema_revision(),)]


def is_permanent(error: Exception) -> bool:
    """Return whether an error is permanent: a request that is refused, a wrong path, a missing package."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import DatabaseError, OperationalError

    if isinstance(error, MlflowException):
        status, is_race = error.get_http_status_code(), error.error_code == "RESOURCE_ALREADY_EXISTS"
        return 400 <= status < 500 and status not in (408, 429) and not is_race  # time-out, too many requests
    if isinstance(error, OperationalError):  # such as a locked database
        return False
    wrong_path = (NotADirectoryError, PermissionError, IsADirectoryError, FileNotFoundError, FileExistsError)
    return isinstance(error, (UserError, ImportError, DatabaseError, *wrong_path))


def _continue_run(client: Any, run_id: str) -> bool:
    """Set a run's status to running. Return whether the server has it."""
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
