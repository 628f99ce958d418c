"""Pretraining, from a config to a finished run folder: build, resume, loop, show."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

from ddae.config import deepspeed as ds_config
from ddae.config.pretrain import Config, beta_names
from ddae.data.loader import Batch, Loader
from ddae.data.preview import Preview, preview_images
from ddae.data.reader import Part
from ddae.distributed.checkpoint import Checkpoints
from ddae.distributed.checkpoint_format import Saved, Unchanged
from ddae.distributed.comm import agree, device, is_main, rank, say, world_size
from ddae.distributed.engine import Engine, start_process_group
from ddae.distributed.preemption import Stop
from ddae.eval.online_knn import OnlineProbe
from ddae.export.encoder import export_encoder
from ddae.method.betas import Betas
from ddae.method.model import build_method
from ddae.method.teacher import Teacher
from ddae.report.figures import BASELINES
from ddae.report.html import NUM_IMAGES, show_run, summary, update_card
from ddae.training import run_dir
from ddae.training.flops import rates
from ddae.training.metrics import Meter, Spikes, print_progress, system_metrics
from ddae.training.nonfinite import Outcomes, add_batches
from ddae.training.optimizer import build_optimizer
from ddae.training.run import Session
from ddae.training.step import (
    build_teacher,
    build_tokenizer,
    compile_parts,
    forward,
    loss_kernels,
    mask_drawer,
    schedules,
    settle,
)

COLLECTED = 100  # most steps between two looks for garbage
MOST_LOST = 3  # steps in a row whose gradients are no numbers, before the run ends
LISTED = 20  # samples that an error names


@contextmanager
def _collector_afterwards() -> Iterator[None]:
    """Whatever happens, the garbage collector runs by itself again in the end."""
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


@_collector_afterwards()
def pretrain(config: Config, stop: Stop | None = None) -> None:
    """Train to the end, or from the newest checkpoint on; then export the encoder and draw the report.

    SystemExit with code 75 where the run is told to stop before, through `stop`: the same command goes on.
    """
    stop = stop or Stop()
    resolved = ds_config.resolve(ds_config.load(config.ds_config), config, world_size())
    settled = settle(config, resolved.json)
    part = Part(config.data.batch_size, resolved.micro_batch, rank(), world_size())
    loader = Loader(config.data, config.model.image_size, config.train.seed, part, device(), None, mask_drawer(config))
    folder, steps = Path(config.folder), config.num_steps(loader.epoch_samples)
    run_dir.check(config)
    preview = preview_images(config.data, config.model.image_size, NUM_IMAGES)
    probe = OnlineProbe(config.data, config.model.image_size) if config.probe_every else None
    probe_steps = max(1, round(config.probe_every * loader.epoch_samples / config.data.batch_size))
    if run_dir.finished(config) >= steps:
        say(f"{folder} is complete: {steps} of {steps} steps\n{summary(config)}")
        return

    kernels, tokenizer = loss_kernels(config), build_tokenizer(config) if config.token.enabled else None
    start_process_group(config.train.hang_after + 60)  # the watchdog, which leaves stacks, comes first
    loader.settle(run_dir.backend_before(config))
    if tokenizer is not None:
        agree(tokenizer=Unchanged("tokenizer", tokenizer).note())
    session = Session(config, loader, stop)
    method = build_method(settled)
    engine = Engine(method, build_optimizer(method, config.optim), resolved.json)
    teacher = build_teacher(config, engine) if tokenizer is None else tokenizer.to(engine.device)
    if config.engine.compile:
        compile_parts(engine.module, teacher)
    betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)
    parts: dict[str, Saved] = {"engine": engine, "betas": betas}
    if isinstance(teacher, Teacher):
        parts["teacher"] = teacher
    elif teacher is not None:
        parts["tokenizer"] = Unchanged("tokenizer", teacher)
    start = session.restore(parts, resolved.json, loss_kernels=kernels)
    say(
        f"{config.preset}: steps {start} to {steps} of {config.data.batch_size} images on {world_size()} ranks "
        f"({part.accumulation} x {part.micro_batch} each), {loader.describe()}, "
        f"{config.engine.precision}, ZeRO {engine.stage}, loss kernels: {kernels}"
    )

    batches, meter, clock = loader.batches(start), Meter(engine.module), session.clock
    spikes = Spikes(row["loss/total"] for row in session.rows() if "loss/total" in row)
    outcomes, lost = Outcomes(), 0  # steps in a row whose gradients were no numbers
    kept: dict[int, list[Batch]] = {}  # by step, while some are lost
    gc.freeze()  # what was built so far lives to the end: keep the collector from walking it
    gc.disable()  # from here on it runs at log steps, on all ranks at once
    for step in range(start, steps):
        session.look_around(step)
        if probe is not None and step % probe_steps == 0:
            measure(probe, engine, session, step)
        now = schedules(config, step, steps, loader.epoch_samples)
        forward_one = partial(forward, config, engine, teacher, betas, now.ramp, 1 / part.accumulation, kernels)
        kept = {before: some for before, some in kept.items() if lost and before >= step - 1} | {step: []}
        meter.clear()
        for _ in range(part.accumulation):
            with clock.spending("data_wait"):
                batch = next(batches)
            losses = forward_one(batch)
            engine.backward(losses.total)
            applied = engine.update(now.lr)
            meter.add(losses)
            if lost:
                kept[step].append(batch)
        betas.step(now.lr, applied)
        if isinstance(teacher, Teacher):
            teacher.follow(now.momentum, applied)
        clock.count_step()

        done = step + 1
        if config.engine.compile and step == start:
            say(f"compiled: the first step took {clock.seconds():.0f} s")
        outcomes.add(step, applied)
        # With one step left to go until the run ends, no further one is made on top of what may be dumped.
        for number, good in outcomes.known(lambda: done == steps or lost == MOST_LOST - 1):  # noqa: B023 - at once
            lost = 0 if good else lost + 1
            if lost:
                say(f"step {number + 1}: a gradient is no number, nothing is updated ({lost} in a row)")
            if lost == MOST_LOST:
                weight = schedules(config, number, steps, loader.epoch_samples).ramp
                dump, facts = folder / "dumps" / f"step_{number:08d}", {"feature_weight": weight}
                if Checkpoints(dump.parent, 2).save(number, parts, **facts, share=1 / part.accumulation):
                    add_batches(dump, config, engine.module, kept[number], loader.name_of, forward_one)
                session.fail()
                end_lost(dump, lost, number, kept[number], loader)
        if done % config.train.log_every == 0 or done in (1, steps):
            row = {"step": done, "epoch": now.epoch, **meter.read(betas), "lr": now.lr}
            row["grad/norm"] = engine.grad_norm()
            row["loss/spike"] = float(spikes.is_one(row["loss/total"]))
            if isinstance(teacher, Teacher):
                row |= {"teacher/momentum": now.momentum, "teacher/ramp": now.ramp}
            row |= clock.read(config.data.batch_size) | loader.read_stats() | system_metrics()
            row |= rates(config, row["rate/images_per_s"] / world_size())
            betas.warn_if_held()
            print_progress(row, steps)
            session.log(row)
        if done % min(config.train.log_every, COLLECTED) == 0:
            gc.collect()
        if done % config.train.save_every == 0 or done == steps:
            session.save(done)

    if probe is not None:
        measure(probe, engine, session, steps)
    loader.close()
    session.look_alive(steps)
    session.finish(steps, finish(config, engine, betas, preview))
    say(f"{folder}: {steps} steps done\n{summary(config)}")


def measure(probe: OnlineProbe, engine: Engine, session: Session, step: int) -> None:
    """Log what the encoder knows after `step` steps, unless an earlier start of the run has."""
    if step in session.measured:
        return
    with session.evaluating():
        row = probe.measure(engine, partial(session.look_around, step))
    first = next((row for row in session.rows() if row["step"] == 0), {})
    words = [f"{name} {value:.3g}{_beside(first.get(name), name)}" for name, value in row.items()]
    say("  ".join([f"step {step}", *words]))
    session.log({"step": step, **row})


def _beside(untrained: float | None, name: str) -> str:
    """What the untrained encoder gave, behind what a trained one gives."""
    return "" if untrained is None or name.endswith(BASELINES) else f" (untrained {untrained:.3g})"


def finish(config: Config, engine: Engine, betas: Betas, preview: Preview) -> list[Path]:
    """Export the encoder and draw the report; all ranks call it, for the weights may be spread over them. The files
    that people may want to look at."""
    weights = engine.weights(engine.module.encoder)
    if is_main():
        export_encoder(weights, config, Path(config.folder) / "encoder")
        update_card(Path(config.folder))
    return show_run(config, engine.module, betas, preview) if config.train.report else []


def end_lost(dump: Path, lost: int, step: int, batches: list[Batch], loader: Loader) -> NoReturn:
    """End all ranks after so many steps in a row without numbers, of which a dump is left: RuntimeError."""
    names = [loader.name_of(sample) for batch in batches for sample in batch.samples.tolist()]
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    raise RuntimeError(
        f"the gradients of {lost} steps in a row were no numbers, up to step {step + 1}: python launch/replay.py "
        f"{dump} shows where they come from; then go on with a lower --optim.lr in another --run_dir, or without the "
        f"sample that is to blame. Samples of rank {rank()}: {', '.join(names[:LISTED])}{more}"
    )
