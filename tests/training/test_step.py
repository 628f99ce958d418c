"""The training step gives the losses and gradients of naive.py with every setting, at the expected FLOPs."""

import json
from contextlib import nullcontext

import pytest
import ranks
import torch
from memory import batch_of

import ddae.training.step
from ddae.config.cli import parse
from ddae.config.pretrain import beta_names
from ddae.data.masking import sample_mask
from ddae.distributed.checkpoint_format import TensorShard
from ddae.distributed.comm import device
from ddae.errors import UserError
from ddae.method.betas import Betas
from ddae.method.distance import masked_distance
from ddae.method.model import build_model
from ddae.method.naive import NaiveEncoder, NaiveMethod, to_pixels
from ddae.method.teacher import Teacher
from ddae.models.vit import Encoder, initialise
from ddae.tools.bench_step import variants
from ddae.tools.bench_worker import measure_flops
from ddae.tools.replay import EagerEngine
from ddae.training.flops import count_flops, decoder_branches
from ddae.training.nonfinite import MAX_SKIPPED_STEPS, NonFiniteError, NonFiniteGuard
from ddae.training.step import (
    ForwardPass,
    Targets,
    TeacherTargets,
    compile_modules,
    configure_teacher,
    resolve_auto,
    schedules,
)

DDAE = [
    "--preset",
    "demo",
    "--pixel.norm",
    "per_channel",
    "--pixel.decoder_depth",
    "2",
]  # a pixel decoder of two blocks
MAE = "--preset mae_vit_s16_100e --model.width 48 --model.heads 3 --model.depth 4 --model.image_size 64".split()
MAE += "--model.patch_size 8 --pixel.taps 4 --pixel.decoder_width 32 --pixel.decoder_heads 2".split()
DS_MAE = "--preset ds_mae_vit_s16_100e --model.width 48 --model.heads 3 --model.image_size 64".split()
DS_MAE += "--model.patch_size 8 --pixel.decoder_depth 3 --pixel.decoder_width 32 --pixel.decoder_heads 2".split()
SETTINGS = {
    "one batch": ["--engine.no_skip_unused_tokens", "--engine.tap_execution", "batched"],
    "shortcuts": ["--engine.tap_execution", "batched"],
    "modules": ["--engine.tap_execution", "batched", "--engine.no_direct_calls"],
    "tap by tap": ["--engine.tap_execution", "sequential"],
    "recomputed": ["--engine.tap_execution", "batched", "--engine.decoder_activation_checkpointing"],
    "all of it": ["--engine.tap_execution", "sequential", "--engine.activation_checkpointing"],
}


def shards_of(encoder):
    """Return the encoder's weights as Engine.masters() does without sharding."""
    return [TensorShard(name, 0, values.detach().flatten()) for name, values in encoder.named_parameters()]


def teacher_of(encoder, config, dtype=torch.float32):
    """Return a teacher equal to the encoder, with the config's settings."""
    teacher = Teacher(Encoder(config.model).to(device(), dtype), shards_of(encoder), sharded=False)
    configure_teacher(teacher, config)
    return teacher


def naive_and_step(args, settings, precision, compiled=False):
    """Return (loss, gradients by name, gradient of the betas) of naive.py, and of the step with these settings."""
    config = parse([*args, *settings, "--engine.precision", precision, "--engine.loss_backend", "reference"])
    torch.manual_seed(0)
    engine, batch = EagerEngine(build_model(config), precision), batch_of(config, 3)
    batch = batch._replace(images=batch.images.to(device()))
    naive, encoder = NaiveMethod(config), Encoder(config.model)
    naive.load_state_dict(engine.module.state_dict())
    naive = naive.to(device(), engine.dtype)
    for parameter in encoder.parameters():  # a teacher that differs from the student
        torch.nn.init.normal_(parameter, std=0.05)
    state = {name: values.clone() for name, values in encoder.state_dict().items()}
    targets = Targets()
    if config.feature.enabled:
        targets = TeacherTargets(config, engine, teacher_of(encoder.to(device()), config, engine.dtype))
    if compiled:
        compile_modules(engine.module, targets)
    betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)
    losses = ForwardPass(config, engine, targets, betas, 1.0, "reference")(batch, 0.7)
    losses.total.backward()
    gradients = {name: values.grad for name, values in engine.module.named_parameters()}
    mask = sample_mask(config.mask.kind, batch.seeds, config.grid, config.num_masked).to(device())
    distance, values = masked_distance(mask, config.grid), betas.values.detach().clone().requires_grad_()
    tokens = None
    if config.feature.enabled:
        naive_teacher = NaiveEncoder(config)
        naive_teacher.load_state_dict(state)
        with torch.no_grad(), engine.autocast():
            pixels = to_pixels(batch.images, config.data.normalisation)
            tokens = naive_teacher.to(device(), engine.dtype)(pixels.to(engine.dtype))
    with engine.autocast():
        naive_loss = naive(batch.images, mask.visible, mask.masked, distance, values, tokens, 0.7)
    naive_loss.backward()
    naive_gradients = {name: parameter.grad for name, parameter in naive.named_parameters()}
    return (naive_loss, naive_gradients, values.grad), (losses.total, gradients, betas.values.grad)


def assert_equals_naive(args, settings, precision, loss_rtol, gradient_rtol, compiled=False):
    """Compare the loss, and the norm of the gradients' differences with the norm of the gradients."""
    expected, (loss, gradients, beta_gradient) = naive_and_step(args, settings, precision, compiled)
    expected_loss, expected_gradients, expected_beta_gradient = expected
    assert abs(float(loss.detach() - expected_loss.detach())) <= loss_rtol * abs(float(expected_loss.detach()))
    assert gradients.keys() == expected_gradients.keys()
    norms = {name: float(values.norm()) for name, values in expected_gradients.items()}
    total_norm = sum(norm**2 for norm in norms.values()) ** 0.5
    errors = {name: float((gradients[name] - values).norm()) for name, values in expected_gradients.items()}
    assert sum(error**2 for error in errors.values()) ** 0.5 <= gradient_rtol * total_norm
    if precision == "bf16":  # a CPU accumulates the gradients of norm layers in bf16: their error grows with the rows
        return
    for name, error in errors.items():  # the rounding of large gradients dominates small ones
        assert error <= gradient_rtol * max(norms[name], 0.1 * total_norm), (name, error / norms[name])
    if expected_beta_gradient is not None:
        largest = expected_beta_gradient.abs().max().clamp(min=1e-12)
        assert (beta_gradient - expected_beta_gradient).abs().max() / largest < max(gradient_rtol, 1e-5)


@pytest.mark.parametrize("args", [DDAE, MAE, DS_MAE], ids=["ddae", "mae", "ds_mae"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_each_setting_equals_the_naive_step(args, setting):
    assert_equals_naive(args, SETTINGS[setting], "fp32", 1e-6, 2e-6)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_each_setting_is_close_to_the_naive_step_in_bf16(setting, precision):
    """bf16 rounds to eight bits. Tolerances: 3 % of the gradients' norm, 0.5 % of the loss."""
    assert_equals_naive(DDAE, SETTINGS[setting], precision, 5e-3, 3e-2)


@pytest.mark.faults
@pytest.mark.parametrize("taps", ["batched", "sequential"])
def test_compiled_equals_the_naive_step(taps):
    assert_equals_naive(DDAE, ["--engine.tap_execution", taps], "fp32", 1e-6, 2e-6, compiled=True)


CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
GPU_ONLY = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@CPU_ONLY
@pytest.mark.parametrize(
    "name, gigaflop",
    [
        ("ddae_vit_s16_100e", 68.6),
        pytest.param("ddae_vit_b16_100e", 168.3, marks=pytest.mark.slow),
        pytest.param("ddae_vit_l16_100e", 377.8, marks=pytest.mark.faults),  # 6 GB of memory
        ("mae_vit_s16_100e", 39.0),
    ],
)
def test_measured_flops(name, gigaflop):
    """naive.py has the expected FLOPs within 2 %, the step those of count_flops() within 0.5 %."""
    measured, images = {}, 1
    for kind in ("naive", "optimised"):
        config = parse(["--preset", name, "--engine.precision", "fp32", "--engine.tap_execution", "batched"])
        batch = batch_of(config, images)
        mask = sample_mask(config.mask.kind, batch.seeds, config.grid, config.num_masked)
        distance, values = masked_distance(mask, config.grid), torch.full((4,), -0.5, requires_grad=True)
        if kind == "naive":
            model, teacher = NaiveMethod(config), NaiveEncoder(config)

            def step(model=model, teacher=teacher, batch=batch, mask=mask, distance=distance, values=values):
                tokens = None
                if name.startswith("ddae"):
                    with torch.no_grad():
                        tokens = teacher(to_pixels(batch.images, "half"))
                model(batch.images, mask.visible, mask.masked, distance, values, tokens, 1.0).backward()
        else:
            engine = EagerEngine(build_model(config), "fp32")
            targets = Targets()
            if config.feature.enabled:
                targets = TeacherTargets(config, engine, teacher_of(engine.module.encoder, config))
            betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)
            forward = ForwardPass(config, engine, targets, betas, 1.0, "reference")

            def step(forward=forward, batch=batch):
                forward(batch, 1.0).total.backward()

        measured[kind] = measure_flops(step) / images / 1e9
    assert measured["naive"] == pytest.approx(gigaflop, rel=0.02)
    # Once a step, independent of the batch size: queries, keys and values of 196 mask tokens.
    per_step = sum(3 * 6 * 196 * branch.decoder_width**2 for branch in decoder_branches(config)) / images
    assert measured["optimised"] == pytest.approx((count_flops(config).total + per_step) / 1e9, rel=0.005)
    savings = {
        "ddae_vit_s16_100e": 0.15,
        "ddae_vit_b16_100e": 0.125,
        "ddae_vit_l16_100e": 0.085,
        "mae_vit_s16_100e": 0.04,
    }
    assert 1 - (measured["optimised"] - per_step / 1e9) / measured["naive"] >= savings[name]


@pytest.mark.parametrize("taps", ["batched", "sequential"])
def test_targets_are_read_after_their_event(taps):
    """Targets that are NaN until their event is waited for give the same losses as complete ones."""
    config = parse([*DDAE, "--engine.tap_execution", taps, "--engine.precision", "fp32"])
    losses = []
    for late in (False, True):
        torch.manual_seed(0)
        engine, batch = EagerEngine(build_model(config), "fp32"), batch_of(config, 3)
        batch = batch._replace(images=batch.images.to(engine.device))
        teacher = teacher_of(engine.module.encoder, config)
        betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)
        if late:
            teacher.start_targets = lambda *inputs, targets=teacher.targets: LateEvent.delay(targets(*inputs))
        targets = TeacherTargets(config, engine, teacher)
        losses.append(ForwardPass(config, engine, targets, betas, 1.0, "reference")(batch, 0.7).total)
    assert losses[0].isfinite()
    assert torch.equal(*losses)


class LateEvent:
    """Stands in for a CUDA event: the targets are complete only after wait()."""

    @classmethod
    def delay(cls, tokens):
        event = cls()
        event.targets, event.tokens = torch.full_like(tokens, torch.nan), tokens
        return event.targets, event

    def wait(self):
        self.targets.copy_(self.tokens)


@GPU_ONLY
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_with_a_teacher_stream_equal_those_without(precision, compiled):
    """The teacher runs late, and its weights are updated directly after each step."""
    totals = {"one stream": [], "two streams": []}
    for name, losses_of_steps in totals.items():
        args = ["--engine.teacher_stream"] if name == "two streams" else []
        config = parse([*DDAE, "--engine.tap_execution", "batched", "--engine.precision", precision, *args])
        torch.manual_seed(0)
        engine, student = EagerEngine(build_model(config), precision), Encoder(config.model).to(device())
        initialise(student, torch.Generator(device()).manual_seed(0))
        teacher = teacher_of(student, config, engine.dtype)
        targets = TeacherTargets(config, engine, teacher)
        if compiled:
            compile_modules(engine.module, targets)
        betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)

        def delayed_targets(*inputs, targets=teacher.targets):
            torch.cuda._sleep(400_000_000)  # cycles, about 0.2 s: longer than the host needs to queue the student
            return targets(*inputs)

        teacher.targets = delayed_targets
        for _ in range(4):
            batch = batch_of(config, 8)
            batch = batch._replace(images=batch.images.to(engine.device))
            losses = ForwardPass(config, engine, targets, betas, 1.0, "reference")(batch, 0.7)
            losses.total.backward()
            for parameter in student.parameters():
                parameter.data.normal_(std=0.05)
            teacher.update(0.5)
            losses_of_steps.append(losses.total.detach())
    one, two = (torch.stack(losses) for losses in totals.values())
    assert len(one.unique()) == len(one)
    assert torch.allclose(one, two, rtol=1e-5 if precision == "fp32" else 1e-3)


@CPU_ONLY
@pytest.mark.parametrize(
    "stage, micro_batch, execution",
    [(0, 16, "sequential"), (2, 16, "sequential"), (3, 16, "batched"), (0, 1, "batched")],
)
def test_auto_tap_execution_on_a_cpu(stage, micro_batch, execution):
    """Sequential if the taps' activations exceed the cache; batched under ZeRO-3, which shards the parameters."""
    ds_json = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": micro_batch}
    assert resolve_auto(parse(["--preset", "ddae_vit_s16_100e"]), ds_json).engine.tap_execution == execution


def test_batch_norm_targets_need_the_whole_batch_on_one_rank():
    args = ["--preset", "demo", "--feature.target_norm", "batch_layer", "--data.batch_size", "16"]
    resolve_auto(parse(args), {"train_micro_batch_size_per_gpu": 16})
    with pytest.raises(UserError, match="needs the whole batch of 16 images on one rank; a rank processes 8 at a time"):
        resolve_auto(parse(args), {"train_micro_batch_size_per_gpu": 8})


def test_teacher_momentum_by_name_of_its_schedule():
    """Epoch 100 at the reference batch size: BootMAE's schedule, and the linear one of appendix A."""
    momenta = {}
    for momentum in ("schedule", "linear", "0.99"):
        config = parse(["--preset", "ddae_vit_b16_800e", "--teacher.momentum", momentum])
        momenta[momentum] = schedules(config, 100, 800, epoch_samples=4096).momentum
    assert momenta == pytest.approx({"schedule": 0.9999, "linear": 0.9992475, "0.99": 0.99}, abs=1e-12)


@CPU_ONLY
@pytest.mark.parametrize(
    "setting, missing",
    [("teacher_stream", "CUDA streams"), ("teacher_graph", "CUDA graphs"), ("student_graphs", "CUDA graphs")],
)
def test_streams_and_graphs_are_refused_on_a_cpu(setting, missing):
    config = parse(["--preset", "demo", "--engine.compile", f"--engine.{setting}"])
    with pytest.raises(UserError, match=rf"engine\.{setting} is set, but a CPU has no {missing}"):
        resolve_auto(config, {"train_micro_batch_size_per_gpu": 16})


@pytest.mark.parametrize(
    "stage, accumulation, allowed", [(1, 1, True), (2, 1, True), (0, 1, False), (3, 1, False), (2, 4, False)]
)
def test_student_graphs_need_gradients_that_are_moved_at_once(monkeypatch, stage, accumulation, allowed):
    monkeypatch.setattr(ddae.training.step, "device", lambda: torch.device("cuda"))
    config = parse(["--preset", "ddae_vit_s16_100e", "--engine.compile", "--engine.student_graphs"])
    ds_json = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": accumulation}
    expected = pytest.raises(UserError, match=f"this run has ZeRO {stage} and {accumulation}")
    with nullcontext() if allowed else expected:
        resolve_auto(config, ds_json | {"train_micro_batch_size_per_gpu": 16})


def test_student_graphs_need_compiled_modules():
    with pytest.raises(UserError, match=r"engine\.student_graphs needs compiled modules. Pass --engine\.compile, too"):
        parse(["--preset", "demo", "--engine.student_graphs"])


def test_teacher_graph_needs_the_same_taps_in_every_step():
    with pytest.raises(UserError, match="needs the same taps in every step, but taps_per_step 2 draws them"):
        parse(["--preset", "demo", "--engine.teacher_graph", "--taps_per_step", "2"])


class GuardedRun:
    """The part of a Run that NonFiniteGuard uses."""

    def __init__(self, folder):
        self.folder, self.loader = folder, None

    def fail(self):
        raise NonFiniteError


def guard_of(folder, num_steps=100):
    return NonFiniteGuard(GuardedRun(folder), {}, torch.nn.Module(), num_steps, lambda *_: None, lambda _: {})


def test_the_guard_yields_each_flag_once_and_in_order(tmp_path):
    guard = guard_of(tmp_path)
    guard._add(3, torch.ones(()))
    guard._add(4, torch.zeros(()))
    assert list(guard._known(4)) == [(3, True), (4, False)]
    assert list(guard._known(4)) == []


def test_on_a_gpu_the_third_skipped_step_is_known_before_the_next_one_runs(tmp_path):
    """Flags are read one step late; after two skipped steps the guard waits for the flag of the third."""

    class Event:
        def synchronize(self):
            pass

    guard, read_at = guard_of(tmp_path), {}
    for step, applied in enumerate([1.0, 0.0, 1.0, 0.0, 0.0, 0.0]):
        guard._pending.append((step, torch.tensor(applied), Event()))
        for number, was_applied in guard._known(step):
            guard._skipped, read_at[number] = 0 if was_applied else guard._skipped + 1, step
    assert guard._skipped == MAX_SKIPPED_STEPS
    assert read_at == {0: 1, 1: 2, 2: 3, 3: 4, 4: 5, 5: 5}


def test_the_guard_holds_batches_only_while_steps_are_skipped(tmp_path):
    guard = guard_of(tmp_path)
    for step, applied in enumerate([1.0, 0.0, 0.0, 1.0, 1.0]):
        guard.hold(step, step)
        assert sorted(guard._held) == {2: [2], 3: [2, 3]}.get(step, [])
        guard.check(step, torch.tensor(applied))
    assert guard._held == {}


@CPU_ONLY
def test_benchmark_of_a_small_model(tmp_path):
    """Contents of the JSON, the naive variant first; the optimised step has no host syncs."""
    out, model = tmp_path / "rows.json", ranks.NANO[2 : ranks.NANO.index("--data.batch_size")]
    args = ["step", *"--preset demo --batch 4 --rounds 1".split(), "--json", str(out), "--out", str(tmp_path / "o")]
    code, output = ranks.run_command("launch/benchmark.py", *args, "--variants", "naive", "tap by tap", *model)
    assert code == 0, output
    rows = json.loads(out.read_text())
    assert [row["variant"] for row in rows] == ["naive", "tap by tap"]
    columns = {"variant", "preset", "batch", "images_per_s", "flops_per_image", "peak_bytes", "host_syncs"}
    for row in rows:
        assert columns <= row.keys()
        assert min(row["images_per_s"], row["flops_per_image"], row["peak_bytes"]) > 0
    assert [row["host_syncs"] for row in rows] == [1, 0]
    assert (tmp_path / "o.png").exists()
    assert (tmp_path / "o.csv").read_text().count("\n") == 3


@CPU_ONLY
@pytest.mark.slow
def test_benchmark_of_a_scale(shards, tmp_path):
    """Pretraining at a small scale beside a plain loop around the same model."""
    out = tmp_path / "rows.json"
    args = ["step", "--scale", "micro", "--preset", "mae_vit_s16_100e", "ddae_vit_s16_100e", "--data", str(shards)]
    code, output = ranks.run_command("launch/benchmark.py", *args, "--rounds", "1", "--json", str(out))
    assert code == 0, output
    rows = json.loads(out.read_text())
    assert [row["variant"] for row in rows] == 2 * ["plain loop", "pretraining"]
    assert all(row["batch"] == 64 for row in rows)
    for plain, ours in (rows[:2], rows[2:]):
        assert 0.85 < ours["flops_per_image"] / plain["flops_per_image"] <= 1  # the same model


@pytest.mark.parametrize(
    "args, reason",
    [
        (["step", "--scale", "huge", "--data", "d"], "unknown scale 'huge'. Choose from"),
        (["step", "--scale", "micro"], "--data is missing; a scale needs shards"),
        (["step", "--variants", "nave"], "unknown variant 'nave'"),
        (["loader", "--nonsense"], "has no flag --nonsense"),
    ],
)
def test_wrong_arguments_of_the_benchmark(args, reason):
    code, output = ranks.run_command("launch/benchmark.py", *args)
    assert code == 2
    assert reason in output
    assert "Traceback" not in output


def test_sequential_taps_are_refused_under_zero_3(tmp_path):
    args = ["--preset", "demo", "--engine.tap_execution", "sequential", "--ds_config", "ds_configs/zero3.json"]
    args += ["--data.backend", "synthetic", "--run_dir", str(tmp_path / "run")]
    code, output = ranks.run_command("launch/pretrain.py", *args)
    assert code == 2, output
    assert "engine.tap_execution is sequential" in output
    assert not (tmp_path / "run").exists()


def test_variants_have_different_names():
    for gpu in (False, True):
        assert len({each.name for each in variants(gpu)}) == len(variants(gpu))
        assert variants(gpu)[0].kind == "naive"
