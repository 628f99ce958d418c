"""Run lifecycle: check, lock, resume, poll for signals, evaluate, log, checkpoint, shut down."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ddae.config.base import Experiment
from ddae.data.loader import Loader
from ddae.data.reader import RankBatch
from ddae.distributed.checkpoint import Background, Checkpoints
from ddae.distributed.checkpoint_format import Checkpointable
from ddae.distributed.comm import (
    assert_equal_across_ranks,
    barrier,
    broadcast_from_main,
    is_main,
    rank,
    world_size,
)
from ddae.distributed.engine import start_process_group, stop_process_group
from ddae.distributed.logs import configure_logging, keep_log_of_others
from ddae.distributed.preemption import EXIT_CODE, StopSignal
from ddae.distributed.watchdog import FIRST_STEP_EXTRA_S, Watchdog
from ddae.errors import UserError
from ddae.training import run_dir
from ddae.training.flops import Flops
from ddae.training.metrics import SpikeDetector, StepTimer, system_metrics
from ddae.training.profiling import MemorySnapshots, StepProfiler
from ddae.training.progress import TrainingProgress
from ddae.training.tracker import Tracker, read_metrics
from ddae.training.tracking import check_installed, start_tracker

EVALUATION_METRICS = ("val/", "features/")  # prefixes of metrics that a PeriodicEvaluation logs
BASELINE_METRICS = ("raw_pixels", "chance")  # endings of metrics that do not depend on the encoder
GC_INTERVAL = 100  # most steps between two garbage collections
logger = logging.getLogger(__name__)


class Run:
    """One start of an experiment. All ranks call its public methods.

    Order: constructor (checks without other ranks), is_complete(), start(), restore(), then the training loop.
    """

    loader: Loader
    timer: StepTimer

    def __init__(self, config: Experiment, stop: StopSignal | None, ds_json: dict[str, Any], micro_batch: int):
        """Raise UserError if the run directory is not writable, or was started with other settings."""
        configure_logging()
        check_installed(config.tracker)
        run_dir.check(config)
        self.config, self.ds_json, self.folder = config, ds_json, Path(config.folder)
        self.rank_batch = RankBatch(config.data.batch_size, micro_batch, rank(), world_size())
        self.tracker: Tracker | None = None  # on rank 0
        self.evaluated_steps: set[float] = set()  # by an earlier start
        self.count_flops: Callable[[], Flops] | None = None  # of an image, for model FLOPs utilisation
        self._flops: Flops | None = None
        self._state: dict[str, Checkpointable] = {}
        self._stop = stop or StopSignal()
        self._stop.timeout_s = self._timeout_s
        self._polls, self._first_step = 0, True
        self._encoder = ""

    def bind(self, encoder: str) -> None:
        """Bind the run's checkpoints and results to an encoder that it evaluates, by the hash of its weights."""
        self._encoder = encoder

    @property
    def _timeout_s(self) -> float:
        """Seconds that ranks wait for each other: longer than the watchdog, which leaves stacks."""
        return self.config.train.watchdog_timeout_s + FIRST_STEP_EXTRA_S + 60

    def is_complete(self, num_steps: int) -> bool:
        """Return whether the run was trained for so many steps and exported.

        Raise UserError if it evaluated another encoder than that of bind().
        """
        finished = run_dir.finished(self.config)
        if finished["steps"] < num_steps:
            return False
        self._check_encoder(finished)
        return True

    def _check_encoder(self, facts: dict[str, Any]) -> None:
        """Raise UserError if an earlier start evaluated another encoder; facts: of its checkpoint or its end."""
        if facts.get("encoder", self._encoder) != self._encoder:
            raise UserError(
                f"{self.folder} was started with an encoder whose weights have changed since. "
                f"Choose another --run_dir, or delete {self.folder} to evaluate the new weights."
            )

    def start(self, loader: Loader, **equal: object) -> None:
        """Join the ranks, choose the image decoder, lock the directory, start the watchdog, find the checkpoint.

        equal: further facts that must be the same on all ranks. Raise UserError if they differ, if another run uses the
        directory, if its checkpoints are damaged or missing, or if train.profile_steps is not within the run.
        """
        config, self.loader = self.config, loader
        num_steps = config.num_steps(loader.epoch_samples)
        self._profiler = StepProfiler(config.train.profile_steps, num_steps, self.folder)
        start_process_group(self._timeout_s)
        loader.select_backend(run_dir.previous_decoding(config))
        assert_equal_across_ranks(decoding=loader.decoding, samples=loader.num_samples, **equal)
        run_dir.lock(config)
        keep_log_of_others(self.folder / "logs")
        self._snapshots = MemorySnapshots(self.folder)
        self._watchdog = Watchdog(self.folder, config.train.watchdog_timeout_s)
        background = Background(self._timeout_s) if config.train.async_save else None
        keep, keep_every = config.train.keep, config.train.keep_every
        self._checkpoints = Checkpoints(self.folder / "checkpoints", keep, keep_every, background)
        self._newest = self._checkpoints.newest(config.allow_restart)
        if self._newest is None:
            broadcast_from_main(lambda: run_dir.check_history(config))

    def restore(self, state: dict[str, Checkpointable], parent: str = "", **params: Any) -> int:
        """Load the newest checkpoint into `state` and open the tracker. Return the step to start from, 0 for a new run.

        parent: the MLflow run under which this one is nested. params: logged beside the config.
        """
        self._state = state
        facts: dict[str, Any] = {}
        if self._newest is not None:
            facts = self._checkpoints.load(self._newest.path, state, self.loader.fingerprint)
            self._check_encoder(facts)
        start = facts.get("step", 0)
        barrier()
        if is_main():
            run_dir.write(self.config, self.ds_json, self.loader.decoding)
            self._checkpoints.quarantine_after(start)
            params = self.config.to_dict() | params
            parent = parent or self.config.tracker.parent
            run_id = facts.get("run_id", "")
            self.tracker = start_tracker(self.config.tracker, self.folder, start, params, run_id, parent)
        rows = broadcast_from_main(self.rows)
        self.evaluated_steps = {row["step"] for row in rows if any(n.startswith(EVALUATION_METRICS) for n in row)}
        self._spikes = SpikeDetector(row["loss/total"] for row in rows if "loss/total" in row)
        self.timer = StepTimer()
        return start

    def describe(self, start: int, num_steps: int, more: str) -> None:
        """Log what is about to be trained."""
        batch = self.rank_batch
        self._profiler.warn_if_over(start)
        self._progress = TrainingProgress(start, num_steps)
        logger.info(
            f"{self.folder}: steps {start} to {num_steps} of {batch.batch_size} images on {batch.world_size} ranks "
            f"({batch.grad_accum_steps} x {batch.micro_batch} each), {self.loader.describe()}, {more}"
        )

    def poll(self, step: int) -> None:
        """Report progress, and check for signals; called before each step, and in long work after `step` steps.

        After a signal save a checkpoint and raise SystemExit with code 75, or UserError if it cannot be written.
        """
        self.heartbeat(step)
        self._polls += 1
        if reason := self._stop.poll(self._polls):
            self.require_saved(step)
            self.loader.close()
            self._exit(reason, step)

    def heartbeat(self, step: int) -> None:
        """Report progress to the watchdog, where the run cannot stop."""
        self._watchdog.heartbeat(step)

    def begin_step(self, step: int) -> None:
        """Begin to profile a step, if that was asked for; called after poll() and evaluations."""
        self._profiler.begin_step(step + 1)
        self._snapshots.begin_step()

    def step_done(self, step: int) -> None:
        """Count a step; log how long the first one took, with compilation and the first batch."""
        self.timer.count_step()
        with self.timer.measure("evaluate"):
            self._profiler.end_step(step + 1)
            self._snapshots.end_step(step + 1)
        self._progress.step_done(step + 1)
        if self._first_step:
            logger.info("first step done after %.1f s", self.timer.seconds)
            self._watchdog.first_step_done()
            self._first_step = False

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Context of an evaluation: its time is not training time, and it polls at another rate."""
        self._stop.reset_poll_interval()
        with self.timer.measure("evaluate"):
            yield
        self._stop.reset_poll_interval()

    def save(self, step: int) -> None:
        """Write a checkpoint of the state after `step` steps, or have it written in the background."""
        run_id = "" if self.tracker is None else self.tracker.run_id
        with self.timer.measure("save"):
            facts: dict[str, Any] = {"fingerprint": self.loader.fingerprint, "run_id": run_id, "encoder": self._encoder}
            self._checkpoints.save(step, self._state, **facts)

    def require_saved(self, step: int) -> None:
        """Write the checkpoint after this step unless it is complete. Raise UserError if that fails twice in a row."""
        with self.timer.measure("save"):
            self._checkpoints.wait()
        while self._checkpoints.saved_step != step:
            self.save(step)
            with self.timer.measure("save"):
                self._checkpoints.wait()

    def log(self, row: dict[str, float]) -> None:
        """Write a row of metrics; it has a `step`."""
        if self.tracker is not None:
            self.tracker.log(row)

    def log_step(self, row: dict[str, float]) -> None:
        """Complete a training step's row with spike, throughput and system load; write it and log the progress."""
        row["loss/spike"] = float(self._spikes.is_spike(row["loss/total"]))
        row |= self.timer.read(self.rank_batch.batch_size) | self.loader.read_stats() | system_metrics()
        if self.count_flops is not None and self._flops is None and is_main():
            with self.timer.measure("evaluate"):
                self._flops = self.count_flops()
        if self._flops is not None:
            rate = row["throughput/images_per_s"] / world_size()
            row |= self._flops.utilisation(rate, self.config.engine.precision)
        self._progress.log(row)
        self.log(row)
        self._checkpoints.raise_if_failed()

    def rows(self) -> list[dict[str, float]]:
        """Return all rows of metrics, those of earlier starts included."""
        return read_metrics(self.folder / "metrics.jsonl")

    def finish(self, num_steps: int, files: list[Path]) -> None:
        """End a complete run. files: what the tracker shall keep."""
        self._watchdog.stop()
        self._progress.close()
        if self.tracker is not None:
            self.tracker.finish(files)
        if is_main():
            run_dir.set_finished(self.config, num_steps, self._encoder)

    def fail(self) -> None:
        """Complete the save in the background and end the tracker's run as failed; the caller raises the error."""
        try:
            self._checkpoints.wait()
        except UserError as error:
            logger.warning("%s", error)
        self._progress.close()
        self._profiler.close()
        if self.tracker is not None:
            self.tracker.finish([], "FAILED", timeout_s=3)

    def _exit(self, reason: str, step: int) -> NoReturn:
        self._progress.close()
        self._profiler.close()
        if is_main():
            try:
                run_dir.set_stopped(self.config, reason, step)
            except OSError as error:
                logger.warning("%s cannot be written (%s)", run_dir.STOPPED, error.strerror)
        if self.tracker is not None:
            self.tracker.finish([], "KILLED", timeout_s=3)
        logger.info("%s: stopped after %d steps (%s). The same command resumes the run.", self.folder, step, reason)
        stop_process_group()
        raise SystemExit(EXIT_CODE)


class PeriodicEvaluation:
    """Calls evaluate(poll) -> metrics every `interval` steps, from step `first` on, and logs them.

    A measurement belongs to the steps before it; it is skipped if an earlier start of the run made it, and repeated
    if a signal interrupted it.
    """

    def __init__(self, run: Run, evaluate: Callable[[Callable[[], None]], dict[str, float]], interval: int, first: int):
        """interval: steps; 0: never."""
        self.run, self.evaluate, self.interval, self.first = run, evaluate, interval, first

    def maybe_run(self, step: int, last: bool = False) -> None:
        """Evaluate after `step` steps if they are due; always after the last one."""
        due = step >= self.first and self.interval and (last or step % self.interval == 0)
        if not due or step in self.run.evaluated_steps:
            return
        with self.run.evaluation():
            row = self.evaluate(partial(self.run.poll, step))
        if is_main():
            untrained = next((each for each in self.run.rows() if each["step"] == 0), {})
            logger.info("  ".join([f"step {step}", *(_with_baseline(*item, untrained) for item in row.items())]))
        self.run.log({"step": step, **row})


def _with_baseline(name: str, value: float, untrained: dict[str, float]) -> str:
    """Return a metric's name and value, and the untrained encoder's value where it was measured."""
    beside = f" (untrained {untrained[name]:.3g})" if name in untrained and not name.endswith(BASELINE_METRICS) else ""
    return f"{name} {value:.4g}{beside}"


class ManualGC(AbstractContextManager):
    """Within the context garbage is collected only at log steps: at the same step on all ranks, not at random."""

    def __init__(self, log_every: int):
        self.interval = min(log_every, GC_INTERVAL)

    def __enter__(self) -> "ManualGC":
        gc.freeze()  # what was built so far lives to the end: the collector need not traverse it
        gc.disable()
        return self

    def __exit__(self, *error: object) -> None:
        gc.unfreeze()
        gc.enable()

    def collect_if_due(self, step: int) -> None:
        """Collect garbage after `step` steps if it is time."""
        if step % self.interval == 0:
            gc.collect()


def is_due(interval: int, step: int, num_steps: int) -> bool:
    """Return whether something is due after `step` steps: every `interval` steps, and after the last."""
    return step % interval == 0 or step == num_steps
