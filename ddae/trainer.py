"""Training on top of an encoder, whatever for: the loop that fine-tuning and segmentation share.

A task says what is learnt, how a batch becomes a loss, and what is measured; the loop resumes, stops, saves and logs as
pretraining's does. An evaluation belongs to the steps before it, and is done again where a stop broke it off.
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ddae.config.base import Experiment
from ddae.data.loader import Batch, Loader
from ddae.data.reader import Part
from ddae.data.rng import fold
from ddae.data.shards import Shards
from ddae.distributed.checkpoint_format import Saved
from ddae.distributed.comm import agree, is_main, mean_over_ranks, rank, say, world_size
from ddae.distributed.engine import start_process_group
from ddae.distributed.preemption import Stop
from ddae.errors import UserError
from ddae.report.html import page_of
from ddae.training import run_dir
from ddae.training.metrics import Spikes, print_progress, system_metrics
from ddae.training.run import Session

MOST_LOST = 3  # steps in a row whose gradients are no numbers, before the run ends


class Learner(Protocol):
    """What has weights and updates them: an Engine, or something smaller."""

    @property
    def device(self) -> torch.device: ...

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch, whose loss is a share of the step's."""

    def update(self, lr: float) -> bool | Tensor:
        """End a micro-batch; after a step's last one update the weights. Whether they were updated, true or not 0."""
        ...


class Held(Protocol):
    """Validation images."""

    @property
    def shards(self) -> Shards: ...


class Task(Protocol):
    """What is trained and measured."""

    @property
    def learner(self) -> Learner: ...

    @property
    def val(self) -> Held: ...

    schedule: Callable[[int, int, float, float, float], float]  # of schedules.py: how the learning rate changes
    about: str  # how it is trained, in words
    evaluate_every: float  # epochs
    parent: str  # MLflow's run of the pretraining; empty where there is none

    def build(self, ds_json: dict[str, Any]) -> dict[str, Saved]:
        """Have a learner, once the ranks have met; what a checkpoint is to hold."""
        ...

    def loss(self, batch: Batch, seed: int) -> Tensor:
        """The mean loss of a micro-batch. Everything random in it is drawn from the seed."""
        ...

    def updated(self) -> None:
        """The weights have just changed."""

    def evaluate(self, look_around: Callable[[], None]) -> dict[str, float]:
        """Metrics of all ranks together; calls look_around now and then, and may be broken off there."""
        ...

    def finish(self, session: Session, look_alive: Callable[[], None]) -> list[Path]:
        """Write the results; the files that people may want to look at. Calls look_alive now and then."""
        ...

    def summary(self) -> str:
        """The results in words, and where what was trained is."""
        ...


def fit(task: Task, config: Experiment, loader: Loader, stop: Stop, ds_json: dict[str, Any], part: Part) -> None:
    """Train to the end, or from the newest checkpoint on; a run that is complete is told as such.

    SystemExit with code 75 where the run is told to stop before, through `stop`: the same command goes on.
    """
    steps = config.num_steps(loader.epoch_samples)
    if run_dir.finished(config) >= steps:
        conclude(task, config, steps)
        return
    start_process_group(config.train.hang_after + 60)
    loader.settle(run_dir.backend_before(config))
    agree(validation=task.val.shards.fingerprint)
    session = Session(config, loader, stop)
    start = session.restore(task.build(ds_json), ds_json, task.parent)
    say(
        f"{config.folder}: steps {start} to {steps} of {config.data.batch_size} images on {world_size()} ranks "
        f"({part.accumulation} x {part.micro_batch} each), {loader.describe()}, {task.about}"
    )
    learner, clock, batches = task.learner, session.clock, loader.batches(start)
    spikes, lost = Spikes(row["loss/total"] for row in session.rows() if "loss/total" in row), 0
    evaluate_steps = max(1, round(task.evaluate_every * loader.epoch_samples / config.data.batch_size))
    warmup_steps = config.optim.warmup_epochs * loader.epoch_samples / config.data.batch_size
    gc.freeze()  # what was built so far lives to the end: keep the collector from walking it

    def evaluate(step: int) -> None:
        if step in session.measured:
            return
        with session.evaluating():
            row = {"step": step, **task.evaluate(lambda: session.look_around(step))}
        say(
            "  ".join(
                [f"step {step}/{steps}", *(f"{name} {value:.4g}" for name, value in row.items() if name != "step")]
            )
        )
        session.log(row)

    for step in range(start, steps):
        session.look_around(step)
        if step and step % evaluate_steps == 0:
            evaluate(step)
        lr = task.schedule(step, steps, warmup_steps, config.peak_lr, config.optim.min_lr)
        total, applied = torch.zeros((), device=learner.device), False
        for micro in range(part.accumulation):
            with clock.spending("data_wait"):
                batch = next(batches)
            loss = task.loss(batch, int(fold(config.train.seed, step, micro, rank())))
            learner.backward(loss / part.accumulation)
            applied = learner.update(lr)
            total += loss.detach().float() / part.accumulation
        applied = bool(applied)
        lost = 0 if applied else lost + 1
        if lost:
            say(f"step {step + 1}: a gradient is no number, nothing is updated ({lost} in a row)")
        if lost == MOST_LOST:
            session.fail()
            raise UserError(f"the gradients of {lost} steps in a row were no numbers: choose a lower --optim.lr")
        if applied:
            task.updated()
        clock.count_step()
        done = step + 1
        if done % config.train.log_every == 0 or done in (1, steps):
            row = {"step": done, "epoch": step * config.data.batch_size / loader.epoch_samples}
            row |= {"loss/total": float(mean_over_ranks(total)), "lr": lr}
            row["loss/spike"] = float(spikes.is_one(row["loss/total"]))
            row |= clock.read(config.data.batch_size) | loader.read_stats() | system_metrics()
            print_progress(row, steps)
            session.log(row)
        if done % config.train.save_every == 0 or done == steps:
            session.save(done)
    evaluate(steps)
    loader.close()
    session.look_alive(steps)
    session.finish(steps, task.finish(session, lambda: session.look_alive(steps)))
    conclude(task, config, steps)


def conclude(task: Task, config: Experiment, steps: int) -> None:
    """Say that nothing is left to do, and what came out."""
    if is_main():
        said = [f"{config.folder} is complete: {steps} of {steps} steps", task.summary()]
        if config.train.report:
            said.append(f"pictures and curves:  {page_of(Path(config.folder))}")
        say("\n".join(said))
