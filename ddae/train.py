"""Pretraining, from a config to a finished run folder: build, resume, loop, show."""

import gc
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from ddae_kernels.implementation import choose

from ddae import ds_config, run_folder
from ddae.betas import Betas
from ddae.branches import Inputs
from ddae.checkpoint import Checkpoints
from ddae.config import Config, beta_names
from ddae.data.loader import Batch, Loader
from ddae.data.preview import Preview, preview_images
from ddae.data.reader import Part
from ddae.distributed import agree, barrier, device, from_main, is_main, rank, world_size
from ddae.dump import add_batches
from ddae.engine import Engine, start_process_group, stop_process_group
from ddae.errors import UserError
from ddae.masks import masked_distance, sample_mask
from ddae.meter import Clock, Meter, Spikes, print_progress
from ddae.method import Losses, build_method
from ddae.model.teacher import Teacher
from ddae.model.vit import Encoder
from ddae.patches import normalise
from ddae.report import NUM_IMAGES, show_run, summary
from ddae.schedules import ramp, teacher_momentum, warmup_cosine
from ddae.stopping import EXIT_CODE, Stop
from ddae.system import system_metrics
from ddae.tracker import Tracker, read_metrics, start_tracker
from ddae.watchdog import Watchdog
from ddae.weights import export_encoder

MOST_LOST = 3  # steps in a row whose gradients are no numbers, before the run ends
LISTED = 20  # samples that an error names


def pretrain(config: Config, stop: Stop | None = None) -> None:
    """Train to the end, or from the newest checkpoint on; then export the encoder and draw the report.

    SystemExit with code 75 where the run is told to stop before, through `stop`: the same command goes on.
    """
    stop = stop or Stop()
    resolved = ds_config.resolve(ds_config.load(config.ds_config), config, world_size())
    part = Part(config.data.batch_size, resolved.micro_batch, rank(), world_size())
    loader = Loader(config.data, config.model.image_size, config.train.seed, part, device())
    folder, steps = Path(config.folder), config.num_steps(loader.epoch_samples)
    run_folder.check(config)
    preview = preview_images(config.data, config.model.image_size, NUM_IMAGES)
    if run_folder.finished(config) >= steps:
        say(f"{folder} is complete: {steps} of {steps} steps\n{summary(config)}")
        return

    kernels = loss_kernels(config)
    start_process_group(config.train.hang_after + 60)  # the watchdog, which leaves stacks, comes first
    loader.settle(run_folder.backend_before(config))
    agree(backend=loader.backend, samples=loader.num_samples)
    run_folder.lock(config)
    watchdog = Watchdog(folder, config.train.hang_after)
    checkpoints = Checkpoints(folder / "checkpoints", config.train.keep, config.train.keep_every)
    newest = checkpoints.newest(config.allow_scratch)
    if newest is None:
        from_main(lambda: run_folder.check_history(config))
    engine = Engine(build_method(config), config.optim, resolved)
    teacher = build_teacher(config, engine)
    betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)
    saved = {} if newest is None else checkpoints.load(newest.path, engine, teacher, betas, loader.fingerprint)
    start = saved.get("step", 0)
    barrier()
    if is_main():
        run_folder.write(config, resolved.json, loader.backend)
        checkpoints.set_aside_beyond(start)
    params = config.to_dict() | {"loss_kernels": kernels}
    tracker = start_tracker(config.tracker, folder, start, params, saved.get("run_id", "")) if is_main() else None
    say(
        f"{config.preset}: steps {start} to {steps} of {config.data.batch_size} images on {world_size()} ranks "
        f"({part.accumulation} x {part.micro_batch} each), {loader.describe()}, "
        f"{config.engine.precision}, ZeRO {engine.stage}, loss kernels: {kernels}"
    )

    def save(step: int) -> bool:
        run_id = "" if tracker is None else tracker.run_id
        with clock.spending("save"):
            return checkpoints.save(step, engine, teacher, betas, fingerprint=loader.fingerprint, run_id=run_id)

    batches, meter, clock, spikes = loader.batches(start), Meter(engine.method), Clock(), Spikes(losses_before(folder))
    lost = 0  # steps in a row whose gradients were no numbers
    saved_step = start if newest is not None else None
    gc.freeze()  # what was built so far lives to the end: keep the collector from walking it
    for step in range(start, steps):
        watchdog.beat(step)
        if reason := stop.agreed(step):
            if saved_step != step:
                save(step)
            loader.close()
            leave(config, reason, step, tracker)
        now = schedules(config, step, steps, loader.epoch_samples)
        forward_one = partial(forward, config, engine, teacher, betas, now.ramp, 1 / part.accumulation, kernels)
        applied, kept = False, []
        meter.clear()
        for _ in range(part.accumulation):
            with clock.spending("data_wait"):
                batch = next(batches)
            losses = forward_one(batch)
            engine.backward(losses.total)
            applied = engine.update(now.lr)
            meter.add(losses)
            if lost:
                kept.append(batch)
        betas.step(now.lr, applied)
        lost = 0 if applied else lost + 1
        if lost:
            say(f"step {step + 1}: a gradient is no number, nothing is updated ({lost} in a row)")
        if lost == MOST_LOST:
            dump, facts = folder / "dumps" / f"step_{step:08d}", {"feature_weight": now.ramp}
            if Checkpoints(dump.parent, 2).save(step, engine, teacher, betas, **facts, share=1 / part.accumulation):
                add_batches(dump, config, engine.method, kept, loader.name_of, forward_one)
            end_lost(dump, lost, step, kept, loader, tracker)
        if teacher is not None and applied:
            teacher.follow(engine.encoder_fragments(), now.momentum)
        clock.count_step()

        done = step + 1
        if done % config.train.log_every == 0 or done in (1, steps):
            row = {"step": done, "epoch": now.epoch, **meter.read(betas), "lr": now.lr}
            row["loss/spike"] = float(spikes.is_one(row["loss/total"]))
            if teacher is not None:
                row |= {"teacher/momentum": now.momentum, "teacher/ramp": now.ramp}
            row |= clock.read(config.data.batch_size) | loader.read_stats() | system_metrics()
            betas.warn_if_held()
            print_progress(row, steps)
            if tracker is not None:
                tracker.log(row)
        if (done % config.train.save_every == 0 or done == steps) and save(done):
            saved_step = done

    watchdog.beat(steps)
    loader.close()
    finish(config, engine, betas, preview, tracker)
    watchdog.stop()
    if is_main():
        run_folder.set_finished(config, steps)
    say(f"{folder}: {steps} steps done\n{summary(config)}")


def loss_kernels(config: Config) -> str:
    """The implementation of the loss that serves this device; UserError where the one asked for cannot."""
    try:
        return choose(config.engine.kernels, device(), quiet=True)  # the run's first line says it
    except ValueError as error:
        raise UserError(f"--engine.kernels {config.engine.kernels}: {error}") from None


def forward(
    config: Config,
    engine: Engine,
    teacher: Teacher | None,
    betas: Betas,
    feature_weight: float,
    share: float,
    kernels: str,
    batch: Batch,
) -> Losses:
    """One micro-batch: masks and distances, the teacher's targets, the student's losses."""
    mask = sample_mask(config.mask.kind, batch.seeds, config.grid, config.num_masked).to(engine.device)
    distance = masked_distance(mask, config.grid, kernels)
    targets = None
    if teacher is not None:
        pixels = normalise(batch.images, config.data.normalisation, engine.dtype)
        with engine.autocast():
            targets = teacher.targets(pixels, config.feature.taps, mask.masked)
    betas.add_norm(distance)
    weight = torch.full((), feature_weight, device=engine.device)
    return engine(Inputs(batch.images, mask, distance, betas.used(), targets, weight, share, kernels))


def leave(config: Config, reason: str, step: int, tracker: Tracker | None) -> NoReturn:
    """End all ranks after `step` steps, with their checkpoint written."""
    if is_main():
        try:
            run_folder.set_stopped(config, reason, step)
        except OSError as error:
            print(f"{run_folder.STOPPED} cannot be written ({error.strerror})", flush=True)
    if tracker is not None:
        tracker.finish([], "KILLED", patience=3)
    say(f"{config.folder}: stopped after {step} steps ({reason}); the same command goes on")
    stop_process_group()
    raise SystemExit(EXIT_CODE)


def finish(config: Config, engine: Engine, betas: Betas, preview: Preview, tracker: Tracker | None) -> None:
    """Export the encoder and draw the report; all ranks call it, for the weights may be spread over them."""
    weights = engine.encoder_weights()
    if is_main():
        export_encoder(weights, config, Path(config.folder) / "encoder")
    files = show_run(config, engine.method, betas, preview) if config.train.report else []
    if tracker is not None:
        tracker.finish(files)


def build_teacher(config: Config, engine: Engine) -> Teacher | None:
    """The momentum encoder, equal to the student; None where no branch asks for it."""
    if not config.feature.enabled:
        return None
    encoder = Encoder(config.model).to(engine.device, engine.dtype)
    return Teacher(encoder, engine.encoder_fragments(), engine.sharded)


class Schedules(NamedTuple):
    """What the course of training sets for one step."""

    epoch: float
    lr: float
    momentum: float  # the teacher's
    ramp: float  # weight of the feature branch


def schedules(config: Config, step: int, steps: int, epoch_samples: int) -> Schedules:
    """The numbers of a step, counted from 0, of a run of so many; an epoch has so many samples."""
    epoch = step * config.data.batch_size / epoch_samples
    warmup_steps = config.optim.warmup_epochs * epoch_samples / config.data.batch_size
    momentum = config.teacher.momentum
    return Schedules(
        epoch,
        warmup_cosine(step, steps, warmup_steps, config.peak_lr, config.optim.min_lr),
        teacher_momentum(epoch, config.data.batch_size) if isinstance(momentum, str) else momentum,
        ramp(step, config.feature.ramp * steps),
    )


def end_lost(
    dump: Path, lost: int, step: int, batches: list[Batch], loader: Loader, tracker: Tracker | None
) -> NoReturn:
    """End all ranks after so many steps in a row without numbers, of which a dump is left: RuntimeError."""
    if tracker is not None:
        tracker.finish([], "FAILED", patience=3)
    names = [loader.name_of(sample) for batch in batches for sample in batch.samples.tolist()]
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    raise RuntimeError(
        f"the gradients of {lost} steps in a row were no numbers, up to step {step + 1}: python launch/replay.py "
        f"{dump} shows where they come from; then go on with a lower --optim.lr in another --run_dir, or without the "
        f"sample that is to blame. Samples of rank {rank()}: {', '.join(names[:LISTED])}{more}"
    )


def losses_before(folder: Path) -> list[float]:
    """Total losses of the rows that a resumed run has logged."""
    return [row["loss/total"] for row in read_metrics(folder / "metrics.jsonl")]


def say(text: str) -> None:
    """Print on one rank."""
    if is_main():
        print(text, flush=True)
