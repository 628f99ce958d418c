"""The paper's figures. Each function draws one and returns it as a matplotlib figure."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from ddae.eval.attention import Locality, patch_distances
from ddae.figures import COLOURS, on_grid
from ddae.masks import KINDS, masked_distance, sample_mask

RATIOS = (0.5, 0.75, 0.9)
ZOOM = 0.15  # share of the training that the zoomed betas show


def distance_maps(grid: tuple[int, int], kinds: Sequence[str] = KINDS) -> Figure:
    """Figure 2: the distance of each masked patch to the nearest visible one over the largest, for three ratios."""
    figure, axes = plt.subplots(
        len(kinds), len(RATIOS), figsize=(2.2 * len(RATIOS) + 1, 2.3 * len(kinds)), squeeze=False, layout="constrained"
    )
    picture = None
    for row, kind in zip(axes, kinds, strict=True):
        for axis, ratio in zip(row, RATIOS, strict=True):
            mask = sample_mask(kind, torch.tensor([7]), grid, round(ratio * grid[0] * grid[1]))
            distance = masked_distance(mask, grid)
            shares = on_grid(masked_distance(mask, grid, norm="max"), mask, grid)[0]
            picture = axis.imshow(shares, cmap="cividis_r", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(f"{ratio:.0%} masked, farthest {float(distance.max()):.1f}", fontsize=8)
        row[0].set_ylabel(kind, fontsize=9)
    assert picture is not None
    figure.colorbar(picture, ax=axes, shrink=0.6, label="distance over the largest (white: visible)")
    return figure


def attention_grid(images: Tensor, maps: dict[str, Tensor], block: int) -> Figure:
    """Figures 3 and 7: images uint8 [B, 3, S, S] above the cls token's attention [B, h, w] of each encoder, each map
    from its least to its most."""
    rows, size = 1 + len(maps), images.shape[2:]
    figure, axes = plt.subplots(rows, len(images), figsize=(1.5 * len(images), 1.55 * rows), squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for axis, image in zip(axes[0], images, strict=True):
        axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes[0, 0].set_ylabel("image", fontsize=8)
    for row, (name, found) in zip(axes[1:], maps.items(), strict=True):
        large = F.interpolate(found[:, None].float(), tuple(size), mode="bilinear", align_corners=False)[:, 0]
        low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
        for axis, each in zip(row, (large - low) / (high - low).clamp(min=1e-12), strict=True):
            axis.imshow(each.numpy(), cmap="viridis", vmin=0, vmax=1)
        row[0].set_ylabel(name, fontsize=8)
    figure.suptitle(f"attention of the cls token after block {block}, mean of the heads; yellow: most", fontsize=9)
    figure.tight_layout(pad=0.4)
    return figure


def distance_dots(found: dict[str, Locality], patches: dict[str, tuple[tuple[int, int], int]]) -> Figure:
    """Figure 4: how far each head of each block reaches, in pixels. patches: each encoder's grid and patch size."""
    figure, axes = plt.subplots(1, len(found), figsize=(4.4 * len(found), 3.5), squeeze=False, sharey=True)
    for axis, (name, local), colour in zip(axes[0], found.items(), COLOURS * 3, strict=False):
        grid, side = patches[name]
        reach = local.distance * side
        blocks = np.arange(1, len(reach) + 1)
        for head in reach.T:
            axis.scatter(blocks, head, s=14, color=colour, alpha=0.6, linewidths=0)
        axis.plot(blocks, reach.mean(1), color=colour, linewidth=1.5, label="mean of the heads")
        alike = float(patch_distances(grid).mean()) * side
        axis.axhline(alike, color="#444444", linestyle="--", linewidth=1, label=f"attention alike to all: {alike:.0f}")
        axis.set_title(f"{name}: deep half {local.deep_half[0] * side:.1f} px", fontsize=10)
        axis.set_xlabel("block")
        axis.set_xticks(blocks if len(blocks) <= 12 else blocks[1::2])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
    axes[0, 0].set_ylabel("attention distance in pixels (a dot: a head)", fontsize=9)
    figure.tight_layout()
    return figure


def beta_curves(runs: dict[str, list[dict[str, float]]]) -> Figure:
    """Figures 5 and 6: the betas of each run over the epochs, all of the training and its beginning."""
    figure, axes = plt.subplots(len(runs), 2, figsize=(9.2, 0.6 + 2.9 * len(runs)), squeeze=False, sharey="col")
    for (run, rows), row_of_axes in zip(runs.items(), axes, strict=True):
        names, end = [name for name in rows[-1] if name.startswith("beta/")], rows[-1]["epoch"]
        for axis, last, title in zip(
            row_of_axes, (end, ZOOM * end), ("whole training", f"first {ZOOM:.0%}"), strict=True
        ):
            shown = [row for row in rows if row["epoch"] <= last and names[0] in row]
            epochs = [row["epoch"] for row in shown]
            for name, colour in zip(names, COLOURS * 3, strict=False):
                label = f"block {int(name[-2:])}" + (f", {name.split('/')[1]}" if name.count("/") > 1 else "")
                axis.plot(epochs, [row[name] for row in shown], color=colour, linewidth=1.4, label=label)
            axis.set_title(f"{run}: {title}" if len(runs) > 1 else title, fontsize=10)
            axis.set_xlabel("epoch")
            axis.set_ylabel("β")
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        row_of_axes[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    return figure
