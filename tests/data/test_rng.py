import torch

from ddae.data.rng import fold, permutation, uniform


def test_mix_matches_published_splitmix64():
    """The first outputs of SplitMix64 with seed 1234567, as of Java's SplittableRandom and others."""
    from ddae.data.rng import GOLDEN_GAMMA, mix

    states = torch.tensor(1234567) + torch.arange(1, 4) * GOLDEN_GAMMA
    assert [value % 2**64 for value in mix(states).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_uniform_is_uniform():
    numbers = uniform(torch.arange(1000), 100)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.005
    assert abs(numbers.var() - 1 / 12) < 0.002
    neighbours = torch.corrcoef(torch.stack([numbers[:-1].flatten(), numbers[1:].flatten()]))[0, 1]
    assert abs(neighbours) < 0.02


def test_streams_and_seeds_give_different_numbers():
    seeds = torch.tensor([1, 2])
    assert not torch.equal(uniform(seeds, 5)[0], uniform(seeds, 5)[1])
    assert not torch.equal(uniform(seeds, 5, stream=1), uniform(seeds, 5))


def test_fold_depends_on_order_and_value_of_keys():
    assert fold(1, 2) != fold(2, 1)
    assert fold(1, torch.arange(1000)).unique().numel() == 1000


def test_permutation_is_complete_and_reproducible():
    first = permutation(1000, 3, 4)
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert torch.equal(first, permutation(1000, 3, 4))
    assert not torch.equal(first, permutation(1000, 3, 5))
