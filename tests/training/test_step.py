"""The training step against naive.py, which is written as the paper reads: each setting gives its losses and gradients.
And what a step costs: operations, waits of the host, memory."""

import json

import pytest
import ranks
import torch
from memory import batch_of

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

DDAE = ["--preset", "demo", "--pixel.norm", "per_channel", "--pixel.decoder_depth", "2"]  # one decoder of two blocks
MAE = "--preset mae_vit_s16_100e --model.width 48 --model.heads 3 --model.depth 4 --model.image_size 64".split()
MAE += "--model.patch_size 8 --pixel.taps 4 --pixel.decoder_width 32 --pixel.decoder_heads 2".split()
DS_MAE = "--preset ds_mae_vit_s16_100e --model.width 48 --model.heads 3 --model.image_size 64".split()
DS_MAE += "--model.patch_size 8 --pixel.decoder_depth 3 --pixel.decoder_width 32 --pixel.decoder_heads 2".split()
SETTINGS = {
    "one batch": ["--engine.no_skip_unused_tokens", "--engine.tap_execution", "batched"],
    "shortcuts": ["--engine.tap_execution", "batched"],
    "tap by tap": ["--engine.tap_execution", "sequential"],
    "recomputed": ["--engine.tap_execution", "batched", "--engine.decoder_activation_checkpointing"],
    "all of it": ["--engine.tap_execution", "sequential", "--engine.activation_checkpointing"],
}


def fragments_of(encoder):
    """All of its weights, as an engine gives them."""
    return [TensorShard(name, 0, values.detach().flatten()) for name, values in encoder.named_parameters()]


def teacher_of(encoder, config, dtype=torch.float32):
    """Equal to the encoder, and as the config has it."""
    teacher = Teacher(Encoder(config.model).to(device(), dtype), fragments_of(encoder), sharded=False)
    configure_teacher(teacher, config)
    return teacher


def both(words, settings, precision, compiled=False):
    """Loss, gradients by name and gradient of the betas: of naive.py, and of the step with these settings."""
    config = parse([*words, *settings, "--engine.precision", precision, "--engine.loss_backend", "reference"])
    torch.manual_seed(0)
    engine, batch = EagerEngine(build_model(config), precision), batch_of(config, 3)
    batch = batch._replace(images=batch.images.to(device()))
    naive, encoder = NaiveMethod(config), Encoder(config.model)
    naive.load_state_dict(engine.module.state_dict())
    naive = naive.to(device(), engine.dtype)
    for parameter in encoder.parameters():  # a teacher of its own
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
    ours = {name: values.grad for name, values in engine.module.named_parameters()}
    mask = sample_mask(config.mask.kind, batch.seeds, config.grid, config.num_masked).to(device())
    distance, values = masked_distance(mask, config.grid), betas.values.detach().clone().requires_grad_()
    tokens = None
    if config.feature.enabled:
        first = NaiveEncoder(config)
        first.load_state_dict(state)
        with torch.no_grad(), engine.autocast():
            pixels = to_pixels(batch.images, config.data.normalisation)
            tokens = first.to(device(), engine.dtype)(pixels.to(engine.dtype))
    with engine.autocast():
        loss = naive(batch.images, mask.visible, mask.masked, distance, values, tokens, 0.7)
    loss.backward()
    theirs = {name: parameter.grad for name, parameter in naive.named_parameters()}
    return (loss, theirs, values.grad), (losses.total, ours, betas.values.grad)


def apart(one, other):
    """Largest difference over the largest value."""
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))


def assert_equal(words, settings, precision, of_loss, of_gradients, compiled=False):
    (loss, theirs, of_betas), (total, ours, own_betas) = both(words, settings, precision, compiled)
    assert abs(float(total.detach() - loss.detach())) <= of_loss * abs(float(loss.detach()))
    assert ours.keys() == theirs.keys()
    norms = {name: float(values.norm()) for name, values in theirs.items()}
    whole = sum(value**2 for value in norms.values()) ** 0.5
    wrongs = {name: float((ours[name] - values).norm()) for name, values in theirs.items()}
    assert sum(wrong**2 for wrong in wrongs.values()) ** 0.5 <= of_gradients * whole
    if precision == "bf16":  # whose norms a CPU sums up in bf16: the more rows, the further off their own gradients
        return
    for name, wrong in wrongs.items():  # small ones among large ones have their rounding
        assert wrong <= of_gradients * max(norms[name], 0.1 * whole), (name, wrong / norms[name])
    if of_betas is not None:
        assert apart(own_betas, of_betas) < max(of_gradients, 1e-5)


@pytest.mark.parametrize("words", [DDAE, MAE, DS_MAE], ids=["ddae", "mae", "ds_mae"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_each_setting_is_the_naive_step(words, setting):
    assert_equal(words, SETTINGS[setting], "fp32", 1e-6, 2e-6)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_settings_stay_near_the_naive_step_in_bf16(setting, precision):
    """Tolerance: what rounding to eight bits leaves of a gradient, 3 % of its norm; 0.5 % of the loss."""
    assert_equal(DDAE, SETTINGS[setting], precision, 5e-3, 3e-2)


@pytest.mark.faults
@pytest.mark.parametrize("taps", ["batched", "sequential"])
def test_compiled_is_the_naive_step(taps):
    assert_equal(DDAE, ["--engine.tap_execution", taps], "fp32", 1e-6, 2e-6, compiled=True)


CPU_ALONE = pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU")
GPU_ALONE = pytest.mark.skipif(not torch.cuda.is_available(), reason="of a GPU")


@CPU_ALONE
@pytest.mark.parametrize(
    "name, gigaflop",
    [
        ("ddae_vit_s16_100e", 68.6),
        ("ddae_vit_b16_100e", 168.3),
        pytest.param("ddae_vit_l16_100e", 377.8, marks=pytest.mark.faults),  # 6 GB
        ("mae_vit_s16_100e", 39.0),
    ],
)
def test_work_is_what_torch_counts(name, gigaflop):
    """Of naive.py the figures known from elsewhere; of the step what work() says, each within 2 %."""
    counted, images = {}, 1
    for kind in ("naive", "own"):
        config = parse(["--preset", name, "--engine.precision", "fp32", "--engine.tap_execution", "batched"])
        batch = batch_of(config, images)
        mask = sample_mask(config.mask.kind, batch.seeds, config.grid, config.num_masked)
        distance, values = masked_distance(mask, config.grid), torch.full((4,), -0.5, requires_grad=True)
        if kind == "naive":
            method, teacher = NaiveMethod(config), NaiveEncoder(config)

            def step(method=method, teacher=teacher, batch=batch, mask=mask, distance=distance, values=values):
                tokens = None
                if name.startswith("ddae"):
                    with torch.no_grad():
                        tokens = teacher(to_pixels(batch.images, "half"))
                method(batch.images, mask.visible, mask.masked, distance, values, tokens, 1.0).backward()
        else:
            engine = EagerEngine(build_model(config), "fp32")
            targets = Targets()
            if config.feature.enabled:
                targets = TeacherTargets(config, engine, teacher_of(engine.module.encoder, config))
            betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)
            forward = ForwardPass(config, engine, targets, betas, 1.0, "reference")

            def step(forward=forward, batch=batch):
                forward(batch, 1.0).total.backward()

        counted[kind] = measure_flops(step) / images / 1e9
    assert counted["naive"] == pytest.approx(gigaflop, rel=0.02)
    # And what is done once a step, whatever its images: queries, keys and values of 196 mask tokens.
    once = sum(3 * 6 * 196 * branch.decoder_width**2 for branch in decoder_branches(config)) / images
    assert counted["own"] == pytest.approx((count_flops(config).total + once) / 1e9, rel=0.005)
    less = {"ddae_vit_s16_100e": 0.15, "ddae_vit_b16_100e": 0.125, "ddae_vit_l16_100e": 0.085, "mae_vit_s16_100e": 0.04}
    assert 1 - (counted["own"] - once / 1e9) / counted["naive"] >= less[name]


@pytest.mark.parametrize("taps", ["batched", "sequential"])
def test_targets_are_read_when_they_are_ready(taps):
    """They come when they are waited for, and the losses are those of targets that were there at once."""
    config = parse([*DDAE, "--engine.tap_execution", taps, "--engine.precision", "fp32"])
    losses = []
    for late in (False, True):
        torch.manual_seed(0)
        engine, batch = EagerEngine(build_model(config), "fp32"), batch_of(config, 3)
        batch = batch._replace(images=batch.images.to(engine.device))
        teacher = teacher_of(engine.module.encoder, config)
        betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)
        if late:
            teacher.start = lambda *inputs, targets=teacher.targets: Late.of(targets(*inputs))
        targets = TeacherTargets(config, engine, teacher)
        losses.append(ForwardPass(config, engine, targets, betas, 1.0, "reference")(batch, 0.7).total)
    assert losses[0].isfinite()
    assert torch.equal(*losses)


class Late:
    """The event of another stream: what it stands for has come when it is waited for."""

    @classmethod
    def of(cls, tokens):
        late = cls()
        late.tokens, late.coming = torch.full_like(tokens, torch.nan), tokens
        return late.tokens, late

    def wait(self):
        self.tokens.copy_(self.coming)


@GPU_ALONE
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_streams_are_one(precision, compiled):
    """A teacher that starts late and changes as soon as a step has ended: the same losses."""
    found = {}
    for name in ("one", "two"):
        words = ["--engine.teacher_stream"] if name == "two" else []
        config = parse([*DDAE, "--engine.tap_execution", "batched", "--engine.precision", precision, *words])
        torch.manual_seed(0)
        engine, followed = EagerEngine(build_model(config), precision), Encoder(config.model).to(device())
        initialise(followed, torch.Generator(device()).manual_seed(0))
        teacher = teacher_of(followed, config, engine.dtype)
        targets = TeacherTargets(config, engine, teacher)
        if compiled:
            compile_modules(engine.module, targets)
        betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)

        def after_a_while(*inputs, targets=teacher.targets):
            torch.cuda._sleep(400_000_000)  # a fifth of a second: longer than the host takes for the student
            return targets(*inputs)

        teacher.targets, found[name] = after_a_while, []
        for _ in range(4):
            batch = batch_of(config, 8)
            batch = batch._replace(images=batch.images.to(engine.device))
            losses = ForwardPass(config, engine, targets, betas, 1.0, "reference")(batch, 0.7)
            losses.total.backward()
            for parameter in followed.parameters():
                parameter.data.normal_(std=0.05)
            teacher.update(0.5)
            found[name].append(losses.total.detach())
    one, two = (torch.stack(losses) for losses in found.values())
    assert len(one.unique()) == len(one)
    assert torch.allclose(one, two, rtol=1e-5 if precision == "fp32" else 1e-3)


@CPU_ALONE
def test_large_taps_go_one_by_one_where_a_cache_holds_no_batch():
    """On a CPU, and not where ZeRO-3 has the parameters in parts."""
    config = parse(["--preset", "ddae_vit_s16_100e"])
    json_of = lambda stage, images: {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": images}  # noqa: E731
    found = {
        case: resolve_auto(config, json_of(*case)).engine.tap_execution for case in ((0, 16), (2, 16), (3, 16), (0, 1))
    }
    assert found == {(0, 16): "sequential", (2, 16): "sequential", (3, 16): "batched", (0, 1): "batched"}


def test_batch_statistics_of_a_part_of_the_batch_are_refused():
    words = ["--preset", "demo", "--feature.target_norm", "batch_layer", "--data.batch_size", "16"]
    resolve_auto(parse(words), {"train_micro_batch_size_per_gpu": 16})
    with pytest.raises(UserError, match="needs the whole batch of 16 images on one rank; a rank processes 8 at a time"):
        resolve_auto(parse(words), {"train_micro_batch_size_per_gpu": 8})


def test_the_teachers_schedules_by_name():
    """At epoch 100 with the batch they are meant for: BootMAE's table and the line of appendix A."""
    found = {}
    for momentum in ("schedule", "linear", "0.99"):
        config = parse(["--preset", "ddae_vit_b16_800e", "--teacher.momentum", momentum])
        found[momentum] = schedules(config, 100, 800, epoch_samples=4096).momentum
    assert found == pytest.approx({"schedule": 0.9999, "linear": 0.9992475, "0.99": 0.99}, abs=1e-12)


@CPU_ALONE
def test_a_cpu_has_no_second_stream():
    with pytest.raises(UserError, match=r"engine\.teacher_stream is set, but a CPU has no CUDA streams"):
        resolve_auto(parse(["--preset", "demo", "--engine.teacher_stream"]), {"train_micro_batch_size_per_gpu": 16})


class GuardedRun:
    """What a guard needs of a run; it fails instead of writing a dump."""

    def __init__(self, folder):
        self.folder, self.loader = folder, None

    def fail(self):
        raise NonFiniteError


def guard_of(folder, num_steps=100):
    return NonFiniteGuard(GuardedRun(folder), {}, torch.nn.Module(), num_steps, lambda *_: None, lambda _: {})


def test_the_guard_reads_flags_once_and_in_order(tmp_path):
    guard = guard_of(tmp_path)
    guard._add(3, torch.ones(()))
    guard._add(4, torch.zeros(()))
    assert list(guard._known(4)) == [(3, True), (4, False)]
    assert list(guard._known(4)) == []


def test_a_gpus_third_skipped_step_is_known_before_the_next_one_runs(tmp_path):
    """Flags come a step late; after two skipped steps that of the third is waited for."""

    class Event:
        def synchronize(self):
            pass

    guard, seen = guard_of(tmp_path), {}
    for step, applied in enumerate([1.0, 0.0, 1.0, 0.0, 0.0, 0.0]):
        guard._pending.append((step, torch.tensor(applied), Event()))
        for number, was_applied in guard._known(step):
            guard._skipped, seen[number] = 0 if was_applied else guard._skipped + 1, step
    assert guard._skipped == MAX_SKIPPED_STEPS
    assert seen == {0: 1, 1: 2, 2: 3, 3: 4, 4: 5, 5: 5}


def test_the_guard_holds_batches_only_while_steps_are_skipped(tmp_path):
    guard = guard_of(tmp_path)
    for step, applied in enumerate([1.0, 0.0, 0.0, 1.0, 1.0]):
        guard.hold(step, step)
        assert sorted(guard._held) == {2: [2], 3: [2, 3]}.get(step, [])
        guard.check(step, torch.tensor(applied))
    assert guard._held == {}


@CPU_ALONE
def test_the_ladder_on_a_small_model(tmp_path):
    """What the JSON holds, the naive variant first; the other synchronises host and device nowhere in a step."""
    out, model = tmp_path / "rows.json", ranks.NANO[2 : ranks.NANO.index("--data.batch_size")]
    words = ["step", *"--preset demo --batch 4 --rounds 1".split(), "--json", str(out), "--out", str(tmp_path / "o")]
    code, said = ranks.run_command("launch/benchmark.py", *words, "--variants", "naive", "tap by tap", *model)
    assert code == 0, said
    rows = json.loads(out.read_text())
    assert [row["variant"] for row in rows] == ["naive", "tap by tap"]
    asked = {"variant", "preset", "batch", "images_per_s", "flops_per_image", "peak_bytes", "host_syncs"}
    for row in rows:
        assert asked <= row.keys()
        assert min(row["images_per_s"], row["flops_per_image"], row["peak_bytes"]) > 0
    assert [row["host_syncs"] for row in rows] == [1, 0]
    assert (tmp_path / "o.png").exists()
    assert (tmp_path / "o.csv").read_text().count("\n") == 3


@pytest.mark.parametrize(
    "words, reason",
    [(["step", "--variants", "nave"], "unknown variant 'nave'"), (["loader", "--nonsense"], "has no flag --nonsense")],
)
def test_mistakes_are_told(words, reason):
    code, said = ranks.run_command("launch/benchmark.py", *words)
    assert code == 2
    assert reason in said
    assert "Traceback" not in said


def test_sequential_taps_are_refused_under_zero_3(tmp_path):
    words = ["--preset", "demo", "--engine.tap_execution", "sequential", "--ds_config", "ds_configs/zero3.json"]
    words += ["--data.backend", "synthetic", "--run_dir", str(tmp_path / "run")]
    code, said = ranks.run_command("launch/pretrain.py", *words)
    assert code == 2, said
    assert "engine.tap_execution is sequential" in said
    assert not (tmp_path / "run").exists()


def test_variants_differ():
    for gpu in (False, True):
        assert len({each.name for each in variants(gpu)}) == len(variants(gpu))
        assert variants(gpu)[0].kind == "naive"
