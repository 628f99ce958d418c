"""Label-free statistics against their definitions in float64 NumPy."""

import itertools

import numpy as np
import pytest
import torch

from ddae.method.feature_statistics import (
    effective_rank,
    explained_shares,
    feature_std,
    participation_ratio,
    token_statistics,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(50, 8), (8, 50)])
def test_participation_ratio_is_that_of_the_covariances_eigenvalues(shape):
    features = random(*shape) * torch.linspace(0.1, 2, shape[1]) + 3
    eigenvalues = np.linalg.eigvalsh(np.cov(features.double().numpy().T))
    expected = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    assert float(participation_ratio(features)) == pytest.approx(expected, rel=1e-4)


def test_ranks_of_known_features():
    line = torch.linspace(-1, 1, 40)[:, None] * random(1, 16)
    assert float(participation_ratio(line)) == pytest.approx(1, abs=1e-4)
    assert float(effective_rank(line)) == pytest.approx(1, abs=1e-3)
    axes = torch.eye(16).repeat(4, 1)
    assert float(participation_ratio(axes)) == pytest.approx(15, rel=1e-4)  # centred, they span 15 dimensions
    assert float(effective_rank(axes)) == pytest.approx(16, rel=1e-3)
    assert torch.isnan(participation_ratio(torch.ones(40, 16)))


def test_standard_deviation_of_known_features():
    assert float(feature_std(random(2000, 64))) == pytest.approx(1, abs=0.03)
    assert float(feature_std(torch.ones(40, 16))) == 0
    assert float(feature_std(7 * random(2000, 64))) == pytest.approx(1, abs=0.03)


def test_statistics_of_taps_are_those_of_each_tap():
    tokens = random(3, 40, 20, 8)
    values = token_statistics(tokens)
    for tap, images in enumerate(tokens):
        patches = images[:32, [number * 20 // 16 for number in range(16)]].flatten(0, 1)
        assert values["patch_rank"][tap] == pytest.approx(float(participation_ratio(patches)), rel=1e-4)
        assert values["patch_std"][tap] == pytest.approx(float(feature_std(patches)), rel=1e-4)
        assert values["image_rank"][tap] == pytest.approx(float(participation_ratio(images.mean(1))), rel=1e-4)
        assert values["image_std"][tap] == pytest.approx(float(feature_std(images.mean(1))), rel=1e-4)


def test_explained_shares_are_means_over_pairs():
    """The definition: mean products of different images, of the same position, of the same image."""
    targets = random(2, 4, 5, 3) + random(1, 4, 1, 3, seed=1) + random(1, 1, 1, 3, seed=2)
    positions = torch.stack([torch.randperm(7, generator=torch.Generator().manual_seed(i))[:5] for i in range(4)])
    actual = explained_shares(targets, positions, 7)
    for tap, values in enumerate(targets.double().numpy()):
        products: dict[str, list[float]] = {"constant": [], "image": []}
        at_position: dict[int, list[np.ndarray]] = {}
        for (b, p), (c, q) in itertools.permutations(itertools.product(range(4), range(5)), 2):
            products["image" if b == c else "constant"].append(values[b, p] @ values[c, q])
        for b, p in itertools.product(range(4), range(5)):
            at_position.setdefault(int(positions[b, p]), []).append(values[b, p])
        groups = [each for each in at_position.values() if len(each) > 1]
        means = [np.mean([u @ v for u, v in itertools.permutations(each, 2)]) for each in groups]
        mean_square = (values**2).sum(-1).mean()
        expected = {name: np.mean(each) / mean_square for name, each in products.items()}
        expected["position"] = np.average(means, weights=[len(each) for each in groups]) / mean_square
        for name, value in expected.items():
            assert float(actual[name][tap]) == pytest.approx(value, abs=1e-5)


def test_each_predictor_explains_what_it_knows():
    positions = torch.arange(10).expand(50, 10)
    parts = {"constant": random(1, 1, 32), "position": random(1, 10, 32), "image": random(50, 1, 32)}
    for name, part in parts.items():
        targets = part.expand(50, 10, 32)[None].contiguous()
        shares = {key: float(value) for key, value in explained_shares(targets, positions, 10).items()}
        assert shares[name] == pytest.approx(1, abs=1e-3)
        expected = {"constant": ("constant", "position", "image")}.get(name, (name,))
        for other in set(shares) - set(expected):
            assert abs(shares[other]) < 0.15, (name, other)
    noise = explained_shares(random(1, 50, 10, 32), positions, 10)
    assert all(abs(float(value)) < 0.02 for value in noise.values())


def test_a_single_image_has_no_constant():
    shares = explained_shares(random(1, 1, 6, 4), torch.arange(6)[None], 6)
    assert torch.isnan(shares["constant"]).all()
    assert torch.isnan(shares["position"]).all()
    assert torch.isfinite(shares["image"]).all()
