"""Figures of a pretraining run and the plot helpers of all figures. Each draw function returns a matplotlib figure."""

import matplotlib

matplotlib.use("Agg")

import ddae_kernels as dk
import matplotlib.pyplot as plt
import numpy as np
import torch
from ddae_kernels.dynamic import PATCH_NORMS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ddae.config.pretrain import PretrainConfig, tap_name
from ddae.data.masking import Mask, sample_mask
from ddae.method.branches import PixelBranch
from ddae.method.distance import masked_distance
from ddae.method.model import PretrainModel
from ddae.models.patches import NORMALISATIONS, patchify, unpatchify

MASKED_GREY = 0.82  # value of masked patches, in [0, 1]
BASELINES = ("raw_pixels", "chance")  # metrics that do not depend on the encoder
COLOURS = ("#0b6e99", "#d1495b", "#edae49", "#66a182", "#7a5195", "#444444", "#8d6e63", "#c2185b")


@torch.no_grad()
def reconstruct(model: PretrainModel, images: Tensor, mask: Mask) -> dict[int, Tensor]:
    """Return {tap: image [B, 3, H, W] in [0, 1]} with masked patches replaced by the pixel branch's predictions.

    images: uint8 [B, 3, H, W]. Predictions of normalised patches are denormalised with the true patch's mean and
    standard deviation.
    """
    branch = model.branches["pixel"]
    assert isinstance(branch, PixelBranch)
    tokens = model.encode(images, mask.visible)
    predicted = branch.predict(tokens, mask).float()
    patches = patchify(images, branch.patch).float() / 255
    index = mask.masked[:, :, None].expand(-1, -1, patches.shape[-1])
    mean, std = (
        torch.tensor(x, device=images.device).repeat(branch.patch**2) for x in NORMALISATIONS[model.normalisation]
    )
    target = ((patches.gather(1, index) - mean) / std).unflatten(-1, (-1, 3))
    if branch.norm != "none":
        dims = (-2,) if branch.norm == "per_channel" else (-2, -1)
        unbiased, eps = PATCH_NORMS[branch.norm]
        patch_mean = target.mean(dims, keepdim=True)
        patch_std = (target.var(dims, unbiased=unbiased, keepdim=True) + eps).sqrt()
        predicted = (predicted.unflatten(-1, (-1, 3)) * patch_std + patch_mean).flatten(-2)
    predicted = (predicted * std + mean).clamp(0, 1)
    grid = images.shape[2] // branch.patch, images.shape[3] // branch.patch
    return {
        tap: unpatchify(patches.scatter(1, index, of_tap), grid, branch.patch)
        for tap, of_tap in zip(branch.taps, predicted, strict=True)
    }


def grey_out_masked(images: Tensor, mask: Mask, patch: int) -> Tensor:
    """Return uint8 images as [B, 3, H, W] in [0, 1] with the masked patches grey."""
    patches = patchify(images.float() / 255, patch)
    index = mask.masked[:, :, None].expand(-1, -1, patches.shape[-1])
    grid = images.shape[2] // patch, images.shape[3] // patch
    return unpatchify(patches.scatter(1, index, MASKED_GREY), grid, patch)


def draw_reconstructions(
    model: PretrainModel, config: PretrainConfig, images: Tensor, betas: dict[int, float]
) -> Figure:
    """Draw reconstruction_grid() of images uint8 [B, 3, H, W]. betas: {tap: value}.

    The rows alternate between the run's own masks and random ones.
    """
    kinds = [config.mask.kind if number % 2 == 0 else "random" for number in range(len(images))]
    seeds = torch.arange(len(images)) + 1
    by_row = [sample_mask(k, s[None], config.grid, config.num_masked) for k, s in zip(kinds, seeds, strict=True)]
    mask = Mask(*(torch.cat(positions).to(images.device) for positions in zip(*by_row, strict=True)))
    rebuilt = reconstruct(model, images, mask)
    return reconstruction_grid(
        images, mask, kinds, config.model.patch_size, rebuilt, betas, config.dynamic.distance_norm
    )


def pixel_betas(config: PretrainConfig, by_name: dict[str, float]) -> dict[int, float]:
    """Return {tap: beta} of the pixel branch from all betas by name; empty if the branch is not dynamic."""
    prefix = "" if config.dynamic.shared else "pixel/"
    names = {tap: prefix + tap_name(tap) for tap in config.pixel.taps if config.pixel.dynamic}
    return {tap: by_name[name] for tap, name in names.items() if name in by_name}


def scatter_to_grid(values: Tensor, mask: Mask, grid: tuple[int, int]) -> np.ndarray:
    """Return values of masked patches [B, M] as [B, *grid], NaN at visible patches."""
    full = torch.full((len(values), grid[0] * grid[1]), torch.nan)
    return full.scatter(1, mask.masked.cpu(), values.float().cpu()).view(-1, *grid).numpy()


def reconstruction_grid(
    images: Tensor,
    mask: Mask,
    kinds: list[str],
    patch: int,
    rebuilt: dict[int, Tensor],
    betas: dict[int, float],
    distance_norm: str = "none",
) -> Figure:
    """Draw a row per image: input, visible patches, each tap's reconstruction, distances, each tap's weights.

    kinds: of the masks, by row; rebuilt: see reconstruct(); betas: {tap: value}.
    """
    grid = images.shape[2] // patch, images.shape[3] // patch
    distance = masked_distance(mask, grid, norm=distance_norm)
    pictures = [("input", images.float() / 255), ("visible", grey_out_masked(images, mask, patch))]
    pictures += [(f"block {tap}", picture) for tap, picture in rebuilt.items()]
    maps: list[tuple[str, np.ndarray, float | None]] = [("distance", scatter_to_grid(distance, mask, grid), None)]
    for tap, beta in betas.items():
        weight = dk.distance_weights(distance, torch.tensor([beta], device=distance.device))[0]
        maps.append((f"weight {tap}, β={beta:.2f}", scatter_to_grid(weight, mask, grid), 1))
    columns = len(pictures) + len(maps)
    figure, axes = plt.subplots(len(images), columns, figsize=(1.45 * columns, 1.52 * len(images)), squeeze=False)
    for row, kind in enumerate(kinds):
        first = axes[row, 0]
        first.text(-0.08, 0.5, kind, rotation=90, va="center", ha="center", transform=first.transAxes, size=7)
        for column, (title, picture) in enumerate(pictures):
            _show_image(axes[row, column], picture[row].permute(1, 2, 0).cpu().numpy(), title if row == 0 else "")
        for column, (title, values, largest) in enumerate(maps, len(pictures)):
            limits = {"vmin": 0, "vmax": largest or float(np.nanmax(values))}
            _show_image(axes[row, column], values[row], title if row == 0 else "", cmap="viridis", **limits)
    figure.tight_layout(pad=0.3)
    return figure


def _show_image(axis: Axes, picture: np.ndarray, title: str, **options) -> None:
    axis.imshow(picture, interpolation="nearest", **options)
    axis.set_title(title, fontsize=8)
    axis.set_axis_off()


def curves(
    rows: list[dict[str, float]],
    groups: dict[str, list[str]],
    title: str,
    levels: dict[str, dict[str, float]] | None = None,
) -> Figure:
    """Draw metrics over steps, one panel per group.

    groups: {panel: metric names}; a line is labelled with its metric's name after the first "/". levels: {panel:
    {name: value}}, drawn as grey horizontal lines.
    """
    figure, axes = plt.subplots(1, len(groups), figsize=(4.6 * len(groups), 3.2), squeeze=False)
    for axis, (panel, names) in zip(axes[0], groups.items(), strict=True):
        for name, colour in zip(names, COLOURS * 3, strict=False):
            points = [(row["step"], row[name]) for row in rows if name in row]
            style = {"color": colour, "linewidth": 1.4, "marker": "o" if len(points) < 3 else None}
            if name.endswith(BASELINES):
                style |= {"color": "#777", "linewidth": 1, "linestyle": "-." if name.endswith(BASELINES[0]) else ":"}
            axis.plot(*zip(*points, strict=True), **style, label=name.split("/", 1)[-1])
        for number, (name, value) in enumerate((levels or {}).get(panel, {}).items()):
            axis.axhline(value, color="#777", linewidth=1, linestyle=("--", "-.", ":")[number % 3], label=name)
        axis.set_title(panel, fontsize=10)
        style_axis(axis, "step")
        axis.legend(fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    return figure


def weight_by_distance(betas: dict[str, float], farthest: float, distance_norm: str = "none") -> Figure:
    """Draw the weight r of a masked patch by its distance to the nearest visible one, a line per beta.

    farthest: largest distance in patches.
    """
    figure, axis = plt.subplots(figsize=(4.6, 3.2))
    patches = torch.linspace(1, max(2.0, farthest), 100)[None]
    distance = patches / patches.max() if distance_norm == "max" else patches
    for (name, beta), colour in zip(betas.items(), COLOURS * 3, strict=False):
        weight = dk.distance_weights(distance, torch.tensor([beta]))[0, 0]
        axis.plot(patches[0], weight, color=colour, linewidth=1.6, label=f"{name}: β={beta:.2f}")
    axis.set_ylim(0, 1.05)
    style_axis(axis, "distance to the nearest visible patch, in patches", "weight")
    axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return figure


def style_axis(axis: Axes, xlabel: str, ylabel: str = "") -> None:
    """Label the axes, draw a light grid and remove the upper and right border."""
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def metric_names(rows: list[dict[str, float]], prefix: str) -> list[str]:
    """Return the metrics of the last row whose names start with `prefix`, in logged order."""
    return [name for name in rows[-1] if name.startswith(prefix)] if rows else []
