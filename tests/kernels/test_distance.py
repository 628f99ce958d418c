"""patch_distance against SciPy's distance transform and the definition, and its argument checks."""

import ddae_kernels as dk
import equations
import numpy as np
import pytest
import torch
from ddae_kernels.implementation import should_check_values
from scipy.ndimage import distance_transform_edt


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (3, 20), (1, 7), (64, 64)])
def test_distances_are_exact(grid):
    generator = torch.Generator().manual_seed(0)
    masked = torch.rand(40, grid[0] * grid[1], generator=generator) < 0.9
    masked[:, 0] = False
    distance = dk.patch_distance(masked, grid)
    assert distance.dtype == torch.float32
    for row, plane in zip(distance.numpy(), masked.view(-1, *grid).numpy(), strict=True):
        np.testing.assert_array_equal(row, distance_transform_edt(plane).astype(np.float32).ravel())


def test_distances_equal_the_definition():
    masked = torch.rand(5, 30, generator=torch.Generator().manual_seed(1)) < 0.75
    np.testing.assert_allclose(dk.patch_distance(masked, (5, 6)), equations.nearest_visible(masked.numpy(), (5, 6)))


def test_distance_between_opposite_corners():
    masked = torch.ones(1, 196, dtype=torch.bool)
    masked[0, 0] = False
    distance = dk.patch_distance(masked, (14, 14))
    assert distance[0, 0] == 0
    assert distance[0, -1] == torch.tensor(2 * 13.0**2).sqrt()


def test_max_norm_hand_computed():
    """One visible corner of 2 x 3 patches: (0 1 2 / 1 sqrt2 sqrt5) / sqrt5. A single masked patch has distance 1."""
    masked = torch.tensor([[False, True, True, True, True, True], [False, False, True, False, False, False]])
    distance = dk.patch_distance(masked, (2, 3), norm="max")
    assert not dk.patch_distance(torch.zeros(1, 6, dtype=torch.bool), (2, 3), norm="max").any()  # no patch is masked
    root = 5**0.5
    expected = [[0, 1 / root, 2 / root, 1 / root, (2 / 5) ** 0.5, 1], [0, 0, 1, 0, 0, 0]]
    np.testing.assert_allclose(distance, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="norm is 'mean'; expected one of none, max"):
        dk.patch_distance(masked, (2, 3), norm="mean")


@pytest.mark.parametrize(
    "masked, grid, message",
    [
        (torch.ones(1, 4, dtype=torch.bool), (2, 2), "without a visible patch"),
        (torch.zeros(1, 4, dtype=torch.bool), (2, 3), "expected \\[B, 6\\]"),
        (torch.zeros(1, 4), (2, 2), "expected bool"),
        (torch.zeros(1, 4, dtype=torch.bool), 4, "grid is 4"),
        (torch.zeros(1, 4, dtype=torch.bool), (-2, -2), "grid is"),
    ],
)
def test_invalid_masks_raise(masked, grid, message):
    with pytest.raises(ValueError, match=message):
        dk.patch_distance(masked, grid)


def test_values_are_checked_on_the_cpu_or_on_request(monkeypatch):
    meta = torch.empty(1, device="meta")
    assert should_check_values(torch.empty(1))
    assert not should_check_values(meta)
    monkeypatch.setenv("DDAE_CHECK", "1")
    assert should_check_values(meta)
