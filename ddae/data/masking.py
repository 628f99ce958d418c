"""Which patches are masked: exact counts, from one seed a sample (paper section 4.1; METHOD.md).

Shape letters: B images, N patches of a grid H x W, V visible, M masked; V + M = N.

    random          every patch alike                                                              (MAE)
    beit_block      rectangles until M patches are covered                                         (BEiT)
    bootmae_block   rectangles over 120 of 196 patches, the rest at random, 0 to 3 patches shown   (BootMAE)
                    inside the rectangles
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddae.data.rng import uniform

MASK_KINDS = ("bootmae_block", "beit_block", "random")
ROUNDS = 64  # rectangles drawn for an image at a time
FAILURES = 10  # beit_block: rectangles that may fail in a row before the rest is filled at random
LOG_ASPECT = math.log(1 / 0.3)  # sides of a rectangle relate as 0.3 to 1/0.3
SHOWN_INSIDE = 3  # bootmae_block: at most so many visible patches come from inside the rectangles
FILL_STREAM, SHOWN_STREAM = ROUNDS, ROUNDS + 1
RECTANGLE_STREAMS = (0, *range(2 * ROUNDS, 1000 - ROUNDS, ROUNDS))  # first stream of each ROUNDS; crops begin at 1000


class Mask(NamedTuple):
    """Positions of the visible and the masked patches of each image, ascending."""

    visible: Tensor  # int64 [B, V]
    masked: Tensor  # int64 [B, M]

    def to(self, device: torch.device) -> "Mask":
        """On this device; a GPU takes it from pinned memory, so that the host goes on at once."""
        pinned = self if device.type == "cpu" else (each.pin_memory() for each in self)
        return Mask(*(each.to(device, non_blocking=True) for each in pinned))


def sample_mask(kind: str, seeds: Tensor, grid: tuple[int, int], num_masked: int) -> Mask:
    """One mask for each of the seeds (int64 [B]); row i depends on seeds[i] alone.

    Block sizes are those published for 196 patches, scaled to the grid. Raises ValueError for an unknown kind and
    for a count that leaves nothing visible or nothing masked.
    """
    patches = grid[0] * grid[1]
    if kind not in MASK_KINDS:
        raise ValueError(f"mask kind is {kind!r}: choose one of {', '.join(MASK_KINDS)}")
    if not 0 < num_masked < patches:
        raise ValueError(f"num_masked is {num_masked}: expected 1 to {patches - 1} on a grid of {grid[0]} x {grid[1]}")
    score = uniform(seeds, patches, FILL_STREAM)
    shown = torch.zeros(len(seeds), dtype=torch.int64)
    num_visible = patches - num_masked
    if kind == "beit_block":
        score += _rectangles(seeds, grid, num_masked, num_masked, FAILURES)
    elif kind == "bootmae_block":
        covered = min(round(120 * patches / 196), num_masked)
        score += _rectangles(seeds, grid, covered, max(1, round(60 * patches / 196)))
        shown = (uniform(seeds, 1, SHOWN_STREAM)[:, 0] * (SHOWN_INSIDE + 1)).long().clamp(max=num_visible - 1)
    # Ranks by score, rolled by `shown`: the last few, inside the rectangles, come to stand among the visible.
    last = (torch.arange(patches) + shown[:, None]) % patches >= num_visible
    is_masked = torch.empty_like(last).scatter_(1, score.argsort(dim=1, stable=True), last)
    visible, masked = ((~is_masked).nonzero()[:, 1], is_masked.nonzero()[:, 1])
    return Mask(visible.view(-1, num_visible), masked.view(-1, num_masked))


def _rectangles(
    seeds: Tensor, grid: tuple[int, int], target: int, max_block: int, most_failures: int | None = None
) -> Tensor:
    """Rectangles that cover up to `target` patches of each image: bool [B, N].

    Each round draws one rectangle for every unfinished image and keeps it where it covers something new, but not too
    much. most_failures: an image is finished, too, where so many in a row were not kept. In NumPy, whose calls on small
    arrays cost a fifth of torch's.
    """
    height, width = grid
    min_block = max(1, round(16 * height * width / 196))
    rows, columns = np.arange(height), np.arange(width)
    covered = np.zeros((len(seeds), height, width), dtype=bool)
    missing = np.full(len(seeds), target)
    failures = np.zeros(len(seeds), dtype=int)
    for stream in RECTANGLE_STREAMS:
        first = missing.nonzero()[0]  # those that this stream's rounds begin with
        if not len(first):
            break
        draws = uniform(seeds[first], 4, stream, ROUNDS).permute(1, 2, 0).numpy()
        for draw in draws:
            open_ = missing[first] > 0
            unfinished = first[open_]
            if not len(unfinished):
                break
            draw, room = draw[:, open_], missing[unfinished].clip(max=max_block)
            area = min_block + draw[0] * (room - min_block)  # downwards where less room is left: needed to finish
            aspect = np.exp((2 * draw[1] - 1) * LOG_ASPECT)
            tall = np.sqrt((area * aspect).clip(min=0)).round().astype(int)
            wide = np.sqrt((area / aspect).clip(min=0)).round().astype(int)
            top = (draw[2] * (height - tall + 1)).astype(int)[:, None]
            left = (draw[3] * (width - wide + 1)).astype(int)[:, None]
            in_rows = (rows >= top) & (rows < top + tall[:, None])
            in_columns = (columns >= left) & (columns < left + wide[:, None])
            inside = in_rows[:, :, None] & in_columns[:, None, :] & ~covered[unfinished]
            gained = inside.sum((1, 2))
            kept = (tall <= max(1, height - 1)) & (wide <= max(1, width - 1)) & (gained > 0) & (gained <= room)
            covered[unfinished[kept]] |= inside[kept]
            missing[unfinished[kept]] -= gained[kept]
            if most_failures is not None:
                failures[unfinished] = np.where(kept, 0, failures[unfinished] + 1)
                missing[failures >= most_failures] = 0
    return torch.from_numpy(covered).flatten(1)
