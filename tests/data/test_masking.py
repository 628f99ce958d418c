import numpy as np
import pytest
import torch

from ddae.data.masking import FAILURES, MASK_KINDS, Mask, _rectangles, sample_mask
from ddae.method.distance import masked_distance, neighbour_weight

GRID = (14, 14)
SEEDS = torch.arange(4096) * 7919


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize(
    "grid, num_masked", [(GRID, 147), (GRID, 75), (GRID, 176), ((8, 8), 48), ((3, 9), 20), ((1, 8), 6)]
)
def test_counts_are_exact_and_every_patch_has_one_place(kind, grid, num_masked):
    patches = grid[0] * grid[1]
    mask = sample_mask(kind, SEEDS[:256], grid, num_masked)
    assert mask.visible.shape == (256, patches - num_masked)
    assert mask.masked.shape == (256, num_masked)
    both = torch.cat([mask.visible, mask.masked], 1)
    assert torch.equal(both.sort(1).values, torch.arange(patches).expand(256, -1))
    assert torch.equal(mask.visible, mask.visible.sort(1).values)
    assert torch.equal(mask.masked, mask.masked.sort(1).values)


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_a_row_depends_on_its_own_seed_alone(kind):
    whole = sample_mask(kind, SEEDS[:64], GRID, 147)
    for i in (0, 17, 63):
        alone = sample_mask(kind, SEEDS[i : i + 1], GRID, 147)
        assert torch.equal(alone.masked[0], whole.masked[i])
    assert not torch.equal(whole.masked[0], whole.masked[1])


# mean distance, share at distance 1, share beyond 2: measured on the published generators, 2000 masks each
PUBLISHED = {"beit_block": (2.8, 0.22, 0.56), "bootmae_block": (1.94, 0.38, 0.35), "random": (1.24, 0.66, 0.05)}


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_distances_are_spread_as_in_the_published_generators(kind):
    mask = sample_mask(kind, SEEDS, GRID, 147)
    distance = masked_distance(mask, GRID)
    mean, at_one, beyond_two = PUBLISHED[kind]
    assert distance.mean() == pytest.approx(mean, rel=0.03)
    assert (distance == 1).float().mean() == pytest.approx(at_one, rel=0.03)
    assert (distance > 2).float().mean() == pytest.approx(beyond_two, abs=0.01)


def sequential_backward(target, grid, generator):
    """A mask as BEiT's description has it: rectangles until `target` patches are covered or ten in a row do not fit."""
    covered = np.zeros(grid, bool)
    while (missing := target - covered.sum()) > 0:
        for _ in range(10):
            area = 16 + generator.random() * (missing - 16)
            aspect = np.exp((2 * generator.random() - 1) * np.log(1 / 0.3))
            tall, wide = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if tall >= grid[0] or wide >= grid[1]:
                continue
            top, left = generator.integers(grid[0] - tall + 1), generator.integers(grid[1] - wide + 1)
            fresh = ~covered[top : top + tall, left : left + wide]
            if 0 < fresh.sum() <= missing:
                covered[top : top + tall, left : left + wide] = True
                break
        else:
            break
    return covered.sum()


@pytest.mark.parametrize("target, published", [(75, 0.665), (147, 0.635)])
def test_beit_gives_up_after_ten_rectangles(target, published):
    """As often as the sequential generator, and as often as 2,000 draws of the published one did."""
    assert FAILURES == 10
    found = _rectangles(SEEDS, GRID, target, target, FAILURES).sum(1)
    generator = np.random.default_rng(0)
    counts = np.array([sequential_backward(target, GRID, generator) for _ in range(2000)])
    complete = float((found == target).float().mean())
    assert complete == pytest.approx((counts == target).mean(), abs=0.04)  # three standard errors
    assert complete == pytest.approx(published, abs=0.04)
    assert float(found.float().mean()) == pytest.approx(counts.mean(), rel=0.01)


def test_bootmae_does_not_give_up():
    assert (_rectangles(SEEDS, GRID, 120, 60).sum(1) == 120).all()


def test_neighbour_weights_by_hand():
    """On 3 x 3 patches with the left column masked: the middle one has 3 masked of 9 around it, the corners 2."""
    masked = torch.tensor([[0, 3, 6]])
    mask = Mask(torch.tensor([[1, 2, 4, 5, 7, 8]]), masked)
    torch.testing.assert_close(neighbour_weight(mask, (3, 3)), torch.tensor([[1 + 2 / 9, 1 + 3 / 9, 1 + 2 / 9]]))
    mean = neighbour_weight(sample_mask("bootmae_block", SEEDS, GRID, 147), GRID).mean()
    assert mean == pytest.approx(1.8, abs=0.05)  # what it makes the losses larger by


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_no_patch_is_always_or_never_masked(kind):
    masked = sample_mask(kind, SEEDS, GRID, 75 if kind == "beit_block" else 147).masked
    rate = torch.bincount(masked.flatten(), minlength=196) / len(SEEDS)
    assert rate.min() > 0.02  # the corners, which few rectangles reach
    assert rate.max() < 0.98
    rate = rate.view(GRID)
    for mirrored in (rate.flip(0), rate.flip(1), rate.T):
        assert (rate - mirrored).abs().max() < 0.06  # no side is favoured


def test_distance_is_read_at_the_masked_patches():
    mask = Mask(visible=torch.tensor([[0]]), masked=torch.tensor([[1, 2, 3, 4, 5]]))
    assert masked_distance(mask, (2, 3)).square().round().tolist() == [[1, 4, 1, 2, 5]]
    over_max = masked_distance(mask, (2, 3), norm="max")
    torch.testing.assert_close(over_max.square(), torch.tensor([[1, 4, 1, 2, 5]]) / 5)


@pytest.mark.parametrize(
    "kind, num_masked, word", [("spiral", 10, "mask kind"), ("random", 0, "num_masked"), ("random", 196, "num_masked")]
)
def test_bad_masks_are_named(kind, num_masked, word):
    with pytest.raises(ValueError, match=word):
        sample_mask(kind, SEEDS[:2], GRID, num_masked)
