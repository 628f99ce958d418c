import numpy as np
import pytest
import torch

from ddae.data.masking import MASK_KINDS, MAX_FAILURES, Mask, _sample_blocks, sample_mask
from ddae.method.distance import masked_distance, neighbour_weight

GRID = (14, 14)
SEEDS = torch.arange(4096) * 7919


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize(
    "grid, num_masked", [(GRID, 147), (GRID, 75), (GRID, 176), ((8, 8), 48), ((3, 9), 20), ((1, 8), 6)]
)
def test_counts_are_exact_and_indices_are_a_sorted_partition(kind, grid, num_masked):
    num_patches = grid[0] * grid[1]
    mask = sample_mask(kind, SEEDS[:256], grid, num_masked)
    assert mask.visible.shape == (256, num_patches - num_masked)
    assert mask.masked.shape == (256, num_masked)
    patches = torch.cat([mask.visible, mask.masked], 1)
    assert torch.equal(patches.sort(1).values, torch.arange(num_patches).expand(256, -1))
    assert torch.equal(mask.visible, mask.visible.sort(1).values)
    assert torch.equal(mask.masked, mask.masked.sort(1).values)


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_mask_depends_only_on_its_own_seed(kind):
    batch = sample_mask(kind, SEEDS[:64], GRID, 147)
    for i in (0, 17, 63):
        single = sample_mask(kind, SEEDS[i : i + 1], GRID, 147)
        assert torch.equal(single.masked[0], batch.masked[i])
    assert not torch.equal(batch.masked[0], batch.masked[1])


# Mean distance, fraction at distance 1, fraction beyond 2, measured on 2000 masks of each published generator.
PUBLISHED = {"beit_block": (2.8, 0.22, 0.56), "bootmae_block": (1.94, 0.38, 0.35), "random": (1.24, 0.66, 0.05)}


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_distance_distribution_matches_published_generators(kind):
    mask = sample_mask(kind, SEEDS, GRID, 147)
    distance = masked_distance(mask, GRID)
    mean, at_one, beyond_two = PUBLISHED[kind]
    assert distance.mean() == pytest.approx(mean, rel=0.03)
    assert (distance == 1).float().mean() == pytest.approx(at_one, rel=0.03)
    assert (distance > 2).float().mean() == pytest.approx(beyond_two, abs=0.01)


def count_covered_sequentially(target, grid, generator):
    """Return the patches covered by BEiT's algorithm: blocks until `target` patches, or ten rejections in a row."""
    covered = np.zeros(grid, bool)
    while (missing := target - covered.sum()) > 0:
        for _ in range(10):
            area = 16 + generator.random() * (missing - 16)
            aspect = np.exp((2 * generator.random() - 1) * np.log(1 / 0.3))
            tall, wide = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if tall >= grid[0] or wide >= grid[1]:
                continue
            top, left = generator.integers(grid[0] - tall + 1), generator.integers(grid[1] - wide + 1)
            uncovered = ~covered[top : top + tall, left : left + wide]
            if 0 < uncovered.sum() <= missing:
                covered[top : top + tall, left : left + wide] = True
                break
        else:
            break
    return covered.sum()


@pytest.mark.parametrize("target, published", [(75, 0.665), (147, 0.635)])
def test_beit_stops_after_ten_rejected_blocks(target, published):
    """Masks are completed by blocks as often as by a sequential generator, and by 2,000 draws of the published one."""
    assert MAX_FAILURES == 10
    covered = _sample_blocks(SEEDS, GRID, target, target, MAX_FAILURES).sum(1)
    generator = np.random.default_rng(0)
    counts = np.array([count_covered_sequentially(target, GRID, generator) for _ in range(2000)])
    complete = float((covered == target).float().mean())
    assert complete == pytest.approx((counts == target).mean(), abs=0.04)  # three standard errors
    assert complete == pytest.approx(published, abs=0.04)
    assert float(covered.float().mean()) == pytest.approx(counts.mean(), rel=0.01)


def test_bootmae_always_covers_its_target():
    assert (_sample_blocks(SEEDS, GRID, 120, 60).sum(1) == 120).all()


def test_neighbour_weights_match_hand_computation():
    """On 3 x 3 patches with the left column masked, 3 of the 9 patches around the middle are masked, 2 at corners."""
    masked = torch.tensor([[0, 3, 6]])
    mask = Mask(torch.tensor([[1, 2, 4, 5, 7, 8]]), masked)
    torch.testing.assert_close(neighbour_weight(mask, (3, 3)), torch.tensor([[1 + 2 / 9, 1 + 3 / 9, 1 + 2 / 9]]))
    mean = neighbour_weight(sample_mask("bootmae_block", SEEDS, GRID, 147), GRID).mean()
    assert mean == pytest.approx(1.8, abs=0.05)  # factor by which the losses grow


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_no_patch_is_always_or_never_masked(kind):
    masked = sample_mask(kind, SEEDS, GRID, 75 if kind == "beit_block" else 147).masked
    frequency = torch.bincount(masked.flatten(), minlength=196) / len(SEEDS)
    assert frequency.min() > 0.02  # corners, which few blocks reach
    assert frequency.max() < 0.98
    frequency = frequency.view(GRID)
    for mirrored in (frequency.flip(0), frequency.flip(1), frequency.T):
        assert (frequency - mirrored).abs().max() < 0.06  # symmetric


def test_distance_is_computed_at_the_masked_patches():
    mask = Mask(visible=torch.tensor([[0]]), masked=torch.tensor([[1, 2, 3, 4, 5]]))
    assert masked_distance(mask, (2, 3)).square().round().tolist() == [[1, 4, 1, 2, 5]]
    over_max = masked_distance(mask, (2, 3), norm="max")
    torch.testing.assert_close(over_max.square(), torch.tensor([[1, 4, 1, 2, 5]]) / 5)


@pytest.mark.parametrize(
    "kind, num_masked, message",
    [("spiral", 10, "mask kind"), ("random", 0, "num_masked"), ("random", 196, "num_masked")],
)
def test_invalid_masks_are_rejected(kind, num_masked, message):
    with pytest.raises(ValueError, match=message):
        sample_mask(kind, SEEDS[:2], GRID, num_masked)
