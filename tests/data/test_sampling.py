import numpy as np
import pytest
import torch
import torchvision

from ddae.data.sampling import ASPECT_RANGE, SHUFFLE_WINDOW, EpochOrder, random_crops


def test_every_epoch_contains_every_sample_once():
    order = EpochOrder(np.array([0, 40, 64, 100]), seed=3)
    epochs, samples = order.samples(torch.arange(300))
    assert torch.equal(epochs, torch.arange(300) // 100)
    for epoch in range(3):
        assert torch.equal(samples[epochs == epoch].sort().values, torch.arange(100))
    assert not torch.equal(samples[:100], samples[100:200])


def test_sample_of_a_position_does_not_depend_on_others():
    order = EpochOrder(np.array([0, 40, 64, 100]), seed=3)
    _, batch = order.samples(torch.arange(90, 210))
    singles = [
        EpochOrder(np.array([0, 40, 64, 100]), seed=3).samples(torch.tensor([p]))[1].item() for p in (90, 100, 209)
    ]
    assert batch[[0, 10, 119]].tolist() == singles


def test_reads_stay_within_a_shuffle_window():
    shard_starts = np.arange(0, 101) * 10
    _, samples = EpochOrder(shard_starts, seed=0).samples(torch.arange(1000))
    shards = samples // 10
    for start in range(0, 1000, SHUFFLE_WINDOW * 10):
        assert len(shards[start : start + SHUFFLE_WINDOW * 10].unique()) <= SHUFFLE_WINDOW
    assert not torch.equal(shards, shards.sort().values)


def test_shards_near_include_the_next_window_across_epochs():
    order = EpochOrder(np.arange(0, 401, 10), 3)  # 40 shards: windows of 16, 16 and 8
    for position in (0, 170, 330, 399, 405):
        windows = [
            set(
                (
                    np.searchsorted(order.shard_starts, order.samples(torch.arange(start, end))[1], side="right") - 1
                ).tolist()
            )
            for start, end in ((0, 160), (160, 320), (320, 400), (400, 560), (560, 720))
        ]
        current = [0, 160, 320, 400].index(max(start for start in (0, 160, 320, 400) if start <= position))
        assert set(order.shards_near(position)) == windows[current] | windows[current + 1]


def test_seeds_differ_by_seed_epoch_and_sample():
    shard_starts = np.array([0, 1000])
    epochs, samples = torch.arange(5).repeat_interleave(1000), torch.arange(1000).repeat(5)
    seeds = [EpochOrder(shard_starts, seed).seeds(epochs, samples) for seed in (0, 1)]
    assert torch.cat(seeds).unique().numel() == 10000


def test_random_crops_fit_and_cover_their_area_range():
    count = 20000
    seeds = torch.arange(count) * 104729
    width, height = torch.full((count,), 500), torch.full((count,), 375)
    boxes, flips = random_crops(seeds, width, height, (0.2, 1.0))
    left, top, wide, tall = boxes.unbind(1)
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + wide <= 500).all()
    assert (top + tall <= 375).all()
    area = wide * tall / (500 * 375)
    assert area.min() > 0.19
    aspect = wide / tall
    assert aspect.min() > ASPECT_RANGE[0] * 0.97
    assert aspect.max() < ASPECT_RANGE[1] * 1.03
    assert flips.float().mean() == pytest.approx(0.5, abs=0.02)
    assert (left == 0).any()
    assert (left + wide == 500).any()


def test_random_crops_are_distributed_as_torchvision():
    """Compare means and standard deviations of area, aspect and corner with RandomResizedCrop."""
    get_params = torchvision.transforms.RandomResizedCrop.get_params
    torch.manual_seed(0)
    expected = torch.tensor(
        [get_params(torch.empty(3, 375, 500), (0.2, 1.0), ASPECT_RANGE) for _ in range(8000)]
    ).float()
    top, left, tall, wide = expected.unbind(1)
    sides = torch.full((8000,), 500), torch.full((8000,), 375)
    boxes, _ = random_crops(torch.arange(8000) * 104729, *sides, (0.2, 1.0))
    our_left, our_top, our_wide, our_tall = boxes.float().unbind(1)
    for a, b in (
        (wide * tall, our_wide * our_tall),
        (wide / tall, our_wide / our_tall),
        (top, our_top),
        (left, our_left),
    ):
        assert b.mean() == pytest.approx(a.mean().item(), rel=0.04)
        assert b.std() == pytest.approx(a.std().item(), rel=0.04)


@pytest.mark.parametrize("width, height, box", [(1000, 10, (493, 0, 13, 10)), (10, 1000, (0, 493, 10, 13))])
def test_elongated_images_are_cropped_centrally(width, height, box):
    sides = torch.tensor([width]), torch.tensor([height])
    boxes, _ = random_crops(torch.tensor([5]), *sides, (0.9, 1.0))
    assert torch.equal(boxes[0], torch.tensor(box))
