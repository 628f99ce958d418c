"""The expected duration of a run."""

import pytest
import torch

from ddae.config.cli import parse
from ddae.data.reader import RankBatch
from ddae.training import duration
from ddae.training.flops import count_model_flops


def test_duration_is_flops_over_the_measured_rate(monkeypatch):
    """Two ranks share a step; twice the steps take twice the time."""
    config = parse("--preset demo --data.batch_size 8".split())
    monkeypatch.setattr(duration, "product_rate", lambda config, images: 1e9)
    seconds = duration.expected_seconds(config, 100, RankBatch(8, 8, 0, 1))
    assert seconds == pytest.approx(100 * 8 * count_model_flops(config).total / (1e9 * duration.EFFICIENCY["cpu"]))
    assert duration.expected_seconds(config, 200, RankBatch(8, 4, 0, 2)) == pytest.approx(seconds)


def test_the_rate_is_that_of_the_product(monkeypatch):
    """A product that is repeated twenty times in place of once has a twentieth of the rate, up to noise."""
    config = parse("--preset demo --model.width 384".split())
    plain = duration.product_rate(config, 16)
    matmul = torch.Tensor.__matmul__

    def slow(left, right):
        for _ in range(19):
            matmul(left, right)
        return matmul(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", slow)
    assert plain / 60 < duration.product_rate(config, 16) < plain / 5
