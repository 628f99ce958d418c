"""Pretraining, from a config to a finished run directory: build, resume, train, export, report."""

import logging
from functools import partial
from pathlib import Path

import torch

from ddae.config import deepspeed
from ddae.config.pretrain import PretrainConfig, beta_names
from ddae.data.preview import Preview, preview_images
from ddae.distributed.checkpoint_format import FrozenModule
from ddae.distributed.comm import device_memory, is_main, world_size
from ddae.distributed.engine import Engine
from ddae.distributed.failures import memory_reason
from ddae.distributed.preemption import StopSignal
from ddae.errors import RankError
from ddae.eval.online_knn import OnlineProbe
from ddae.export.encoder import export_encoder, newest_checkpoint
from ddae.method.betas import Betas
from ddae.method.model import build_model
from ddae.progress import clock
from ddae.report.html import NUM_IMAGES, summary, update_model_card, write_report
from ddae.training.collapse import collapse_risks
from ddae.training.duration import expected_seconds
from ddae.training.flops import count_model_flops
from ddae.training.gpu_memory import explain_memory
from ddae.training.initial import start_from, write_initial
from ddae.training.metrics import LossMeter
from ddae.training.nonfinite import NonFiniteGuard
from ddae.training.optimizer import build_optimizer
from ddae.training.run import ManualGC, PeriodicEvaluation, Run, is_due
from ddae.training.step import (
    ForwardPass,
    build_loader,
    build_targets,
    build_tokenizer,
    compile_modules,
    resolve_auto,
    resolve_loss_backend,
    schedules,
)

logger = logging.getLogger(__name__)


def pretrain(config: PretrainConfig, stop: StopSignal | None = None) -> None:
    """Train to the end, resuming from the newest checkpoint; then export the encoder and write the report.

    Raise UserError for a mistake of the user, RankError if the GPU is out of memory, NonFiniteError after several steps
    with non-finite gradients, and SystemExit with code 75 if a signal stops the run: the same command then resumes it.
    """
    resolved = deepspeed.resolve(deepspeed.load(config.ds_config), config, world_size())
    try:
        _pretrain(config, resolved, stop)
    except torch.OutOfMemoryError as error:
        plan = explain_memory(config, resolved.json, world_size(), resolved.micro_batch, device_memory())
        raise RankError(f"the GPU is out of memory ({memory_reason(error)}). {plan}") from None


def _pretrain(config: PretrainConfig, resolved: deepspeed.DeepSpeedJson, stop: StopSignal | None) -> None:
    # checks that need no other rank
    model_config = resolve_auto(config, resolved.json)
    run = Run(config, stop, resolved.json, resolved.micro_batch)
    loader = build_loader(config, run.rank_batch)
    num_steps = config.num_steps(loader.epoch_samples)
    preview = preview_images(config.data, config.model.image_size, NUM_IMAGES)
    probe = OnlineProbe(config.data, config.model.image_size) if config.probe_every else None
    if run.is_complete(num_steps):
        logger.info("%s is complete: %d of %d steps\n%s", run.folder, num_steps, num_steps, summary(config))
        return
    loss_backend = resolve_loss_backend(config)
    tokenizer = build_tokenizer(config) if config.token.enabled else None
    run.start(loader, tokenizer=None if tokenizer is None else FrozenModule("tokenizer", tokenizer).state_dict())

    # model, targets, resume
    model = build_model(model_config)
    if config.init and newest_checkpoint(run.folder) is None:
        initial = start_from(config, model.encoder)
        if is_main():
            write_initial(initial, config, run.folder)
    engine = Engine(model, build_optimizer(model, config.optim), run.ds_json, config.engine.gradient_reduction)
    targets = build_targets(config, engine, tokenizer)
    if config.engine.compile:
        compile_modules(engine.module, targets, graphs=config.engine.student_graphs)
    betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)
    forward = ForwardPass(config, engine, targets, betas, 1 / run.rank_batch.grad_accum_steps, loss_backend)
    state = {"engine": engine, "betas": betas, **targets.state}
    start = run.restore(state, loss_backend=loss_backend)
    run.describe(start, num_steps, f"{config.engine.precision}, ZeRO {engine.stage}, loss backend {loss_backend}")
    if is_main():
        with run.timer.measure("evaluate"):  # its time is not the first step's
            expected = expected_seconds(config, num_steps - start, run.rank_batch)
        logger.info("expected time: about %s, without evaluations", clock(expected))
        for risk in collapse_risks(config, num_steps):
            logger.warning("%s", risk)
    run.count_flops = partial(count_model_flops, config)

    def scheduled(step: int):
        return schedules(config, step, num_steps, loader.epoch_samples)

    guard = NonFiniteGuard(
        *(run, state, engine, num_steps),
        loss=lambda step, micro, batch: forward(batch, scheduled(step).feature_weight, step).total,
        facts=lambda step: {"feature_weight": scheduled(step).feature_weight, "share": forward.share},
    )
    evaluation = PeriodicEvaluation(
        run,
        lambda poll: probe.measure(engine, poll) if probe else {},
        interval=probe_interval(config, loader.epoch_samples),
        first=0,
    )
    meter = LossMeter(engine.module.metric_names())

    # training loop
    batches = loader.batches(start)
    with ManualGC(config.train.log_every) as collector:
        for step in range(start, num_steps):
            run.poll(step)
            evaluation.maybe_run(step)
            run.begin_step(step)
            now, done = scheduled(step), step + 1
            is_log_step = done == 1 or is_due(config.train.log_every, done, num_steps)
            meter.reset()
            for _ in range(run.rank_batch.grad_accum_steps):
                with run.timer.measure("data_wait"):
                    batch = next(batches)
                losses = forward(batch, now.feature_weight, step, is_log_step)
                engine.backward(losses.total)
                applied = engine.step(now.lr)
                meter.add(losses.total, losses.metrics())
                guard.hold(step, batch)
            betas.step(now.lr, applied)
            targets.update(now.momentum, applied)
            run.step_done(step)
            guard.check(step, applied)

            if is_log_step:
                row = {"step": done, "epoch": now.epoch, **meter.read(betas), "lr": now.lr}
                row |= {"grad/norm": engine.grad_norm(), **forward.metrics(now, row)}
                betas.warn_if_clamped()
                run.log_step(row)
            if is_due(config.train.save_every, done, num_steps):
                run.save(done)
            collector.collect_if_due(done)
    run.require_saved(num_steps)
    evaluation.maybe_run(num_steps, last=True)
    loader.close()
    run.heartbeat(num_steps)
    run.finish(num_steps, export_and_report(config, engine, betas, preview))
    logger.info("%s: %d steps done\n%s", run.folder, num_steps, summary(config))


def probe_interval(config: PretrainConfig, epoch_samples: int) -> int:
    """Return the steps between two evaluations by k-NN; 0: none."""
    if not config.probe_every:
        return 0
    return max(1, round(config.probe_every * epoch_samples / config.data.batch_size))


def export_and_report(config: PretrainConfig, engine: Engine, betas: Betas, preview: Preview) -> list[Path]:
    """Export the encoder and write the report; all ranks call it, for the weights may be sharded.

    Return the files that the tracker shall keep.
    """
    weights = engine.weights(engine.module.encoder)
    if is_main():
        export_encoder(weights, config, Path(config.folder) / "encoder")
        update_model_card(Path(config.folder))
    return write_report(config, engine.module, betas, preview) if config.train.report else []
