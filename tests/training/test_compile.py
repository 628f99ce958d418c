"""Runs with --engine.compile equal runs without it, at each ZeRO stage, on two ranks; the order of their gradients."""

from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
import ranks
import torch
from memory import batch_of

from ddae.config.cli import parse
from ddae.config.pretrain import beta_names
from ddae.distributed.comm import device
from ddae.method.betas import Betas
from ddae.method.model import build_model
from ddae.tools.replay import EagerEngine
from ddae.training.step import ForwardPass, Targets, compile_modules

GPU_ONLY = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIX_STEPS = ("--engine.precision", "fp32", "--train.steps", "6")
STAGES = (0, 1, 2, 3)


def gradients_of_a_step(compile_encoder):
    """Return the loss, the gradients by name, and what happened in the backward pass, in order.

    An event is ("begin", tap), when autograd reaches the function whose output is that tap, or ("ready", block), when
    the gradient of a parameter of that encoder block has arrived; block 0 is the embedding.
    """
    args = "--preset demo --feature.no_enabled --model.depth 4 --pixel.taps 1 3 4 --pixel.tap_weights 1 1 1".split()
    config = parse([*args, "--engine.precision", "fp32", "--engine.tap_execution", "batched"])
    engine, events = EagerEngine(build_model(config), "fp32"), []
    batch = batch_of(config, 2)
    batch = batch._replace(images=batch.images.to(device()))
    model, encode = engine.module, engine.module.encode
    compile_encoder(model)

    def recorded_encode(*inputs):
        tokens = encode(*inputs)
        for tap, each in tokens.raw.items():
            each.grad_fn.register_prehook(lambda *_, tap=tap: events.append(("begin", tap)))
        return tokens

    model.encode = recorded_encode
    for name, parameter in model.encoder.named_parameters():
        if not name.startswith("norm."):
            block = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0
            parameter.register_post_accumulate_grad_hook(lambda *_, block=block: events.append(("ready", block)))
    betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)
    torch.manual_seed(0)
    losses = ForwardPass(config, engine, Targets(), betas, 1.0, "reference")(batch, 1.0)
    losses.total.backward()
    return losses.total.detach(), {name: p.grad for name, p in model.named_parameters()}, events


@pytest.fixture
def dynamo():
    """Compile from scratch, without the tests' checks of shapes, which torch.compile cannot trace.

    Fail where torch.compile would run eagerly because of too many recompilations.
    """
    torch._dynamo.reset()
    jaxtyping.config.update("jaxtyping_disable", True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


def test_gradients_arrive_segment_by_segment(dynamo):
    """The gradients of a segment are ready before the backward pass of the segment before it begins."""
    torch.manual_seed(0)
    loss, gradients, events = gradients_of_a_step(lambda model: compile_modules(model, Targets(), "aot_eager"))
    begins = [tap for kind, tap in events if kind == "begin"]
    assert begins == [4, 3, 1]
    for tap, blocks in {3: {4}, 1: {2, 3, 4}}.items():
        before = events[: events.index(("begin", tap))]
        assert {block for kind, block in before if kind == "ready"} == blocks
    eager_loss, eager_gradients, _ = gradients_of_a_step(lambda model: None)
    torch.testing.assert_close(loss, eager_loss, rtol=1e-6, atol=0)
    errors = torch.stack([(gradients[name] - gradient).norm() for name, gradient in eager_gradients.items()])
    assert errors.norm() <= 2e-6 * torch.stack([gradient.norm() for gradient in eager_gradients.values()]).norm()


def test_a_whole_compiled_encoder_delays_all_gradients(dynamo):
    """The reason for segments: one compiled function for all blocks returns their gradients at its end."""
    *_, events = gradients_of_a_step(lambda model: model.encoder.compile(dynamic=False, backend="aot_eager"))
    first_ready = [kind for kind, _ in events].index("ready")
    assert {kind for kind, _ in events[first_ready:]} == {"ready"}


def test_segments_of_equal_length_share_their_code(dynamo):
    """With a tap at every block two functions are compiled: one with the embedding, and one for all other blocks."""
    config = parse(["--preset", "demo"])
    encoder, graphs = build_model(config).encoder, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    encoder.compile_segments(backend=backend)
    images = torch.rand(2, 3, *config.model.height_width)
    compiled = encoder(images, layers=range(1, 9))
    assert len(graphs) == 2
    encoder.compile_segments(backend="eager")
    torch._dynamo.reset()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(compiled, encoder(images, layers=range(1, 9)), strict=True))


@GPU_ONLY
def test_student_graphs_equal_compiled_modules(dynamo):
    """Losses and gradients of six steps with other images and weights in each, to the bit."""
    config = parse(
        ["--preset", "demo", "--feature.no_enabled", "--engine.tap_execution", "batched", "--engine.compile"]
    )
    results = []
    for graphs in (False, True):
        config = replace(config, engine=replace(config.engine, student_graphs=graphs))
        engine = EagerEngine(build_model(config), "bf16")
        compile_modules(engine.module, Targets(), graphs=graphs)
        betas = Betas(beta_names(config), config.dynamic, config.optim.adam_betas, engine.device)
        forward, generator = ForwardPass(config, engine, Targets(), betas, 1.0, "reference"), torch.Generator()
        for step in range(6):
            batch = batch_of(config, 4)
            images = torch.randint(0, 256, batch.images.shape, dtype=torch.uint8, generator=generator.manual_seed(step))
            losses = forward(batch._replace(images=images.to(engine.device)), 1.0)
            losses.total.backward()
            results.append([losses.total.detach().clone()])
            for parameter in engine.module.parameters():
                results[-1].append(parameter.grad.clone())
                parameter.grad = None
                parameter.data.mul_(1.01)
        torch._dynamo.reset()
    assert not torch.equal(results[0][0], results[1][0])
    for compiled, graphed in zip(results[:6], results[6:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(compiled, graphed, strict=True))


@pytest.mark.faults
def test_compiled_runs_equal_eager_runs(shards, tmp_path, record_result):
    """Six steps with --engine.compile and without, fp32, two ranks, stages 0 to 3.

    Stage 0 runs tap by tap. Compiled code sums in another order, which the tolerance allows for.
    """
    commands = []
    for stage in STAGES:
        taps = ("--engine.tap_execution", "batched" if stage else "sequential")
        commands += [ranks.arguments(shards, tmp_path / f"eager_{stage}", stage, *SIX_STEPS, *taps)]
        commands += [
            ranks.arguments(shards, tmp_path / f"compiled_{stage}", stage, *SIX_STEPS, *taps, "--engine.compile")
        ]
    ranks.run_all(2, commands, timeout=3000)
    largest = 0.0
    for stage in STAGES:
        for column in ("loss/total", "error/pixel/tap_02", "error/feature/tap_01", "beta/tap_01", "grad/norm"):
            compiled, eager = (np.array(ranks.column(tmp_path / f"{k}_{stage}", column)) for k in ("compiled", "eager"))
            assert len(compiled) == 6
            np.testing.assert_allclose(compiled, eager, rtol=2e-5, err_msg=f"{column} at stage {stage}")
            largest = max(largest, float(np.abs(compiled / eager - 1).max()))
    record_result(f"largest relative difference of losses, errors, betas and norms {largest:.1e}")
