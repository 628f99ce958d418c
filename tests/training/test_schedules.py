"""Schedules of learning rate, teacher momentum and feature weight."""

import itertools

import pytest

from ddae.training.schedules import TEACHER_LINE, ramp, teacher_momentum, warmup_cosine, warmup_linear


def test_warmup_cosine():
    rates = [warmup_cosine(step, 100, 10, 1.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[54] == pytest.approx(0.55, abs=0.02)
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


def test_warmup_linear_equals_mmsegmentations_poly_schedule():
    """PolyLrUpdater: min_lr + (lr - min_lr) (1 - step / steps), times 1 - (1 - step / warm-up)(1 - ratio)."""
    for step in (0, 1, 700, 1499, 1500, 80_000, 159_999):
        lr = 4e-4 * (1 - step / 160_000)
        expected = lr * (1 - (1 - step / 1500) * (1 - 1e-6)) if step < 1500 else lr
        assert warmup_linear(step, 160_000, 1500, 4e-4, 0.0) == pytest.approx(expected, rel=1e-12), step
    assert warmup_linear(0, 160_000, 1500, 4e-4, 0.0) == pytest.approx(4e-10)


def test_lr_never_exceeds_a_peak_below_the_minimum():
    rates = [warmup_cosine(step, 50, 5, 1e-5, 1e-4) for step in range(50)]
    assert max(rates) == 1e-5


@pytest.mark.parametrize(
    "epoch, momentum", [(0, 0.999), (50, 0.99945), (100, 0.9999), (250, 0.999945), (400, 0.99999), (799, 0.99999)]
)
def test_teacher_momentum_schedule(epoch, momentum):
    assert teacher_momentum(epoch, 4096) == pytest.approx(momentum, abs=1e-12)


@pytest.mark.parametrize(
    "epoch, momentum", [(0, 0.999), (100, 0.9992475), (200, 0.999495), (400, 0.99999), (799, 0.99999)]
)
def test_linear_teacher_momentum_of_appendix_a(epoch, momentum):
    assert teacher_momentum(epoch, 4096, TEACHER_LINE) == pytest.approx(momentum, abs=1e-12)


def test_teacher_momentum_has_the_same_half_life_in_samples():
    assert teacher_momentum(100, 1024) ** 4 == pytest.approx(0.9999)


def test_ramp():
    assert [ramp(step, 4) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert ramp(0, 0) == 1
