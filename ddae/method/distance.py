"""Weights of masked patches by position: distance to the nearest visible patch (paper Eq. 2), BootMAE's fixed weights.

Shape letters: B images, N patches of a grid H x W, M masked patches.
"""

import ddae_kernels as dk
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ddae.data.masking import Mask


def masked_distance(
    mask: Mask, grid: tuple[int, int], loss_backend: str = "reference", norm: str = "none"
) -> Float[Tensor, "B M"]:
    """Return the distance of each masked patch to the nearest visible one, in float32.

    norm: "none" for distances in patches, "max" to divide by the image's largest distance.
    """
    return dk.patch_distance(_is_masked(mask, grid), grid, impl=loss_backend, norm=norm).gather(1, mask.masked)


def neighbour_weight(mask: Mask, grid: tuple[int, int]) -> Float[Tensor, "B M"]:
    """Return 1 + the masked share of the 3 x 3 patches around each masked patch, in float32 (BootMAE's --weight_mask).

    Patches outside the image count as visible.
    """
    is_masked = _is_masked(mask, grid).float()
    share = F.avg_pool2d(is_masked.view(-1, 1, *grid), 3, stride=1, padding=1).flatten(1)
    return 1 + share.gather(1, mask.masked)


def _is_masked(mask: Mask, grid: tuple[int, int]) -> Bool[Tensor, "B N"]:
    is_masked = torch.ones(len(mask.visible), grid[0] * grid[1], dtype=torch.bool, device=mask.visible.device)
    return is_masked.scatter_(1, mask.visible, False)
