"""One start of a run, whatever it trains: who holds its folder, where it goes on, what it saves, whom it tells, how it
ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from ddae.config.base import Experiment
from ddae.data.loader import Loader
from ddae.distributed.checkpoint import Checkpoints
from ddae.distributed.checkpoint_format import Saved
from ddae.distributed.comm import agree, barrier, from_main, is_main, say
from ddae.distributed.engine import stop_process_group
from ddae.distributed.preemption import EXIT_CODE, Stop
from ddae.distributed.watchdog import Watchdog
from ddae.training import run_dir
from ddae.training.metrics import Clock
from ddae.training.tracker import Tracker, read_metrics, start_tracker

MEASURED = ("val/", "health/")  # names of metrics that belong to the steps before them, and are measured apart


class Session:
    """From the moment on that the ranks have met; all of them call what is public here."""

    def __init__(self, config: Experiment, loader: Loader, stop: Stop):
        """UserError where the ranks see different things, somebody else trains in the folder, or what it holds is
        broken."""
        self.config, self.loader = config, loader
        self.folder = Path(config.folder)
        self.tracker: Tracker | None = None  # on the main rank
        self.parts: dict[str, Saved] = {}
        self.measured: set[float] = set()  # steps after which an earlier start has measured
        self._stop, self._looks, self._saved_step = stop, 0, -1
        stop.patience = config.train.hang_after + 60
        agree(backend=loader.backend, samples=loader.num_samples)
        run_dir.lock(config)
        self._watchdog = Watchdog(self.folder, config.train.hang_after)
        self._checkpoints = Checkpoints(self.folder / "checkpoints", config.train.keep, config.train.keep_every)
        self._newest = self._checkpoints.newest(config.allow_scratch)
        if self._newest is None:
            from_main(lambda: run_dir.check_history(config))

    def restore(self, parts: dict[str, Saved], ds_json: dict[str, Any], parent: str = "", **params: Any) -> int:
        """Fill the parts from the newest checkpoint; the step to go on from, 0 for a new run.

        Then the folder says what is run, and the tracker is open. parent: MLflow's run that this one belongs to.
        params: what it shall know beside the config.
        """
        self.parts = parts
        saved: dict[str, Any] = {}
        if self._newest is not None:
            saved = self._checkpoints.load(self._newest.path, parts, self.loader.fingerprint)
        start = saved.get("step", 0)
        barrier()
        if is_main():
            run_dir.write(self.config, ds_json, self.loader.backend)
            self._checkpoints.set_aside_beyond(start)
            params = self.config.to_dict() | params
            known = saved.get("run_id", "")
            above = parent or self.config.tracker.parent
            self.tracker = start_tracker(self.config.tracker, self.folder, start, params, known, above)
        rows = from_main(self.rows)
        self.measured = {row["step"] for row in rows if any(name.startswith(MEASURED) for name in row)}
        self._saved_step = start if self._newest is not None else -1
        self.clock = Clock()
        return start

    def look_around(self, step: int) -> None:
        """Before each step, and now and then in what takes long after `step` of them: say that this rank lives.

        SystemExit with code 75, and with a checkpoint left, where the ranks are told to stop.
        """
        self.look_alive(step)
        self._looks += 1
        if reason := self._stop.agreed(self._looks):
            if self._saved_step != step:
                self.save(step)
            self.loader.close()
            self._leave(reason, step)

    def look_alive(self, step: int) -> None:
        """Say that this rank lives, where it cannot stop."""
        self._watchdog.beat(step)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around an evaluation, which looks around more or less often than steps do."""
        self._stop.changes_pace()
        with self.clock.spending("evaluate"):
            yield
        self._stop.changes_pace()

    def save(self, step: int) -> None:
        """Leave a checkpoint of the state after `step` steps."""
        run_id = "" if self.tracker is None else self.tracker.run_id
        with self.clock.spending("save"):
            if self._checkpoints.save(step, self.parts, fingerprint=self.loader.fingerprint, run_id=run_id):
                self._saved_step = step

    def log(self, row: dict[str, float]) -> None:
        """A row of metrics, with its `step`."""
        if self.tracker is not None:
            self.tracker.log(row)

    def rows(self) -> list[dict[str, float]]:
        """What was logged so far, by earlier starts, too."""
        return read_metrics(self.folder / "metrics.jsonl")

    def finish(self, steps: int, files: list[Path]) -> None:
        """The run is complete; `files` are what people may want to look at."""
        self._watchdog.stop()
        if self.tracker is not None:
            self.tracker.finish(files)
        if is_main():
            run_dir.set_finished(self.config, steps)

    def fail(self) -> None:
        """The run ends by an error, which the caller raises."""
        if self.tracker is not None:
            self.tracker.finish([], "FAILED", patience=3)

    def _leave(self, reason: str, step: int) -> NoReturn:
        if is_main():
            try:
                run_dir.set_stopped(self.config, reason, step)
            except OSError as error:
                print(f"{run_dir.STOPPED} cannot be written ({error.strerror})", flush=True)
        if self.tracker is not None:
            self.tracker.finish([], "KILLED", patience=3)
        say(f"{self.config.folder}: stopped after {step} steps ({reason}); the same command goes on")
        stop_process_group()
        raise SystemExit(EXIT_CODE)
