"""The training loop of supervised tasks: fine-tuning, linear probes, segmentation, tokenizers.

A task defines the module, the loss and the evaluation. The loop resumes, stops, logs, saves and handles non-finite
gradients as pretraining's does (train.py).
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ddae.data.loader import Batch, Loader
from ddae.data.rng import fold
from ddae.data.shards import Shards
from ddae.distributed.checkpoint_format import Checkpointable
from ddae.distributed.comm import is_main, rank
from ddae.report.html import report_page
from ddae.training.metrics import LossMeter
from ddae.training.nonfinite import NonFiniteGuard
from ddae.training.optimizer import Optimizable
from ddae.training.run import ManualGC, PeriodicEvaluation, Run, is_due

logger = logging.getLogger(__name__)


class ValidationSet(Protocol):
    """Validation images."""

    @property
    def shards(self) -> Shards: ...


class Task(Protocol):
    """What is trained and evaluated."""

    @property
    def optimizable(self) -> Optimizable: ...

    @property
    def val(self) -> ValidationSet: ...

    schedule: Callable[[int, int, float, float, float], float]  # of the learning rate, see training/schedules.py
    description: str  # of the training, for the log
    evaluate_every: float  # epochs
    parent: str  # MLflow run of the pretraining, "" if there is none
    encoder_hash: str  # of the weights that are evaluated, "" if the task evaluates none

    def build(self, ds_json: dict[str, Any]) -> dict[str, Checkpointable]:
        """Build the optimizable, once the ranks have joined. Return what a checkpoint holds."""
        ...

    def loss(self, batch: Batch, seed: int) -> Tensor:
        """Return the mean loss [] of a micro-batch. All its random numbers are drawn from the seed."""
        ...

    def after_step(self, applied: Tensor) -> None:
        """Update what follows the weights; applied: float32 [], 0 if the step was skipped."""

    def evaluate(self, poll: Callable[[], None]) -> dict[str, float]:
        """Return metrics over all ranks. Calls poll() regularly, which may end the run."""
        ...

    def finish(self, run: Run, heartbeat: Callable[[], None]) -> list[Path]:
        """Write the results. Return the files that the tracker shall keep. Calls heartbeat() regularly."""
        ...

    def summary(self) -> str:
        """Return the results as text, and where the trained weights are."""
        ...


def fit(task: Task, run: Run, loader: Loader) -> None:
    """Train to the end, resuming from the newest checkpoint; report a complete run as such.

    Raise NonFiniteError after several steps with non-finite gradients, and SystemExit with code 75 if a signal stops
    the run: the same command then resumes it.
    """
    config, batch_size, epoch_samples = run.config, run.config.data.batch_size, loader.epoch_samples
    num_steps = config.num_steps(epoch_samples)
    run.bind(task.encoder_hash)
    if run.is_complete(num_steps):
        log_summary(task, run, num_steps)
        return
    run.start(loader, validation=task.val.shards.fingerprint)
    state = task.build(run.ds_json)
    start = run.restore(state, task.parent)
    run.describe(start, num_steps, task.description)
    optimizable, meter, accumulation = task.optimizable, LossMeter(), run.rank_batch.grad_accum_steps
    warmup_steps = config.optim.warmup_epochs * epoch_samples / batch_size
    evaluate_every = max(1, round(task.evaluate_every * epoch_samples / batch_size))

    def compute_loss(step: int, micro: int, batch: Batch) -> Tensor:
        return task.loss(batch, int(fold(config.train.seed, step, micro, rank()))) / accumulation

    guard = NonFiniteGuard(run, state, optimizable, num_steps, compute_loss, facts=lambda step: {})
    evaluation = PeriodicEvaluation(run, task.evaluate, evaluate_every, first=1)

    batches = loader.batches(start)
    with ManualGC(config.train.log_every) as collector:
        for step in range(start, num_steps):
            run.poll(step)
            evaluation.maybe_run(step)
            run.begin_step(step)
            lr = task.schedule(step, num_steps, warmup_steps, config.peak_lr, config.optim.min_lr)
            meter.reset()
            for micro in range(accumulation):
                with run.timer.measure("data_wait"):
                    batch = next(batches)
                loss = compute_loss(step, micro, batch)
                optimizable.backward(loss)
                applied = optimizable.step(lr)
                meter.add(loss)
                guard.hold(step, batch)
            task.after_step(applied)
            run.step_done(step)
            guard.check(step, applied)

            done = step + 1
            if done == 1 or is_due(config.train.log_every, done, num_steps):
                row = {"step": done, "epoch": step * batch_size / epoch_samples, **meter.read(), "lr": lr}
                run.log_step(row)
            if is_due(config.train.save_every, done, num_steps):
                run.save(done)
            collector.collect_if_due(done)
    run.require_saved(num_steps)
    evaluation.maybe_run(num_steps, last=True)
    loader.close()
    run.heartbeat(num_steps)
    run.finish(num_steps, task.finish(run, lambda: run.heartbeat(num_steps)))
    log_summary(task, run, num_steps)


def log_summary(task: Task, run: Run, num_steps: int) -> None:
    """Log that the run is complete, and its results."""
    if not is_main():
        return
    lines = [f"{run.folder} is complete: {num_steps} of {num_steps} steps", task.summary()]
    if run.config.train.report:
        lines.append(f"figures and curves:   {report_page(run.folder)}")
    logger.info("\n".join(lines))
