"""Pictures of a run. Each function draws one and returns it as a matplotlib figure; report.py shows them."""

import matplotlib

matplotlib.use("Agg")

import ddae_kernels as dk
import matplotlib.pyplot as plt
import numpy as np
import torch
from ddae_kernels.dynamic import PATCH_NORMS
from matplotlib.figure import Figure
from torch import Tensor

from ddae.config.pretrain import PretrainConfig, tap_name
from ddae.data.masking import Mask, sample_mask
from ddae.method.branches import PixelBranch
from ddae.method.distance import masked_distance
from ddae.method.model import PretrainModel
from ddae.models.patches import NORMALISATIONS, patchify, unpatchify

GREY = 0.82  # of hidden patches
BASELINES = ("raw_pixels", "chance")  # metrics that do not depend on the encoder
COLOURS = ("#0b6e99", "#d1495b", "#edae49", "#66a182", "#7a5195", "#444444", "#8d6e63", "#c2185b")


@torch.no_grad()
def reconstruct(method: PretrainModel, images: Tensor, mask: Mask) -> dict[int, Tensor]:
    """{tap: [B, 3, H, W] in [0, 1]}: visible patches as they are, masked ones as the pixel branch rebuilds them.

    A prediction is of normalised patches; each is given back the true patch's mean and deviation.
    """
    branch = method.branches["pixel"]
    assert isinstance(branch, PixelBranch)
    tokens = method.encode(images, mask.visible)
    predicted = branch.predict(tokens, mask).float()
    patches = patchify(images, branch.patch).float() / 255
    rows = mask.masked[:, :, None].expand(-1, -1, patches.shape[-1])
    mean, std = (
        torch.tensor(x, device=images.device).repeat(branch.patch**2) for x in NORMALISATIONS[method.normalisation]
    )
    true = ((patches.gather(1, rows) - mean) / std).unflatten(-1, (-1, 3))
    if branch.norm != "none":
        over = (-2,) if branch.norm == "per_channel" else (-2, -1)
        unbiased, eps = PATCH_NORMS[branch.norm]
        centre = true.mean(over, keepdim=True)
        spread = (true.var(over, unbiased=unbiased, keepdim=True) + eps).sqrt()
        predicted = (predicted.unflatten(-1, (-1, 3)) * spread + centre).flatten(-2)
    predicted = (predicted * std + mean).clamp(0, 1)
    grid = images.shape[2] // branch.patch, images.shape[3] // branch.patch
    return {
        tap: unpatchify(patches.scatter(1, rows, rebuilt), grid, branch.patch)
        for tap, rebuilt in zip(branch.taps, predicted, strict=True)
    }


def hide(images: Tensor, mask: Mask, patch: int) -> Tensor:
    """[B, 3, H, W] in [0, 1] with the masked patches grey."""
    patches = patchify(images.float() / 255, patch)
    rows = mask.masked[:, :, None].expand(-1, -1, patches.shape[-1])
    grid = images.shape[2] // patch, images.shape[3] // patch
    return unpatchify(patches.scatter(1, rows, GREY), grid, patch)


def reconstructions(method: PretrainModel, config: PretrainConfig, images: Tensor, betas: dict[int, float]) -> Figure:
    """What the pixel branch makes of images uint8 [B, 3, H, W], rows taking turns between the run's own masks and
    random ones. betas: of its taps, as far as they have one."""
    kinds = [config.mask.kind if number % 2 == 0 else "random" for number in range(len(images))]
    seeds = torch.arange(len(images)) + 1
    by_row = [sample_mask(k, s[None], config.grid, config.num_masked) for k, s in zip(kinds, seeds, strict=True)]
    mask = Mask(*(torch.cat(positions).to(images.device) for positions in zip(*by_row, strict=True)))
    rebuilt = reconstruct(method, images, mask)
    return reconstruction_grid(
        images, mask, kinds, config.model.patch_size, rebuilt, betas, config.dynamic.distance_norm
    )


def betas_of_pixels(config: PretrainConfig, by_name: dict[str, float]) -> dict[int, float]:
    """The betas of the pixel branch's taps, of all betas by name; none where it is not dynamic."""
    prefix = "" if config.dynamic.shared else "pixel/"
    names = {tap: prefix + tap_name(tap) for tap in config.pixel.taps if config.pixel.dynamic}
    return {tap: by_name[name] for tap, name in names.items() if name in by_name}


def on_grid(values: Tensor, mask: Mask, grid: tuple[int, int]) -> np.ndarray:
    """Values of masked patches [B, M] -> [B, H, W], NaN where visible."""
    whole = torch.full((len(values), grid[0] * grid[1]), torch.nan)
    return whole.scatter(1, mask.masked.cpu(), values.float().cpu()).view(-1, *grid).numpy()


def reconstruction_grid(
    images: Tensor,
    mask: Mask,
    kinds: list[str],
    patch: int,
    rebuilt: dict[int, Tensor],
    betas: dict[int, float],
    distance_norm: str = "none",
) -> Figure:
    """Rows: images, each with the kind of its mask. Columns: input, visible patches, each tap's reconstruction,
    distances, each tap's weights."""
    grid = images.shape[2] // patch, images.shape[3] // patch
    distance = masked_distance(mask, grid, norm=distance_norm)
    pictures = [("input", images.float() / 255), ("visible", hide(images, mask, patch))]
    pictures += [(f"block {tap}", picture) for tap, picture in rebuilt.items()]
    maps: list[tuple[str, np.ndarray, tuple[int, int] | None]] = [("distance", on_grid(distance, mask, grid), None)]
    for tap, beta in betas.items():
        weight = dk.distance_weights(distance, torch.tensor([beta], device=distance.device))[0]
        maps.append((f"weight {tap}, β={beta:.2f}", on_grid(weight, mask, grid), (0, 1)))
    columns = len(pictures) + len(maps)
    figure, axes = plt.subplots(len(images), columns, figsize=(1.45 * columns, 1.52 * len(images)), squeeze=False)
    for row, kind in enumerate(kinds):
        axes[row, 0].text(
            -0.08, 0.5, kind, rotation=90, va="center", ha="center", transform=axes[row, 0].transAxes, size=7
        )
        for column, (title, picture) in enumerate(pictures):
            _show(axes[row, column], picture[row].permute(1, 2, 0).cpu().numpy(), title if row == 0 else "")
        for column, (title, values, limits) in enumerate(maps, len(pictures)):
            low, high = limits or (0, float(np.nanmax(values)))
            _show(axes[row, column], values[row], title if row == 0 else "", cmap="viridis", vmin=low, vmax=high)
    figure.tight_layout(pad=0.3)
    return figure


def _show(axis, picture: np.ndarray, title: str, **options) -> None:
    axis.imshow(picture, interpolation="nearest", **options)
    axis.set_title(title, fontsize=8)
    axis.set_axis_off()


def curves(
    rows: list[dict[str, float]],
    groups: dict[str, list[str]],
    title: str,
    levels: dict[str, dict[str, float]] | None = None,
) -> Figure:
    """Lines over steps, one panel a group of metric names; a metric's last word labels its line.

    levels: {panel: {name: value}}, grey horizontal lines.
    """
    figure, axes = plt.subplots(1, len(groups), figsize=(4.6 * len(groups), 3.2), squeeze=False)
    for axis, (heading, names) in zip(axes[0], groups.items(), strict=True):
        for name, colour in zip(names, COLOURS * 3, strict=False):
            points = [(row["step"], row[name]) for row in rows if name in row]
            style = {"color": colour, "linewidth": 1.4, "marker": "o" if len(points) < 3 else None}
            if name.endswith(BASELINES):
                style |= {"color": "#777", "linewidth": 1, "linestyle": "-." if name.endswith(BASELINES[0]) else ":"}
            axis.plot(*zip(*points, strict=True), **style, label=name.split("/", 1)[-1])
        for number, (name, value) in enumerate((levels or {}).get(heading, {}).items()):
            axis.axhline(value, color="#777", linewidth=1, linestyle=("--", "-.", ":")[number % 3], label=name)
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    return figure


def weight_by_distance(betas: dict[str, float], farthest: float, distance_norm: str = "none") -> Figure:
    """The weight r of a patch at each distance in patches, one line a beta, in an image whose masked patches lie at
    distances from 1 to `farthest`."""
    figure, axis = plt.subplots(figsize=(4.6, 3.2))
    patches = torch.linspace(1, max(2.0, farthest), 100)[None]
    distance = patches / patches.max() if distance_norm == "max" else patches
    for (name, beta), colour in zip(betas.items(), COLOURS * 3, strict=False):
        weight = dk.distance_weights(distance, torch.tensor([beta]))[0, 0]
        axis.plot(patches[0], weight, color=colour, linewidth=1.6, label=f"{name}: β={beta:.2f}")
    axis.set_xlabel("distance to the nearest visible patch, in patches")
    axis.set_ylabel("weight")
    axis.set_ylim(0, 1.05)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return figure


def metric_names(rows: list[dict[str, float]], prefix: str) -> list[str]:
    """Names of the metrics under a prefix, in the order of the log."""
    return [name for name in rows[-1] if name.startswith(prefix)] if rows else []
