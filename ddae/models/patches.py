"""Image patches: extraction, reassembly, normalisation, sin-cos position tables.

Shape letters: B images, N patches of a grid H x W, V selected patches, D width, P values of a patch in (row, column,
channel) order.
"""

from functools import cache

import torch
from ddae_kernels.reference import patchify as patchify  # of this module, too
from jaxtyping import Float, Int64, Shaped, UInt8
from torch import Tensor

NORMALISATIONS = {  # mean and std of pixels in [0, 1]
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
LAYOUTS = ("rowfirst", "colfirst")


@cache
def cached_tensor(values: tuple[float, ...], device: torch.device) -> Float[Tensor, " n"]:
    """Return the values as float32 on the device; each tuple is copied there once.

    A registered buffer would be converted to bf16 with its module.
    """
    return torch.tensor(values, device=device)


def normalise(images: UInt8[Tensor, "*B 3 H W"], normalisation: str, dtype: torch.dtype) -> Float[Tensor, "*B 3 H W"]:
    """Scale pixels to [0, 1], subtract the mean and divide by the standard deviation of each channel."""
    mean, std = (cached_tensor(x, images.device).view(3, 1, 1) for x in NORMALISATIONS[normalisation])
    return ((images.float() / 255 - mean) / std).to(dtype)


def normalise_patches(patches: UInt8[Tensor, "*B P"], normalisation: str, dtype: torch.dtype) -> Float[Tensor, "*B P"]:
    """Normalise extracted patches as normalise() does images."""
    mean, std = (cached_tensor(x, patches.device) for x in NORMALISATIONS[normalisation])
    return ((patches.unflatten(-1, (-1, 3)).float() / 255 - mean) / std).flatten(-2).to(dtype)


def unpatchify(patches: Shaped[Tensor, "B N P"], grid: tuple[int, int], patch: int) -> Shaped[Tensor, "B 3 H W"]:
    """Assemble images from all their patches: the inverse of patchify(). H and W are in pixels."""
    tiles = patches.reshape(len(patches), *grid, patch, patch, 3)
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), 3, grid[0] * patch, grid[1] * patch)


def gather_tokens(tokens: Shaped[Tensor, "B N D"], positions: Int64[Tensor, "B V"]) -> Shaped[Tensor, "B V D"]:
    """Select the tokens at the given positions of each image."""
    return tokens.gather(1, positions[:, :, None].expand(-1, -1, tokens.shape[-1]))


def sincos_layout(positions: str) -> str:
    """Return the layout of the sin-cos table for a model's positions; learned ones begin with the first layout."""
    return LAYOUTS[0] if positions == "learned" else positions


def sincos_positions(grid: tuple[int, int], width: int, layout: str) -> Float[Tensor, "1 T D"]:
    """Return fixed 2-D sin-cos position embeddings in float32, T = 1 + N; row 0, for the cls token, is zero.

    The embedding of the patch at (row, column) is [e(row), e(column)] for "rowfirst" (BootMAE, MoCo v3) and
    [e(column), e(row)] for "colfirst" (MAE), with q = width / 4, f_i = 10000^(-(i - 1) / q), and
    e(x) = [sin(x f_1), ..., sin(x f_q), cos(x f_1), ..., cos(x f_q)].

    Raise ValueError if the layout is unknown, or if width is not a multiple of 4.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"model.positions is {layout!r}; expected one of {LAYOUTS}. Pass --model.positions rowfirst.")
    if width % 4:
        raise ValueError(f"the width is {width}; sin-cos positions need a multiple of 4. Choose another width.")
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    coordinates = (rows, columns) if layout == "rowfirst" else (columns, rows)
    first, second = (each.reshape(-1, 1) * frequencies for each in coordinates)
    table = torch.cat([first.sin(), first.cos(), second.sin(), second.cos()], 1)
    return torch.cat([table.new_zeros(1, width), table])[None].float()
