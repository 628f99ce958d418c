"""The paper's figures of runs and encoders, side by side: pictures, and what they show as numbers."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from ddae.config.base import ShardsConfig
from ddae.config.pretrain import PretrainConfig
from ddae.data.cache import open_cache
from ddae.data.masking import MASK_KINDS, sample_mask
from ddae.distributed.checkpoint_format import load_weights
from ddae.distributed.comm import device
from ddae.errors import UserError
from ddae.eval.attention import Locality, attention, cls_map, foreground_iou, locality, patch_distances
from ddae.eval.dataset import ExampleReader, read
from ddae.eval.segmentation_data import IGNORED, SceneReader, resized, resized_labels
from ddae.export.encoder import load_encoder, newest_checkpoint
from ddae.method.distance import masked_distance
from ddae.method.model import construct_model
from ddae.models.patches import normalise
from ddae.models.vit import Encoder
from ddae.report import figures
from ddae.report import html as report
from ddae.report.figures import COLOURS, on_grid
from ddae.training.tracker import read_metrics

RATIOS = (0.5, 0.75, 0.9)
ZOOM = 0.15  # share of the training that the zoomed betas show


def distance_maps(grid: tuple[int, int], kinds: Sequence[str] = MASK_KINDS) -> Figure:
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


KINDS = ("distance", "attention", "locality", "betas", "reconstructions")
BATCH = 32  # images at a time


class Shown(NamedTuple):
    """An encoder, or the run that it is of."""

    name: str
    path: Path
    encoder: Encoder
    config: PretrainConfig | None  # of a run of ours


class Settings(NamedTuple):
    kinds: Sequence[str]  # what to draw; empty: all that there is to be drawn
    block: int  # whose attention is shown
    images: int  # over which attention is measured
    shown: int  # images that are shown
    svg: bool  # beside the PNG
    masks: str  # shards with masks, by which attention is held against the foreground; empty: none
    classes: int  # how many these have, where they do not name them


def gallery(named: Sequence[str], data: str, out: Path, settings: Settings) -> dict[str, Any]:
    """Draw into `out`; the numbers, which results.json has, too. `named`: PATH or NAME=PATH.

    UserError where an encoder, a run or images cannot be read, or what is asked for is not there.
    """
    for kind in settings.kinds:
        if kind not in KINDS:
            raise UserError(f"there is no figure {kind!r}: choose some of {', '.join(KINDS)}")
    all_shown = [_open(each) for each in named]
    if len({each.name for each in all_shown}) < len(all_shown):
        raise UserError("two of the encoders have one name: give names of your own, as in MAE=files/mae.pth")
    data = data or next((each.config.data.train for each in all_shown if each.config), "")
    if not data:
        raise UserError("no images are named: add --data with a folder of shards")
    drawn: dict[str, Figure] = {}
    results: dict[str, Any] = {"task": "figures", "encoders": {each.name: str(each.path) for each in all_shown}}

    def wanted(kind: str, there: bool, lack: str) -> bool:
        if kind in settings.kinds and not there:
            raise UserError(lack)
        return there and (not settings.kinds or kind in settings.kinds)

    if wanted("distance", True, ""):
        drawn["distance"] = distance_maps(all_shown[0].encoder.grid)
    if wanted("attention", True, ""):
        drawn["attention"] = _attention(all_shown, data, settings)
    if wanted("locality", True, ""):
        drawn["locality"], results["locality"] = _locality(all_shown, data, settings.images)
    if settings.masks:
        results["foreground_iou"] = {each.name: _foreground(each, settings) for each in all_shown}
    exponents: dict[str, list[dict[str, float]]] = {}
    for each in all_shown:
        suffix = "" if len(all_shown) == 1 else f"_{each.name}"
        rows = read_metrics(each.path / "metrics.jsonl") if each.config else []
        rows = [row for row in rows if any(name.startswith("beta/") for name in row)]
        if wanted("betas", bool(rows), f"{each.path} logged no betas: name a run of a dynamic method"):
            exponents[each.name] = rows
        method = each.config is not None and each.config.pixel.enabled and newest_checkpoint(each.path) is not None
        lack = f"{each.path} has no checkpoint of a pixel branch: name a run folder with its checkpoints/"
        if wanted("reconstructions", method, lack):
            drawn[f"reconstructions{suffix}"] = _reconstructions(each, data, settings.shown)
    if exponents:
        drawn["betas"] = beta_curves(exponents)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    if settings.svg:
        for name, figure in drawn.items():
            figure.savefig(out / f"{name}.svg")
    report.add_evaluation(out, drawn)
    return results


def _open(named: str) -> Shown:
    name, _, path = ("", "", named) if Path(named).exists() else named.rpartition("=")
    folder = Path(path)
    encoder = load_encoder(folder).to(device())
    config = None
    if (folder / "metrics.jsonl").exists():
        config = PretrainConfig.from_dict(json.loads((folder / "config.json").read_text()))
    return Shown(name or folder.name, folder, encoder, config)


def _images(data: str, size: int, count: int) -> Iterator[Tensor]:
    """uint8 [B, 3, S, S]: some of the validation images, or of the others where there are none; always the same."""
    try:
        reader = ExampleReader(data, "val", size, labelled=False)
    except UserError:
        reader = ExampleReader(data, "train", size, labelled=False)
    some = torch.randperm(len(reader), generator=torch.Generator().manual_seed(0))[:count].tolist()
    for images, _ in read(reader, some, 0, BATCH):
        yield images.to(device())


def _some(data: str, size: int, count: int) -> Tensor:
    return torch.cat(list(_images(data, size, count)))


def _attention(all_shown: Sequence[Shown], data: str, settings: Settings) -> Figure:
    maps, images = {}, None
    for each in all_shown:
        if settings.block > len(each.encoder.blocks):
            raise UserError(f"{each.name} has {len(each.encoder.blocks)} blocks: choose one of them with --block")
        own = _some(data, each.encoder.shape.image_size, settings.shown)
        images = own if images is None or own.shape[2] > images.shape[2] else images
        shares = attention(each.encoder, normalise(own, each.encoder.normalisation, torch.float32), [settings.block])
        maps[each.name] = cls_map(shares[settings.block], each.encoder.grid).cpu()
    assert images is not None
    return attention_grid(images.cpu(), maps, settings.block)


def _locality(all_shown: Sequence[Shown], data: str, count: int) -> tuple[Figure, dict[str, Any]]:
    found = {
        each.name: locality(each.encoder, _images(data, each.encoder.shape.image_size, count)) for each in all_shown
    }
    patches = {each.name: (each.encoder.grid, each.encoder.shape.patch_size) for each in all_shown}
    numbers = {}
    for name, local in found.items():
        distance, diversity = local.deep_half
        numbers[name] = {"distance_px": distance * patches[name][1], "diversity": diversity}
    return distance_dots(found, patches), numbers


@torch.no_grad()
def _reconstructions(each: Shown, data: str, count: int) -> Figure:
    config = each.config
    checkpoint = newest_checkpoint(each.path)
    assert config is not None
    assert checkpoint is not None
    method = construct_model(config)
    load_weights(checkpoint, "weight", method)
    method.to(device()).eval()
    rows = [row for row in read_metrics(each.path / "metrics.jsonl") if "loss/total" in row]
    by_name = {name.removeprefix("beta/"): value for name, value in rows[-1].items() if name.startswith("beta/")}
    images = _some(data, config.model.image_size, count)
    return figures.reconstructions(method, config, images, figures.betas_of_pixels(config, by_name))


def _foreground(each: Shown, settings: Settings) -> float:
    """Mean intersection over union of what the cls token looks at with what is not of an image's commonest class."""
    encoder, side = each.encoder, each.encoder.shape.image_size
    try:
        reader = SceneReader(settings.masks, "val", side, open_cache(ShardsConfig()), settings.classes)
    except UserError as error:
        raise UserError(f"--masks: {error}") from None
    found = []
    for scene in read(reader, range(0, len(reader), max(1, len(reader) // settings.images)), 0):
        image = torch.from_numpy(resized(scene.image.numpy(), side, side))[None].to(device())
        shares = attention(encoder, normalise(image, encoder.normalisation, torch.float32), [settings.block])
        labels = torch.from_numpy(resized_labels(scene.labels.numpy(), *encoder.grid))
        known = labels[labels != IGNORED]
        common = known.mode().values if known.numel() else IGNORED
        foreground = (labels != IGNORED) & (labels != common)
        found.append(foreground_iou(cls_map(shares[settings.block], encoder.grid).cpu(), foreground[None]))
    return float(torch.cat(found).nanmean())
