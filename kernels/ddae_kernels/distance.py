"""Exact Euclidean distance from each masked patch to the nearest visible one, on the patch grid.

Squared distances are integers, so both passes below are exact in fp32 up to grids of 2,896 patches a side: first the
nearest visible patch within each row, then over the rows,

    d^2(y, x) = min over y' of (y - y')^2 + min over x' with (y', x') visible of (x - x')^2.
"""

import torch
from torch import Tensor

from ddae_kernels.implementation import choose, values_are_checked

DISTANCE_NORMS = ("none", "max")


def patch_distance(masked: Tensor, grid: tuple[int, int], impl: str = "auto", norm: str = "none") -> Tensor:
    """Distance of every patch to the nearest visible patch, 0 where visible (paper section 3.1).

    masked: bool [B, N], True where a patch is masked; grid: (H, W) with H * W = N. norm: "none" gives patch units,
    "max" divides by the image's largest distance, so that it becomes 1 (caption of Fig. 2). Returns float32 [B, N].
    Raises ValueError for another shape or dtype, and (values: CPU or DDAE_CHECK=1) for an image without a visible
    patch; unchecked, the distances of such an image are infinite.
    """
    if not isinstance(grid, tuple | list) or len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid is {grid}: expected (rows, columns) of patches")
    height, width = grid
    if masked.ndim != 2 or masked.shape[1] != height * width:
        raise ValueError(f"masked is {tuple(masked.shape)}: expected [B, {height * width}] for the grid {grid}")
    if masked.dtype != torch.bool:
        raise ValueError(f"masked is {masked.dtype}: expected bool, True where a patch is masked")
    if values_are_checked(masked) and bool(masked.all(1).any()):
        raise ValueError("masked has an image without a visible patch: its distances are undefined")
    if norm not in DISTANCE_NORMS:
        raise ValueError(f"norm is {norm!r}: choose one of {', '.join(DISTANCE_NORMS)}")
    if choose(impl, masked.device) == "triton":
        from ddae_kernels import operators  # at need: it imports Triton, which may not be there

        return operators.patch_distance(masked, *grid, norm == "max")
    cost = torch.zeros(masked.shape, device=masked.device).masked_fill_(masked, torch.inf).view(-1, height, width)
    cost = (cost[:, :, None, :] + _squared_offsets(width, cost)).amin(-1)  # nearest within the row
    cost = (cost[:, None, :, :] + _squared_offsets(height, cost)[:, :, None]).amin(2)  # nearest over the rows
    # Rounded from fp64: the fp32 root of CPU builds is an ulp off for some integers, and equal d^2 must stay equal.
    distance = cost.double().sqrt().float().flatten(1)
    if norm == "none":
        return distance
    largest = distance.amax(1, keepdim=True)
    return distance / torch.where(largest > 0, largest, 1)


def _squared_offsets(length: int, like: Tensor) -> Tensor:
    places = torch.arange(length, device=like.device, dtype=like.dtype)
    return (places[:, None] - places).square()
