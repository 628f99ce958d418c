"""Random numbers as a pure function of their keys, so that no rank, worker or restart can change them.

SplitMix64 (Steele, Lea and Flood, 2014) on int64 tensors of the CPU, whose products wrap as the generator wants. The
same keys give the same bits everywhere.
"""

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
FACTORS = (-4658895280553007687, -7723592293110705685)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _shift_right(bits: Tensor, places: int) -> Tensor:
    return (bits >> places) & ((1 << (64 - places)) - 1)  # logical: int64's own shift copies the sign


def mix(bits: Tensor) -> Tensor:
    """SplitMix64's output function: a bijection of int64 that scatters neighbouring inputs."""
    bits = (bits ^ _shift_right(bits, 30)) * FACTORS[0]
    bits = (bits ^ _shift_right(bits, 27)) * FACTORS[1]
    return bits ^ _shift_right(bits, 31)


def fold(*keys: int | Tensor) -> Tensor:
    """One int64 from several keys, each a number or an int64 tensor; tensors broadcast."""
    state = torch.zeros((), dtype=torch.int64)
    for key in keys:
        state = mix((state ^ torch.as_tensor(key, dtype=torch.int64)) + GOLDEN)
    return state


def uniform(seeds: Tensor, count: int, stream: int = 0, streams: int = 1) -> Tensor:
    """`count` numbers in [0, 1) for each seed: int64 [B] -> float64 [B, count], or of so many streams from `stream` on:
    [B, streams, count]. Streams are independent."""
    numbers = torch.arange(stream, stream + streams)[:, None] << 32
    counters = (torch.arange(1, count + 1) + numbers) * GOLDEN
    drawn = _shift_right(mix(mix(seeds)[:, None, None] + counters), 11).double() * 2.0**-53
    return drawn if streams > 1 else drawn[:, 0]


def permutation(length: int, *keys: int) -> Tensor:
    """A permutation of 0 .. length - 1: int64 [length]."""
    return mix(fold(*keys) + torch.arange(1, length + 1) * GOLDEN).argsort(stable=True)
