"""Figures of a pretraining run and the plot helpers of all figures. Each draw function returns a matplotlib figure."""

from typing import Any

import ddae_kernels as dk
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
from ddae.models.patches import NORMALISATIONS, gather_tokens, normalise_patches, patchify, unpatchify
from ddae.training.collapse import MAX_TRIVIAL_SHARE

MASKED_GREY = 0.82  # value of masked patches, in [0, 1]
MASK_LABELS = {"bootmae_block": "block mask", "beit_block": "BEiT block mask", "random": "random mask"}
BRANCHES = ("pixel", "feature", "token")
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
    predicted = branch.predict(model.encode(images, mask.visible), mask).float()
    if branch.norm != "none":
        masked = gather_tokens(patchify(images, branch.patch), mask.masked)
        target = normalise_patches(masked, model.normalisation, torch.float32).unflatten(-1, (-1, 3))
        dims = (-2,) if branch.norm == "per_channel" else (-2, -1)
        unbiased, eps = PATCH_NORMS[branch.norm]
        patch_mean = target.mean(dims, keepdim=True)
        patch_std = (target.var(dims, unbiased=unbiased, keepdim=True) + eps).sqrt()
        predicted = (predicted.unflatten(-1, (-1, 3)) * patch_std + patch_mean).flatten(-2)
    mean, std = torch.tensor(NORMALISATIONS[model.normalisation], device=images.device).repeat(1, branch.patch**2)
    predicted = (predicted * std + mean).clamp(0, 1)
    return {t: fill_masked(images, mask, branch.patch, each) for t, each in zip(branch.taps, predicted, strict=True)}


def fill_masked(images: Tensor, mask: Mask, patch: int, values: Any) -> Tensor:
    """Return uint8 images as [B, 3, H, W] in [0, 1], the masked patches replaced by values: [B, M, P] or a number."""
    patches = patchify(images, patch).float() / 255
    index = mask.masked[:, :, None].expand(-1, -1, patches.shape[-1])
    grid = images.shape[2] // patch, images.shape[3] // patch
    return unpatchify(patches.scatter(1, index, values), grid, patch)


def draw_reconstructions(
    model: PretrainModel, config: PretrainConfig, images: Tensor, betas: dict[int, float]
) -> Figure:
    """Draw a row per image: input, visible patches, each tap's reconstruction, distances, each tap's weights.

    images: uint8 [B, 3, H, W]; betas: {tap: value}. The rows alternate between the run's own masks and random ones.
    """
    kinds, grid = [config.mask.kind if number % 2 == 0 else "random" for number in range(len(images))], config.grid
    seeds = torch.arange(len(images)) + 1
    by_row = [sample_mask(k, s[None], grid, config.num_masked) for k, s in zip(kinds, seeds, strict=True)]
    mask = Mask(*(torch.cat(positions).to(images.device) for positions in zip(*by_row, strict=True)))
    distance = masked_distance(mask, grid, norm=config.dynamic.distance_norm)
    visible = fill_masked(images, mask, config.model.patch_size, MASKED_GREY)
    rebuilt = {f"block {tap}": picture for tap, picture in reconstruct(model, images, mask).items()}
    pictures = {"input": images.float() / 255, "visible": visible, **rebuilt}
    maps: dict[str, tuple[np.ndarray, float | None]] = {"distance": (scatter_to_grid(distance, mask, grid), None)}
    for tap, beta in betas.items():
        weight = dk.distance_weights(distance, torch.tensor([beta], device=distance.device))[0]
        maps[f"weight, block {tap}\nβ = {beta:.2f}"] = scatter_to_grid(weight, mask, grid), 1
    figure, axes = image_axes(len(images), len(pictures) + len(maps), 1.45, 1.52)
    for row, (kind, axis_row) in enumerate(zip(kinds, axes, strict=True)):
        at = {"rotation": 90, "va": "center", "ha": "center", "transform": axis_row[0].transAxes}
        axis_row[0].text(-0.08, 0.5, MASK_LABELS[kind], size=7, **at)
        for axis, (title, picture) in zip(axis_row, pictures.items(), strict=False):
            show_image(axis, picture[row], title if row == 0 else "")
        for axis, (title, (values, largest)) in zip(axis_row[len(pictures) :], maps.items(), strict=True):
            limits = {"vmin": 0, "vmax": largest or float(np.nanmax(values))}
            show_image(axis, values[row], title if row == 0 else "", cmap="viridis", **limits)
    unit = "patches" if config.dynamic.distance_norm == "none" else "of the largest"
    bars = {unit: axes[:, len(pictures) : len(pictures) + 1], "weight in the loss": axes[:, len(pictures) + 1 :]}
    for text, columns in bars.items():
        if columns.size:
            bar_shape = {"aspect": 12 * columns.shape[1], "fraction": 0.03}
            bar = figure.colorbar(columns[0, 0].images[0], ax=columns, location="bottom", pad=0.01, **bar_shape)
            bar.set_label(text, fontsize=7)
            bar.ax.tick_params(labelsize=6)
    return figure


def pixel_betas(config: PretrainConfig, by_name: dict[str, float]) -> dict[int, float]:
    """Return {tap: beta} of the pixel branch from all betas by name; empty if the branch is not dynamic."""
    prefix = "" if config.dynamic.shared else "pixel/"
    names = {tap: prefix + tap_name(tap) for tap in config.pixel.taps if config.pixel.dynamic}
    return {tap: by_name[name] for tap, name in names.items() if name in by_name}


def scatter_to_grid(values: Tensor, mask: Mask, grid: tuple[int, int]) -> np.ndarray:
    """Return values of masked patches [B, M] as [B, *grid], NaN at visible patches."""
    full = torch.full((len(values), grid[0] * grid[1]), torch.nan)
    return full.scatter(1, mask.masked.cpu(), values.float().cpu()).view(-1, *grid).numpy()


def image_axes(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """Return a figure and its rows x columns axes without frames; width, height: of an axis, in inches."""
    size = (width * columns, height * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def show_image(axis: Axes, picture: Tensor | np.ndarray, title: str = "", colour: str = "black", **options) -> None:
    """Show a picture under a title: an array [H, W] or [H, W, 3], or a tensor [3, H, W]. options: imshow's."""
    array = picture.permute(1, 2, 0).cpu().numpy() if isinstance(picture, Tensor) else picture
    axis.imshow(array, interpolation="nearest", **options)
    axis.set_title(title, fontsize=7, color=colour)


def curves(
    rows: list[dict[str, float]], groups: dict[str, list[str]], levels: dict[str, dict[str, float]] | None = None
) -> Figure:
    """Draw metrics over steps, one panel per group.

    groups: {panel: metric names}; a line is labelled with its label(), unless it is the only one. levels: {panel:
    {name: value}}, drawn as grey horizontal lines.
    """
    figure = Figure(figsize=(4.6 * len(groups), 3.2), layout="tight")
    axes = figure.subplots(1, len(groups), squeeze=False)
    for axis, (panel, names) in zip(axes[0], groups.items(), strict=True):
        for name, colour in zip(names, COLOURS * 3, strict=False):
            points = [(row["step"], row[name]) for row in rows if name in row]
            style = {"color": colour, "linewidth": 1.4, "marker": "o" if len(points) < 3 else None}
            if name.endswith(BASELINES):
                style |= {"color": "#777", "linewidth": 1, "linestyle": "-." if name.endswith(BASELINES[0]) else ":"}
            axis.plot(*zip(*points, strict=True), **style, label=label(name) if len(names) > 1 else None)
        axis.set_title(panel, fontsize=10)
        style_axis(axis, "step", levels=(levels or {}).get(panel, {}))
    return figure


def label(metric: str) -> str:
    """Return what a legend shows of a metric: "block 4, cls" for knn/tap_04/cls, else the last part of its name.

    A branch is named for betas alone: losses and errors have a panel for each.
    """
    parts = metric.split("/")
    taps = [part for part in parts if part.startswith("tap_")]
    if not taps:
        return parts[-1].replace("_", " ").replace("miou", "mIoU")
    place = parts.index(taps[0])
    branch = [] if parts[0] in ("loss", "error") else [part for part in parts[:place] if part in BRANCHES]
    return ", ".join((*branch, f"block {int(taps[0].removeprefix('tap_'))}", *parts[place + 1 :]))


def collapse_curves(rows: list[dict[str, float]]) -> Figure:
    """Draw the collapse monitor's metrics (training/collapse.py) over steps, a line per tap."""
    panels = {
        "effective rank over patches": "patch_rank",
        "effective rank over images": "image_rank",
        "standard deviation over images": "image_std",
    }
    figure = Figure(figsize=(4.2 * (len(panels) + 2), 3.2), layout="tight")
    axes = figure.subplots(1, len(panels) + 2)

    def draw(axis: Axes, prefix: str, labelled: bool, linestyle: str) -> None:
        for name, colour in zip(metric_names(rows, prefix), COLOURS * 3, strict=False):
            points = [(row["step"], row[name]) for row in rows if name in row]
            style = {"color": colour, "linewidth": 1.3, "linestyle": linestyle}
            axis.plot(*zip(*points, strict=True), **style, label=label(name) if labelled else None)

    for axis, (title, statistic) in zip(axes, panels.items(), strict=False):
        draw(axis, f"collapse/teacher/{statistic}/", labelled=True, linestyle="-")
        draw(axis, f"collapse/student/{statistic}/", labelled=False, linestyle="--")
        axis.set_title(title, fontsize=10)
        style_axis(axis, "step")
    for axis, predictor in zip(axes[-2:], ("position", "image"), strict=True):
        draw(axis, f"collapse/target/{predictor}/", labelled=True, linestyle="-")
        axis.set_title(f"targets explained by the {predictor}", fontsize=10)
        axis.set_ylim(0, 1)
        style_axis(axis, "step", levels={"warning": MAX_TRIVIAL_SHARE})
    return figure


def weight_by_distance(betas: dict[str, float], farthest: float, distance_norm: str = "none") -> Figure:
    """Draw the weight r of a masked patch by its distance to the nearest visible one, a line per beta.

    farthest: largest distance in patches.
    """
    figure = Figure(figsize=(4.6, 3.2), layout="tight")
    axis = figure.subplots()
    patches = torch.linspace(1, max(2.0, farthest), 100)[None]
    distance = patches / patches.max() if distance_norm == "max" else patches
    for (name, beta), colour in zip(betas.items(), COLOURS * 3, strict=False):
        weight = dk.distance_weights(distance, torch.tensor([beta]))[0, 0]
        axis.plot(patches[0], weight, color=colour, linewidth=1.6, label=f"{label(name)}: β = {beta:.2f}")
    axis.set_ylim(0, 1.05)
    style_axis(axis, "distance to the nearest visible patch, in patches", "weight")
    return figure


def style_axis(axis: Axes, xlabel: str, ylabel: str = "", levels: dict[str, float] | None = None) -> None:
    """Label the axes, draw a light grid, remove the upper and right border; add a legend if anything is labelled.

    levels: {name: value}, drawn as grey horizontal lines.
    """
    for number, (name, value) in enumerate((levels or {}).items()):
        axis.axhline(value, color="#777", linewidth=1, linestyle=("--", "-.", ":")[number % 3], label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=7, frameon=False)


def metric_names(rows: list[dict[str, float]], prefix: str) -> list[str]:
    """Return the metrics whose names start with `prefix`, sorted if some rows lack some."""
    names = list(dict.fromkeys(name for row in rows for name in row if name.startswith(prefix)))
    return names if all(name in rows[-1] for name in names) else sorted(names)
