"""Counter-based random numbers: pure functions of their keys, independent of ranks, workers and restarts.

SplitMix64 (Steele, Lea and Flood, 2014) on int64 CPU tensors, whose multiplication wraps modulo 2**64 as the generator
requires. The same keys give the same bits on every machine.
"""

import torch
from torch import Tensor

GOLDEN_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
MIX_FACTORS = (-4658895280553007687, -7723592293110705685)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _logical_shift_right(bits: Tensor, shift: int) -> Tensor:
    return (bits >> shift) & ((1 << (64 - shift)) - 1)  # int64's own shift copies the sign bit


def mix(bits: Tensor) -> Tensor:
    """Apply SplitMix64's output function, a bijection of int64 that decorrelates neighbouring inputs."""
    bits = (bits ^ _logical_shift_right(bits, 30)) * MIX_FACTORS[0]
    bits = (bits ^ _logical_shift_right(bits, 27)) * MIX_FACTORS[1]
    return bits ^ _logical_shift_right(bits, 31)


def fold(*keys: int | Tensor) -> Tensor:
    """Hash several keys, each an int or an int64 tensor, into one int64; tensors broadcast."""
    state = torch.zeros((), dtype=torch.int64)
    for key in keys:
        state = mix((state ^ torch.as_tensor(key, dtype=torch.int64)) + GOLDEN_GAMMA)
    return state


def uniform(seeds: Tensor, count: int, stream: int = 0, num_streams: int = 1) -> Tensor:
    """Return `count` uniform numbers in [0, 1) per seed: int64 [B] -> float64 [B, count].

    With num_streams > 1: those of the streams `stream` to `stream` + num_streams - 1, float64 [B, num_streams, count].
    Streams are independent.
    """
    offsets = torch.arange(stream, stream + num_streams)[:, None] << 32
    counters = (torch.arange(1, count + 1) + offsets) * GOLDEN_GAMMA
    numbers = _logical_shift_right(mix(mix(seeds)[:, None, None] + counters), 11).double() * 2.0**-53
    return numbers if num_streams > 1 else numbers[:, 0]


def permutation(length: int, *keys: int) -> Tensor:
    """Return a random permutation of 0 .. length - 1: int64 [length]."""
    return mix(fold(*keys) + torch.arange(1, length + 1) * GOLDEN_GAMMA).argsort(stable=True)
