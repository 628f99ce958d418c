"""Exact Euclidean distance from each masked patch to the nearest visible patch, on the patch grid.

The reference runs two separable passes of a squared distance transform, first within rows, then across rows:

    d^2(y, x) = min over y' of ((y - y')^2 + min over visible (y', x') of (x - x')^2)

Squared distances are integers, so both passes are exact in fp32 up to grids of 2,896 x 2,896 patches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddae_kernels.implementation import check_choice, resolve_impl, should_check_values

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32

DISTANCE_NORMS = ("none", "max")


def patch_distance(
    masked: Bool[Tensor, "B N"], grid: tuple[int, int], impl: str = "auto", norm: str = "none"
) -> Float32[Tensor, "B N"]:
    """Return the distance of every patch to the nearest visible patch (paper section 3.1): float32 [B, N].

    masked: bool [B, N], True where a patch is masked; grid: (H, W) with H * W = N. The distance of a visible patch is
    0. norm: "none" returns patch units; "max" divides by the largest distance of each image (caption of Fig. 2).

    Raise ValueError if a shape, dtype or option is invalid, or if an image has no visible patch. The last check reads
    values, so it runs only on CPU tensors or with DDAE_CHECK=1; without it such an image gets infinite distances.
    """
    if not isinstance(grid, tuple | list) or len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid is {grid}; expected (rows, columns), both >= 1. Pass the patch grid of the images.")
    height, width = grid
    if masked.dtype != torch.bool:
        raise ValueError(f"masked is {masked.dtype}; expected bool, True where a patch is masked. Convert it.")
    if masked.ndim != 2 or masked.shape[1] != height * width:
        expected = f"expected [B, {height * width}] for grid {grid}, one value per patch"
        raise ValueError(f"masked has shape {list(masked.shape)}; {expected}. Pass the grid that fits masked.")
    if should_check_values(masked) and bool(masked.all(1).any()):
        expected = "expected at least one, otherwise its distances are undefined"
        raise ValueError(f"masked contains an image without a visible patch; {expected}. Unmask a patch of each image.")
    check_choice("norm", norm, DISTANCE_NORMS)
    if resolve_impl(impl, masked.device) == "triton":
        from ddae_kernels import operators  # imported on first use: Triton may not be installed

        return operators.patch_distance(masked, *grid, norm == "max")
    squared = torch.zeros(masked.shape, device=masked.device).masked_fill_(masked, torch.inf).view(-1, height, width)
    squared = (squared[:, :, None, :] + _squared_offsets(width, squared)).amin(-1)  # within each row
    squared = (squared[:, None, :, :] + _squared_offsets(height, squared)[:, :, None]).amin(2)  # across rows
    # The fp32 sqrt of CPU builds is off by one ulp for some integers. An fp64 sqrt, rounded, keeps equal d^2 equal.
    distance = squared.double().sqrt().float().flatten(1)
    if norm == "none":
        return distance
    largest = distance.amax(1, keepdim=True)
    return distance / torch.where(largest > 0, largest, 1)


def _squared_offsets(length: int, like: Tensor) -> Tensor:
    """Return (i - j)^2 for all pairs of positions: [length, length], dtype and device of `like`."""
    positions = torch.arange(length, device=like.device, dtype=like.dtype)
    return (positions[:, None] - positions).square()
