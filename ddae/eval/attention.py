"""Where an encoder looks: attention maps, how far each head reaches, how much heads differ, what they have to do with
the foreground.

B images, H heads, L blocks, N patches of a grid, T = 1 + N tokens with cls first.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddae.models.patches import normalise
from ddae.models.vit import Encoder

MASS = 0.6  # share of the cls token's attention that is taken for what it looks at (DINO)


class Locality(NamedTuple):
    """How an encoder's heads look, over images."""

    distance: Tensor  # float64 [L, H]: mean distance, in patches, from a patch to those it attends to
    diversity: Tensor  # float64 [L]: 0 where all heads look alike, 1 where no two look at the same patches

    @property
    def deep_half(self) -> tuple[float, float]:
        """Mean distance and diversity over the later half of the blocks."""
        half = len(self.distance) // 2
        return float(self.distance[half:].mean()), float(self.diversity[half:].mean())


@torch.no_grad()
def attention(encoder: Encoder, pixels: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
    """Normalised [B, 3, S, S] -> {block, counted from 1: float [B, H, T, T]}, each row the shares of a token's
    attention. ValueError where the encoder lacks a block."""
    if not blocks or min(blocks) < 1 or max(blocks) > len(encoder.blocks):
        raise ValueError(f"blocks are {list(blocks)}: name some from 1 to {len(encoder.blocks)}")
    found: dict[int, Tensor] = {}
    modules: dict[int, Any] = {number: encoder.blocks[number - 1].attn for number in blocks}
    fused = {number: module.fused_attn for number, module in modules.items()}
    hooks = []
    for number, module in modules.items():
        module.fused_attn = False  # the fused one has no such shares

        def keep(_module: object, _inputs: object, shares: Tensor, number: int = number) -> None:
            found[number] = shares

        hooks.append(module.attn_drop.register_forward_hook(keep))
    try:
        encoder.features(pixels, [max(blocks)])
    finally:
        for hook, (number, module) in zip(hooks, modules.items(), strict=True):
            hook.remove()
            module.fused_attn = fused[number]
    return found


def patch_distances(grid: tuple[int, int]) -> Tensor:
    """Euclidean distance, in patches, of every patch to every patch: float64 [N, N]."""
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], 1)
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")


def among_patches(shares: Tensor) -> Tensor:
    """[B, H, T, T] -> float64 [B, H, N, N]: without the cls token, rows adding up to 1 again."""
    patches = shares[:, :, 1:, 1:].double()
    return patches / patches.sum(-1, keepdim=True)


def attention_distance(shares: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, H, T, T] -> float64 [B, H]: the mean over patches of the mean distance, in patches, to what they attend to
    (Dosovitskiy et al. 2021, Fig. 7). 7.28 on 14 x 14 where all attend to all alike."""
    return (among_patches(shares) * patch_distances(grid).to(shares.device)).sum(-1).mean(-1)


def head_diversity(shares: Tensor) -> Tensor:
    """[B, H, T, T] -> float64 [B]: 1 less the mean cosine of two heads' attention among patches; 0 for one head."""
    flat = torch.nn.functional.normalize(among_patches(shares).flatten(2), dim=-1)
    heads = flat.shape[1]
    cosine = flat @ flat.mT
    pairs = max(1, heads * (heads - 1))
    return 1 - (cosine.sum((1, 2)) - heads) / pairs if heads > 1 else torch.zeros(len(shares), dtype=torch.float64)


def locality(encoder: Encoder, batches: Iterable[Tensor]) -> Locality:
    """Of all blocks, over batches of images uint8 [B, 3, S, S] on the encoder's device."""
    blocks = list(range(1, len(encoder.blocks) + 1))
    distance, diversity, count = torch.zeros(1), torch.zeros(1), 0
    for images in batches:
        found = attention(encoder, normalise(images, encoder.normalisation, torch.float32), blocks)
        reach = torch.stack([attention_distance(shares, encoder.grid).sum(0) for shares in found.values()])
        distance = distance + reach.cpu()
        diversity = diversity + torch.stack([head_diversity(shares).sum() for shares in found.values()]).cpu()
        count += len(images)
    return Locality(distance / count, diversity / count)


def cls_map(shares: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, H, T, T] -> [B, *grid]: the cls token's attention to the patches, the mean of the heads."""
    return shares[:, :, 0, 1:].mean(1).unflatten(1, grid)


def foreground_iou(maps: Tensor, foreground: Tensor) -> Tensor:
    """cls maps [B, h, w] and bool [B, h, w] -> float [B]: intersection over union of the foreground and the fewest
    patches that hold MASS of the attention (Caron et al. 2021); NaN for an image without a foreground."""
    flat, wanted = maps.flatten(1), foreground.flatten(1)
    order = flat.argsort(1, descending=True)
    held = flat.gather(1, order).cumsum(1) / flat.sum(1, keepdim=True)
    before = torch.cat([torch.zeros_like(held[:, :1]), held[:, :-1]], 1)
    seen = torch.zeros_like(wanted).scatter(1, order, before < MASS)
    iou = (seen & wanted).sum(1) / (seen | wanted).sum(1)
    return iou.where(wanted.any(1), torch.nan)
