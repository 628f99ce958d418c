"""Attention maps of an encoder and statistics of them: attention distance, head diversity, overlap with the foreground.

Shapes: B images, H heads, L blocks, N patches of a grid, T = 1 + N tokens with the cls token first.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddae.models.patches import normalise
from ddae.models.vit import Encoder

FOREGROUND_MASS = 0.6  # share of the cls token's attention that counts as attended (DINO)


class Locality(NamedTuple):
    """Statistics of an encoder's attention heads, averaged over images."""

    distance: Tensor  # float64 [L, H]: mean attention distance in patches
    diversity: Tensor  # float64 [L]: 0 if all heads attend alike, 1 if no two heads attend to the same patches

    @property
    def deep_half(self) -> tuple[float, float]:
        """Return the mean distance and the mean diversity over the later half of the blocks."""
        half = len(self.distance) // 2
        return float(self.distance[half:].mean()), float(self.diversity[half:].mean())


@torch.no_grad()
def attention_maps(encoder: Encoder, pixels: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
    """Return {block number from 1: attention float [B, H, T, T]}; each row is a softmax over the keys.

    pixels: normalised [B, 3, S, S]. Raise ValueError if the encoder has no such block.
    """
    if not blocks or min(blocks) < 1 or max(blocks) > len(encoder.blocks):
        raise ValueError(f"blocks are {list(blocks)}; expected one or more numbers from 1 to {len(encoder.blocks)}.")
    maps: dict[int, Tensor] = {}
    modules: dict[int, Any] = {number: encoder.blocks[number - 1].attn for number in blocks}
    fused = {number: module.fused_attn for number, module in modules.items()}

    def store(_module: object, _inputs: object, attention: Tensor, number: int) -> None:
        maps[number] = attention

    hooks = [m.attn_drop.register_forward_hook(partial(store, number=number)) for number, m in modules.items()]
    try:
        for module in modules.values():
            module.fused_attn = False  # the fused kernel does not materialise the attention matrix
        encoder.features(pixels, [max(blocks)])
    finally:
        for hook, (number, module) in zip(hooks, modules.items(), strict=True):
            hook.remove()
            module.fused_attn = fused[number]
    return maps


def patch_distances(grid: tuple[int, int]) -> Tensor:
    """Return the Euclidean distances between all patches, in patches: float64 [N, N]."""
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    positions = torch.stack([rows.flatten(), columns.flatten()], 1)
    return torch.cdist(positions, positions, compute_mode="donot_use_mm_for_euclid_dist")


def patch_attention(attention: Tensor) -> Tensor:
    """Drop the cls token and renormalise each row to sum to 1: [B, H, T, T] -> float64 [B, H, N, N]."""
    patches = attention[:, :, 1:, 1:].double()
    return patches / patches.sum(-1, keepdim=True)


def attention_distance(attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the attention-weighted distance in patches, averaged over query patches (Dosovitskiy et al. 2021, Fig. 7).

    [B, H, T, T] -> float64 [B, H]. Uniform attention on a 14 x 14 grid gives 7.28.
    """
    return (patch_attention(attention) * patch_distances(grid).to(attention.device)).sum(-1).mean(-1)


def head_diversity(attention: Tensor) -> Tensor:
    """Return 1 minus the mean cosine similarity of two heads' attention between patches; 0 if there is one head.

    [B, H, T, T] -> float64 [B].
    """
    flat = torch.nn.functional.normalize(patch_attention(attention).flatten(2), dim=-1)
    heads, cosine = flat.shape[1], (flat @ flat.mT).sum((1, 2))
    return 1 - (cosine - heads) / (heads * (heads - 1)) if heads > 1 else torch.zeros_like(cosine)


def measure_locality(encoder: Encoder, batches: Iterable[Tensor]) -> Locality:
    """Return attention distance and head diversity of all blocks.

    batches: images uint8 [B, 3, S, S] on the encoder's device.
    """
    blocks = list(range(1, len(encoder.blocks) + 1))
    distance, diversity = [], []
    for images in batches:
        maps = attention_maps(encoder, normalise(images, encoder.normalisation, torch.float32), blocks).values()
        distance.append(torch.stack([attention_distance(each, encoder.grid) for each in maps], 1).cpu())
        diversity.append(torch.stack([head_diversity(each) for each in maps], 1).cpu())
    return Locality(torch.cat(distance).mean(0), torch.cat(diversity).mean(0))


def cls_attention(attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the cls token's attention to the patches, averaged over heads: [B, H, T, T] -> [B, *grid]."""
    return attention[:, :, 0, 1:].mean(1).unflatten(1, grid)


def foreground_iou(maps: Tensor, foreground: Tensor) -> Tensor:
    """Return the IoU of the foreground and the fewest patches that hold FOREGROUND_MASS of the cls token's attention.

    maps: float [B, h, w], see cls_attention(); foreground: bool [B, h, w]. Returns float [B], NaN for an image without
    foreground. After Caron et al. 2021 (DINO).
    """
    flat, target = maps.flatten(1), foreground.flatten(1)
    order = flat.argsort(1, descending=True)
    cumulative = flat.gather(1, order).cumsum(1) / flat.sum(1, keepdim=True)
    before = torch.cat([torch.zeros_like(cumulative[:, :1]), cumulative[:, :-1]], 1)
    attended = torch.zeros_like(target).scatter(1, order, before < FOREGROUND_MASS)
    iou = (attended & target).sum(1) / (attended | target).sum(1)
    return iou.where(target.any(1), torch.nan)
