"""launch/plan.py: its memory compared with the storages of live tensors, its FLOPs with known numbers."""

import json
import runpy
import sys
from dataclasses import replace

import pytest
import ranks
import torch
from memory import batch_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddae.config.cli import parse
from ddae.config.deepspeed import load
from ddae.config.presets import preset
from ddae.config.pretrain import beta_names
from ddae.data.masking import Mask, sample_mask
from ddae.method.betas import Betas
from ddae.method.branches import Inputs
from ddae.method.distance import masked_distance
from ddae.method.model import build_model, build_uninitialised_model
from ddae.method.teacher import Teacher, TensorShard
from ddae.models.tokenizer import Tokenizer
from ddae.models.vit import Encoder
from ddae.tools.replay import EagerEngine
from ddae.training.flops import count_flops
from ddae.training.gpu_memory import activation_bytes, count_parameters, estimate_memory
from ddae.training.step import ForwardPass, Targets, TeacherTargets, TokenTargets

SIZES = {
    "s": ["--preset", "ddae_vit_s16_100e"],
    "b": ["--preset", "ddae_vit_b16_100e"],
    "other": "--preset ddae_vit_s16_100e --model.width 640 --model.depth 7 --model.heads 10 --pixel.taps 2 5 7 "
    "--pixel.tap_weights 1 1 1 --feature.taps 2 5 7 --feature.tap_weights 1 1 1 --feature.decoder_width 320 "
    "--feature.decoder_heads 5 --pixel.decoder_depth 3".split(),  # a shape unrelated to the formulas
    "cross": ["--preset", "ddae_vit_s16_100e", "--pixel.cross_attention", "--feature.cross_attention"],
    # Without relative positions: with them attention saves its maps on a CPU, but not on a GPU.
    "tokens": "--preset dds_beitv2_vit_s16_100e --model.relative_positions none --model.positions rowfirst".split(),
}
TINY = ["--preset", "demo", "--model.width", "192"]
SMALL_IMAGES = "--model.image_size 32 --data.batch_size 4".split()  # no effect on the size of the state
LONG = [(size, count) for size in ("s", "b", "other") for count in (1, 2, 4)]  # B on 4 ranks takes 14 GB
STATES = [("tiny", 2), *(pytest.param(*case, marks=pytest.mark.faults) for case in LONG)]


@pytest.mark.parametrize("size, count", STATES)
def test_planned_state_equals_live_tensors(size, count, record_result):
    """Planned bytes of weights, gradients, optimizer, teacher against live tensors, fullest rank, ZeRO stages 0 to 3.

    Besides these only buckets are live.
    """
    precisions = ("bf16", "fp32") if size == "other" else ("bf16",)
    cases = [(size, stage, precision) for stage in range(4) for precision in precisions]
    runs = []
    for name, stage, precision in cases:
        json_file = str(ranks.ROOT / "ds_configs" / f"zero{stage}.json")
        runs.append(
            [*(SIZES | {"tiny": TINY})[name], *SMALL_IMAGES, "--engine.precision", precision, "--ds_config", json_file]
        )
    lines = ranks.run_program(count, ["tests/support/memory.py"], runs).splitlines()
    measured = [json.loads(line.removeprefix("MEASURED ")) for line in lines if line.startswith("MEASURED")]
    assert len(measured) == len(cases)
    worst = 0.0
    for (name, stage, precision), args, live in zip(cases, runs, measured, strict=True):
        config = parse(args)
        planned = estimate_memory(config, load(config.ds_config), stage, count, 4 // count)
        for part in ("weights", "gradients", "optimizer", "teacher"):
            ratio = getattr(planned, part) / live[part]
            worst = max(worst, abs(ratio - 1))
            assert abs(ratio - 1) < 0.1, (name, stage, precision, part, ratio)
        bucket = 5e7 * (2 if precision == "bf16" else 4) if stage == 3 else 0
        assert live["rest"] < bucket + 0.1 * sum(live.values()), (name, stage, precision, live)
    record_result(f"{len(cases)} settings, largest deviation of a part {worst:.1%}")


@pytest.mark.parametrize("loss_backend", ["reference", pytest.param("triton", marks=pytest.mark.faults)])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize(
    "size", ["s", "cross", "tokens", *(pytest.param(size, marks=pytest.mark.faults) for size in ("b", "other"))]
)
def test_planned_activations_equal_saved_tensors(size, precision, loss_backend, record_result):
    """Planned bytes that the forward pass saves, without weights, against the saved storages."""
    if loss_backend == "triton" and (size, precision) != ("s", "bf16"):
        pytest.skip("Triton's interpreter is slow; one case covers it")
    if size in ("cross", "tokens") and precision != "fp32":
        pytest.skip("not a default; one precision covers it")
    config = parse([*SIZES[size], "--engine.precision", precision, "--engine.loss_backend", loss_backend])
    engine = EagerEngine(build_model(config), precision)
    encoder = Encoder(config.model)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    shards = [TensorShard(name, 0, values.detach().flatten()) for name, values in encoder.named_parameters()]
    targets = TeacherTargets(config, engine, Teacher(encoder.to(engine.dtype), shards, sharded=False))
    if size == "tokens":
        shape = replace(config.model, positions="rowfirst", relative_positions="none")
        targets = TokenTargets(config, Tokenizer(shape, 8192, 32))
    betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)
    weights = {parameter.untyped_storage().data_ptr() for parameter in engine.module.parameters()}
    saved, alive = {}, []  # bytes of each storage; tensors, so that no address is used twice

    def record(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    images = 1
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        ForwardPass(config, engine, targets, betas, 1.0, loss_backend)(batch_of(config, images), 1.0)
    ratio = activation_bytes(config, images) / sum(saved.values())
    assert abs(ratio - 1) < 0.1
    record_result(f"deviation {abs(ratio - 1):.1%}")


class FakeEngine(EagerEngine):
    """The model of a config in bf16, of fake tensors: shapes without memory."""

    def __init__(self, config):
        self.device, self.dtype, self._autocast = torch.device("cpu"), torch.bfloat16, False
        self.module = build_uninitialised_model(config)


@pytest.fixture
def bf16(monkeypatch):
    """Build modules in bf16, because fake parameters cannot be converted; check no values, which fakes do not have."""
    monkeypatch.setenv("DDAE_CHECK", "0")
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


LARGER = [("ddae_vit_s16_100e", 64), ("ddae_vit_b16_100e", 64), ("ddae_vit_l16_800e", 32)]


@pytest.mark.parametrize(
    "name, images", [("mae_vit_b16_100e", 64), *(pytest.param(*case, marks=pytest.mark.faults) for case in LARGER)]
)
def test_planned_peak_equals_that_of_a_memory_tracker(bf16, name, images, record_result):
    """Weights, gradients, the teacher's copy and activations: their planned sum against the peak of a step.

    torch's MemTracker follows the forward and backward pass of a micro-batch of 224-pixel images, with Triton's losses,
    in FakeTensorMode.
    """
    config = parse(["--preset", name, "--engine.loss_backend", "triton", "--engine.tap_execution", "batched"])
    batch, targets = batch_of(config, images), Targets()
    mask = sample_mask(config.mask.kind, torch.arange(images), config.grid, config.num_masked)
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        engine, teacher_copy = FakeEngine(config), 0
        if config.feature.enabled:
            encoder, teacher_copy = Encoder(config.model), 2 * count_parameters(config).encoder
            shards = [
                TensorShard(name, 0, each.detach().float().flatten()) for name, each in encoder.named_parameters()
            ]
            targets = TeacherTargets(config, engine, Teacher(encoder, shards, sharded=False))
            encoder.requires_grad_(True)  # the tracker registers hooks
        torch.set_default_dtype(torch.float32)
        for parameter in engine.module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        fake = batch._replace(images=fakes.from_tensor(batch.images), mask=Mask(*map(fakes.from_tensor, mask)))
        betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)
        forward, tracker = ForwardPass(config, engine, targets, betas, 1.0, "triton"), MemTracker()
        tracker.track_external(engine.module)
        with tracker:
            forward(fake, 1.0).total.backward()
    measured = tracker.get_tracker_snapshot("peak")[engine.device]["Total"]
    planned = estimate_memory(config, {}, 0, 1, images)
    ratio = (planned.weights + planned.gradients + teacher_copy + planned.activations) / measured
    assert abs(ratio - 1) < 0.05
    record_result(f"planned over measured {ratio:.3f}")


@pytest.mark.parametrize(
    "name, gigaflop",  # derived by hand for decoders whose norm and head process all tokens
    [
        ("ddae_vit_s16_100e", 68.6),
        ("ddae_vit_b16_100e", 168.3),
        ("ddae_vit_l16_100e", 377.8),
        ("mae_vit_b16_100e", 58.7),
    ],
)
def test_flops_equal_known_numbers(name, gigaflop):
    config = parse(["--preset", name, "--engine.no_skip_unused_tokens"])
    assert count_flops(config).total / 1e9 == pytest.approx(gigaflop, rel=0.015)


@pytest.mark.parametrize("size, gigaflop, share", [("s", 68.6, 15.3), ("b", 168.3, 12.9), ("l", 377.8, 8.8)])
def test_skipping_unused_tokens_saves_known_flops(size, gigaflop, share):
    reduced = count_flops(preset(f"ddae_vit_{size}16_100e")).total / 1e9
    assert 100 * (1 - reduced / gigaflop) == pytest.approx(share, abs=0.3)


@pytest.mark.parametrize("size, gigaflop", [("s", 78.8), ("b", 190.4), ("l", 411.6)])
def test_flops_with_cross_attention(size, gigaflop):
    args = ["--pixel.cross_attention", "--feature.cross_attention", "--engine.no_skip_unused_tokens"]
    config = parse(["--preset", f"ddae_vit_{size}16_100e", *args])
    assert count_flops(config).total / 1e9 == pytest.approx(gigaflop, rel=0.015)


def test_flops_of_beitv2_equal_torchs_count():
    """Without the tokenizer, whose size is not in the config."""
    config = parse(["--preset", "dds_beitv2_vit_s16_100e"])
    model, images = build_model(config), batch_of(config, 1).images
    mask = sample_mask("beit_block", torch.arange(1), config.grid, config.num_masked)
    betas, one = torch.full((4,), -0.5, requires_grad=True), torch.ones(())
    distance, codes = masked_distance(mask, config.grid), torch.zeros_like(mask.masked)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(Inputs(images, mask, distance, betas, one, 1.0, "reference", codes=codes)).total.backward()
    planned = count_flops(config)
    assert planned.encoder + planned.token == pytest.approx(counter.get_total_flops(), rel=0.02)


def run_plan(args, monkeypatch, capsys):
    """Run launch/plan.py. Return its exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["plan.py", *args])
    monkeypatch.chdir(ranks.ROOT)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path("launch/plan.py", run_name="__main__")
    return ended.value.code, *capsys.readouterr()


def test_the_command_prints_a_plan(monkeypatch, capsys):
    args = "--preset ddae_vit_l16_800e --gpus 64 --gpu a100-80g".split()
    code, output, _ = run_plan(args, monkeypatch, capsys)
    assert code == 0
    for text in (
        "337.6 million parameters",
        "4096 = 64 GPUs x 64 images x 1",
        "GFLOP an image",
        "days",
        "GiB on a GPU",
        "predicted ms of a step on 64 GPUs, infiniband-200 (8 x 200 Gb/s a node of 8, 300 GB/s inside)",
        "assumed, not measured on a GPU; each is a flag:\n  --mfu 0.4:",
    ):
        assert text in output
    assert len([line for line in output.splitlines() if line.split()[:1] in (["0"], ["1"], ["2"], ["3"])]) == 8


def test_a_plan_compares_numbers_of_gpus(monkeypatch, capsys):
    args = "--gpus 8 64 512 --gpu H100 --network infiniband-400 --mfu 0.5".split()
    code, output, _ = run_plan(args, monkeypatch, capsys)
    assert code == 0
    assert "ddae_vit_b16_100e on 8 x h100-80g" in output
    rows = output.partition("GPUs  micro")[2].splitlines()[1:4]
    assert [row.split()[:2] for row in rows] == [["8", "512"], ["64", "64"], ["512", "8"]]
    assert "--mfu 0.5" in output


def test_a_plan_warns_of_a_short_run_that_would_collapse(monkeypatch, capsys):
    args = "--preset ddae_vit_s16_100e --gpus 8 --train.epochs 1".split()
    code, output, _ = run_plan(args, monkeypatch, capsys)
    assert code == 0
    assert "warning: pixel.norm is per_channel: in a run of 313 steps" in output
    assert "warning" not in run_plan(args[:-2], monkeypatch, capsys)[1]


@pytest.mark.parametrize(
    "args, message",
    [
        ("--gpu v100", "--gpu v100 is unknown. Choose one of a100-40g"),
        ("--gpus 7", "not divisible by 7 GPUs"),
        ("--gpus 0", "--gpus is 0"),
        ("--gpus 8 0", "--gpus is 0"),
        ("--network token-ring", "--network token-ring is unknown. Choose one of infiniband-200"),
        ("--latency_us 0", "--latency_us is 0"),
        ("--gpuz 8", "unknown flag --gpuz"),
        ("--preset ddae_vit_h16_100e", "the nearest is 'ddae_vit_"),
    ],
)
def test_user_errors_take_one_line(args, message, monkeypatch, capsys):
    code, _, errors = run_plan(args.split(), monkeypatch, capsys)
    assert code == 2
    assert errors.startswith("plan: ")
    assert message in errors
    assert errors.count("\n") == 1


def test_more_gpus_need_no_more_memory():
    config = preset("ddae_vit_b16_100e")
    settings = load(str(ranks.ROOT / "ds_configs" / "zero3.json"))
    for stage in range(4):
        peaks = [estimate_memory(config, settings, stage, gpus, 32).peak for gpus in (2, 8, 64)]
        assert peaks == sorted(peaks, reverse=True)
