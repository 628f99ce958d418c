"""Patches of images and their places: cutting, putting together, sin-cos position tables.

Shape letters: B images, N patches of a grid H x W, D width, P numbers of a patch in (row, column, channel) order.
"""

from functools import cache

import torch
from ddae_kernels.reference import patchify
from torch import Tensor

__all__ = [
    "constant",
    "gather_tokens",
    "normalise",
    "normalise_patches",
    "patchify",
    "sincos_positions",
    "unpatchify",
]

NORMALISATIONS = {  # mean and std of pixels in [0, 1]
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
LAYOUTS = ("rowfirst", "colfirst")


@cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """These numbers as float32 on the device, sent there once. (A buffer would follow its module into bf16.)"""
    return torch.tensor(values, device=device)


def normalise(images_u8: Tensor, normalisation: str, dtype: torch.dtype) -> Tensor:
    """uint8 [B, 3, H, W] -> floats of mean about 0 and deviation about 1, on the images' own device."""
    mean, std = (constant(x, images_u8.device).view(3, 1, 1) for x in NORMALISATIONS[normalisation])
    return ((images_u8.float() / 255 - mean) / std).to(dtype)


def normalise_patches(patches_u8: Tensor, normalisation: str, dtype: torch.dtype) -> Tensor:
    """The same of patches that are cut already: uint8 [.., P] -> [.., P]."""
    mean, std = (constant(x, patches_u8.device) for x in NORMALISATIONS[normalisation])
    return ((patches_u8.unflatten(-1, (-1, 3)).float() / 255 - mean) / std).flatten(-2).to(dtype)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """[B, N, P] -> [B, 3, H * patch, W * patch]; the inverse of `patchify`."""
    tiles = patches.reshape(len(patches), *grid, patch, patch, 3)
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), 3, grid[0] * patch, grid[1] * patch)


def gather_tokens(tokens: Tensor, positions: Tensor) -> Tensor:
    """Tokens at the given positions of each image: [B, N, D], int64 [B, V] -> [B, V, D]."""
    return tokens.gather(1, positions[:, :, None].expand(-1, -1, tokens.shape[-1]))


def sincos_positions(grid: tuple[int, int], width: int, layout: str) -> Tensor:
    """Fixed 2-D sin-cos positions with a zero row for the cls token in front: float32 [1, 1 + N, D].

    One half of the width encodes a patch's row, the other its column, each as sines then cosines of falling
    frequency. "rowfirst" puts the row in the first half (BootMAE, MoCo v3), "colfirst" the column (MAE).
    """
    if layout not in LAYOUTS:
        raise ValueError(f"model.positions is {layout!r}: choose one of {', '.join(LAYOUTS)}")
    if width % 4:
        raise ValueError(f"a width of {width} cannot hold sin-cos positions: choose a multiple of 4")
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    halves = []
    for places in (rows, columns) if layout == "rowfirst" else (columns, rows):
        angles = places.reshape(-1, 1) * frequencies
        halves += [angles.sin(), angles.cos()]
    table = torch.cat(halves, 1)
    return torch.cat([table.new_zeros(1, width), table])[None].float()
