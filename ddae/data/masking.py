"""Mask sampling: which patches are masked, with an exact count per image (paper section 4.1; METHOD.md).

Shape letters: B images, N patches of a grid H x W, V visible, M masked; V + M = N.

    random          uniformly random patches                                                            (MAE)
    beit_block      blocks until M patches are covered                                                  (BEiT)
    bootmae_block   blocks over 120 of 196 patches, random patches for the rest; 0 to 3 patches inside  (BootMAE)
                    the blocks are left unmasked

A mask is a function of the sample's seed alone.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddae.data.rng import uniform

MASK_KINDS = ("bootmae_block", "beit_block", "random")
BLOCKS_PER_STREAM = 64  # candidate blocks of an image that are drawn together
MAX_FAILURES = 10  # beit_block: consecutive rejected blocks after which random patches complete the mask
LOG_ASPECT = math.log(1 / 0.3)  # a block's height over its width is log-uniform in 0.3 to 1/0.3
MAX_UNMASKED_IN_BLOCKS = 3  # bootmae_block
FILL_STREAM, UNMASK_STREAM = BLOCKS_PER_STREAM, BLOCKS_PER_STREAM + 1
# First random stream of each group of candidates; those from 1000 on belong to the crops (sampling.py).
BLOCK_STREAMS = (0, *range(2 * BLOCKS_PER_STREAM, 1000 - BLOCKS_PER_STREAM, BLOCKS_PER_STREAM))


class Mask(NamedTuple):
    """Indices of the visible and the masked patches of each image, ascending."""

    visible: Tensor  # int64 [B, V]
    masked: Tensor  # int64 [B, M]

    def to(self, device: torch.device) -> "Mask":
        """Return the mask on this device."""
        return Mask(*(to_device(indices, device) for indices in self))


def to_device(indices: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on this device. To a GPU it is copied from pinned memory, without host synchronisation."""
    return (indices if device.type == "cpu" else indices.pin_memory()).to(device, non_blocking=True)


def sample_mask(kind: str, seeds: Tensor, grid: tuple[int, int], num_masked: int) -> Mask:
    """Sample one mask per seed: seeds int64 [B] -> Mask. Row i depends on seeds[i] alone.

    Block sizes are those published for 196 patches, scaled to the grid. Raise ValueError for an unknown kind, and for
    a count that leaves no visible or no masked patch.
    """
    num_patches = grid[0] * grid[1]
    if kind not in MASK_KINDS:
        raise ValueError(f"mask kind is {kind!r}; expected one of {', '.join(MASK_KINDS)}.")
    if not 0 < num_masked < num_patches:
        raise ValueError(
            f"num_masked is {num_masked}; expected 1 to {num_patches - 1} on a grid of {grid[0]} x {grid[1]} patches."
        )
    num_visible = num_patches - num_masked
    scores = uniform(seeds, num_patches, FILL_STREAM)  # patches with the highest scores are masked
    num_unmasked = torch.zeros(len(seeds), dtype=torch.int64)
    if kind == "beit_block":
        scores += _sample_blocks(seeds, grid, num_masked, num_masked, MAX_FAILURES)
    elif kind == "bootmae_block":
        num_covered = min(round(120 * num_patches / 196), num_masked)
        scores += _sample_blocks(seeds, grid, num_covered, max(1, round(60 * num_patches / 196)))
        draws = uniform(seeds, 1, UNMASK_STREAM)[:, 0]
        num_unmasked = (draws * (MAX_UNMASKED_IN_BLOCKS + 1)).long().clamp(max=num_visible - 1)
    # Masked are the ranks V .. N - 1, shifted down by num_unmasked, so that the top ones, inside blocks, stay visible.
    is_masked_rank = (torch.arange(num_patches) + num_unmasked[:, None]) % num_patches >= num_visible
    is_masked = torch.empty_like(is_masked_rank).scatter_(1, scores.argsort(dim=1, stable=True), is_masked_rank)
    visible, masked = ((~is_masked).nonzero()[:, 1], is_masked.nonzero()[:, 1])
    return Mask(visible.view(-1, num_visible), masked.view(-1, num_masked))


def _sample_blocks(
    seeds: Tensor, grid: tuple[int, int], num_covered: int, max_block: int, max_failures: int | None = None
) -> Tensor:
    """Cover up to `num_covered` patches of each image with blocks: seeds int64 [B] -> bool [B, N].

    Each iteration draws one candidate block for every incomplete image. A candidate is accepted if it covers at least
    one new patch and no more than are missing. After max_failures consecutive rejections an image counts as complete.
    max_block: largest area in patches. NumPy, whose calls on small arrays take a fifth of the time of torch's.
    """
    height, width = grid
    min_block = max(1, round(16 * height * width / 196))
    rows, columns = np.arange(height), np.arange(width)
    covered = np.zeros((len(seeds), height, width), dtype=bool)
    missing = np.full(len(seeds), num_covered)
    failures = np.zeros(len(seeds), dtype=int)
    for stream in BLOCK_STREAMS:
        active = missing.nonzero()[0]  # images that are incomplete when this stream begins
        if not len(active):
            break
        candidates = uniform(seeds[active], 4, stream, BLOCKS_PER_STREAM).permute(1, 2, 0).numpy()
        for draws in candidates:  # float64 [4, len(active)]
            still_active = missing[active] > 0
            images = active[still_active]
            if not len(images):
                break
            draws, max_area = draws[:, still_active], missing[images].clip(max=max_block)
            # If fewer than min_block patches are missing, areas are drawn between the two, so that blocks still fit.
            area = min_block + draws[0] * (max_area - min_block)
            aspect = np.exp((2 * draws[1] - 1) * LOG_ASPECT)
            tall = np.sqrt((area * aspect).clip(min=0)).round().astype(int)
            wide = np.sqrt((area / aspect).clip(min=0)).round().astype(int)
            top = (draws[2] * (height - tall + 1)).astype(int)[:, None]
            left = (draws[3] * (width - wide + 1)).astype(int)[:, None]
            in_rows = (rows >= top) & (rows < top + tall[:, None])
            in_columns = (columns >= left) & (columns < left + wide[:, None])
            newly_covered = in_rows[:, :, None] & in_columns[:, None, :] & ~covered[images]
            gain = newly_covered.sum((1, 2))
            fits = (tall <= max(1, height - 1)) & (wide <= max(1, width - 1))
            accepted = fits & (gain > 0) & (gain <= max_area)
            covered[images[accepted]] |= newly_covered[accepted]
            missing[images[accepted]] -= gain[accepted]
            if max_failures is not None:
                failures[images] = np.where(accepted, 0, failures[images] + 1)
                missing[failures >= max_failures] = 0
    return torch.from_numpy(covered).flatten(1)
