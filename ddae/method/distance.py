"""What the masked patches of an image are weighted by: their distance to the nearest visible patch (paper Eq. 2).

Shape letters: B images, N patches of a grid H x W, M masked.
"""

import ddae_kernels as dk
import torch
import torch.nn.functional as F
from torch import Tensor

from ddae.data.masking import Mask


def masked_distance(mask: Mask, grid: tuple[int, int], kernels: str = "reference", norm: str = "none") -> Tensor:
    """Distance of each masked patch to the nearest visible one: float32 [B, M].

    norm: "none" for patch units, "max" for units of the image's largest distance.
    """
    return dk.patch_distance(_is_masked(mask, grid), grid, impl=kernels, norm=norm).gather(1, mask.masked)


def neighbour_weight(mask: Mask, grid: tuple[int, int]) -> Tensor:
    """1 + the masked share of the 3 x 3 patches around each masked patch, which count as visible outside the image:
    float32 [B, M] (BootMAE's --weight_mask)."""
    is_masked = _is_masked(mask, grid).float()
    share = F.avg_pool2d(is_masked.view(-1, 1, *grid), 3, stride=1, padding=1).flatten(1)
    return 1 + share.gather(1, mask.masked)


def _is_masked(mask: Mask, grid: tuple[int, int]) -> Tensor:
    """bool [B, N]."""
    is_masked = torch.ones(len(mask.visible), grid[0] * grid[1], dtype=torch.bool, device=mask.visible.device)
    return is_masked.scatter_(1, mask.visible, False)
