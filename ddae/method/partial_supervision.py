"""Random parts of the supervision, for cheaper steps: some taps of a step, some masked patches of an image.

A part's loss is weighted so that its mean over all parts is the loss of the whole, and so for its gradient. Draws are
keyed as masks are: the taps by the run's seed and the step, equal on all ranks; the patches by the sample's seed.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ddae.data.rng import permutation, uniform

SUBSET_STREAM = 2000  # of a sample's seed; masks use streams below 1000, crops 1000 and 1001


def draw_taps(num_taps: int, count: int, seed: int) -> tuple[int, ...]:
    """Return the indices of `count` of `num_taps` taps, ascending; of all, if count is 0 or not smaller."""
    if not 0 < count < num_taps:
        return tuple(range(num_taps))
    with torch.device("cpu"):  # also where FLOPs are counted on a meta model
        return tuple(sorted(permutation(num_taps, seed)[:count].tolist()))


def draw_subset(seeds: Int64[Tensor, " B"], num_masked: int, count: int) -> Int64[Tensor, "B S"] | None:
    """Return the places of `count` of an image's masked patches, ascending; None for all."""
    if count >= num_masked:
        return None
    return uniform(seeds, num_masked, SUBSET_STREAM).argsort(1)[:, :count].sort(1).values


def spread_over_taps(values: Float[Tensor, "k ..."], indices: Sequence[int], num_taps: int) -> Float[Tensor, "K ..."]:
    """Return the values of all taps: those at the indices, NaN at the others."""
    if len(indices) == num_taps:
        return values
    by_index, missing = dict(zip(indices, values, strict=True)), values.new_full(values.shape[1:], torch.nan)
    return torch.stack([by_index.get(index, missing) for index in range(num_taps)])
