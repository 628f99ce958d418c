"""Betas: gradient, optimizer, clamping and checkpoints."""

import ddae_kernels as dk
import equations
import numpy as np
import pytest
import torch

from ddae.config.pretrain import DynamicConfig
from ddae.data.masking import sample_mask
from ddae.method.betas import Betas
from ddae.method.distance import masked_distance

CPU = torch.device("cpu")
GRID = (14, 14)


def distances(first, count):
    return masked_distance(sample_mask("bootmae_block", torch.arange(first, first + count), GRID, 147), GRID)


def build(names=("tap_03", "tap_12"), **options):
    return Betas(list(names), DynamicConfig(**options), (0.9, 0.95), CPU)


@pytest.mark.parametrize("norm_batch", [1.0, 256.0])
def test_gradient_of_eq_6(norm_batch):
    """Gradient of the loss + 0.5 * slope of the norm over the whole batch + beta_l2, with two micro-batches."""
    whole = distances(0, 8)
    betas = build(beta_init=(-0.5, 0.7), norm_batch=norm_batch)
    rng = np.random.default_rng(0)
    error = torch.tensor(rng.random((2, 8, 147, 1)), dtype=torch.float32)
    for half in (slice(0, 4), slice(4, 8)):
        loss = dk.dynamic_mse(
            error[:, half].sqrt(), torch.zeros(2, 4, 147, 1), whole[half], betas.clamped(), torch.ones(2)
        )
        (loss.loss / 2).backward()  # each micro-batch is half of the step
        betas.accumulate_norm(whole[half])
    values = betas.values.detach().double().numpy()
    betas.step(1e-3, applied=torch.zeros(()))
    exact = whole.double().numpy()
    _, _, _, loss_part, terms = equations.dynamic_loss(
        error.sqrt().double().numpy(), np.zeros((2, 8, 147, 1)), exact, values, np.ones(2)
    )
    expected = loss_part + 0.5 * norm_batch**0.5 * equations.weight_norm_slope(exact, values) + 0.05 * values
    assert (np.abs(betas.gradient.numpy() - expected) <= 1e-6 * (terms + np.abs(expected))).all()
    regulariser = 0.5 * equations.weight_norm(exact, values, norm_batch).sum() + 0.025 * (values**2).sum()
    np.testing.assert_allclose(betas.regulariser, regulariser, rtol=1e-6)


def test_optimizer_is_adam_without_weight_decay():
    betas, reference = build(lr_mult=2.0), np.full(2, -0.5)
    first, second = np.zeros(2), np.zeros(2)
    for step in range(1, 51):
        betas.accumulate_norm(distances(step, 4))
        betas.step(1e-3, applied=torch.ones(()))
        gradient = betas.gradient.double().numpy()
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
        reference -= 2e-3 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.95**step)) + 1e-8)
    np.testing.assert_allclose(betas.values.detach(), reference, atol=1e-6)
    assert (betas.values > -0.45).all()  # without a loss, the regulariser's gradient increases them


@pytest.mark.parametrize("options, applied", [({}, False), ({"learnable": False}, True)])
def test_betas_are_constant_if_not_learnable_or_step_skipped(options, applied):
    betas = build(**options)
    betas.accumulate_norm(distances(0, 4))
    betas.step(1.0, torch.tensor(float(applied)))
    assert (betas.values == -0.5).all()


def test_betas_are_clamped():
    betas = build(beta_init=(-40.0, 9.0))
    assert betas.clamped().tolist() == [-16, 3]


def test_state_dict_round_trip():
    one, other = build(), build()
    for step in range(3):
        one.accumulate_norm(distances(step, 4))
        one.step(0.1, applied=torch.ones(()))
    other.load_state_dict(one.state_dict())
    for betas in (one, other):
        betas.accumulate_norm(distances(9, 4))
        betas.step(0.1, applied=torch.ones(()))
    assert torch.equal(one.values, other.values)


def test_model_without_betas():
    betas = build(names=())
    betas.accumulate_norm(distances(0, 2))
    betas.step(1.0, applied=torch.ones(()))
    assert betas.regulariser == 0


def test_state_of_unfused_adamw_loads(tmp_path):
    """State dicts of a for-loop AdamW, which has other flags in its parameter groups."""
    config = DynamicConfig()
    betas, unfused = (Betas(["tap_03"], config, (0.9, 0.95), torch.device("cpu")) for _ in range(2))
    unfused.optimizer = torch.optim.AdamW([unfused.values], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    unfused.values.grad = torch.ones(1)
    unfused.optimizer.step()
    betas.load_state_dict(unfused.state_dict())
    betas.accumulate_norm(torch.tensor([[1.0, 2.0]]))
    betas.step(0.1, torch.zeros(()))
    assert torch.equal(betas.values, unfused.values)
    betas.accumulate_norm(torch.tensor([[1.0, 2.0]]))
    betas.step(0.1, torch.ones(()))
    assert not torch.equal(betas.values, unfused.values)
    assert int(betas.optimizer.state[betas.values]["step"]) == 2
