"""The paper's figures for one or several runs and encoders, and the statistics that belong to them."""

import logging
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from ddae.atomic import write_json
from ddae.config.base import ShardsConfig, describe_size
from ddae.config.pretrain import PretrainConfig
from ddae.data.cache import open_cache
from ddae.data.masking import MASK_KINDS, sample_mask
from ddae.data.sampling import aspect_of
from ddae.distributed.checkpoint_format import load_weights
from ddae.distributed.comm import device
from ddae.errors import UserError
from ddae.eval.attention_metrics import attention_maps, cls_attention, foreground_iou, measure_locality, patch_distances
from ddae.eval.dataset import ExampleReader, batches, load_samples
from ddae.eval.segmentation_data import IGNORE_INDEX, SceneDataset, resize_image, resize_labels
from ddae.export.encoder import load_encoder, newest_checkpoint
from ddae.method.distance import masked_distance
from ddae.method.model import build_uninitialised_model
from ddae.models.patches import normalise
from ddae.models.vit import Encoder
from ddae.report.figures import (
    COLOURS,
    draw_reconstructions,
    image_axes,
    pixel_betas,
    scatter_to_grid,
    show_image,
    style_axis,
)
from ddae.report.html import add_evaluation
from ddae.training.tracker import read_metrics

logger = logging.getLogger(__name__)
KINDS = ("distance", "attention", "locality", "betas", "reconstructions")
MASK_RATIOS = (0.5, 0.75, 0.9)  # of the distance maps
BETA_ZOOM = 0.15  # share of the training in the zoomed panel of the betas
BATCH_SIZE = 32  # images per forward pass


class FigureSettings(NamedTuple):
    kinds: Sequence[str]  # of KINDS; empty: all that can be drawn
    block: int  # of the attention maps, counted from 1
    num_images: int  # over which attention statistics are averaged
    num_shown: int  # images in the figures
    svg: bool  # write SVG files beside the PNG files
    masks: str  # shards with segmentation masks, for the IoU of attention and foreground; empty: not measured
    classes: int  # number of classes in the masks, if the shards do not name them


class NamedEncoder(NamedTuple):
    """An encoder under the name that the figures show."""

    name: str
    path: Path
    encoder: Encoder
    config: PretrainConfig | None  # None if `path` is not a run folder of this version


def draw_paper_figures(named: Sequence[str], data: str, out: Path, settings: FigureSettings) -> dict[str, Any]:
    """Draw the figures into `out` and return the statistics, which are also in results.json.

    named: encoders as PATH or NAME=PATH; data: shards of images, empty for those of the first run. Raise UserError if
    an encoder, a run or an image cannot be read, or if a requested figure cannot be drawn.
    """
    for kind in settings.kinds:
        if kind not in KINDS:
            raise UserError(f"--what contains {kind!r}; expected some of {', '.join(KINDS)}.")
    encoders = [_load(each) for each in named]
    if len({each.name for each in encoders}) < len(encoders):
        raise UserError("two encoders have the same name; expected different names. Pass NAME=PATH, as in MAE=mae.pth.")
    data = data or next((each.config.data.sources[0] for each in encoders if each.config), "")
    if not data:
        raise UserError("no images are given. Pass --data with a folder of shards.")
    drawn: dict[str, Figure] = {}
    results: dict[str, Any] = {"task": "figures", "encoders": {each.name: str(each.path) for each in encoders}}

    def requested(kind: str, available: bool = True, reason: str = "") -> bool:
        if kind in settings.kinds and not available:
            raise UserError(reason)
        return available and (not settings.kinds or kind in settings.kinds)

    if requested("distance"):
        drawn["distance"] = distance_maps(encoders[0].encoder.grid)
    if requested("attention"):
        drawn["attention"] = attention_grid(encoders, data, settings)
    if requested("locality"):
        drawn["locality"], results["locality"] = distance_dots(encoders, data, settings.num_images)
    if settings.masks:
        results["foreground_iou"] = {each.name: _foreground_iou(each, settings) for each in encoders}
    betas: dict[str, list[dict[str, float]]] = {}
    for each in encoders:
        rows = read_metrics(each.path / "metrics.jsonl") if each.config else []
        rows = [row for row in rows if any(name.startswith("beta/") for name in row)]
        if requested("betas", bool(rows), f"{each.path} logged no betas; expected a run folder of a dynamic method."):
            betas[each.name] = rows
        rebuilds = each.config is not None and each.config.pixel.enabled and newest_checkpoint(each.path) is not None
        reason = f"{each.path} has no checkpoint of a pixel branch; expected a run folder that contains checkpoints/."
        if requested("reconstructions", rebuilds, reason):
            suffix = "" if len(encoders) == 1 else f"_{each.name}"
            drawn[f"reconstructions{suffix}"] = _reconstructions(each, data, settings.num_shown)
    if betas:
        drawn["betas"] = beta_curves(betas)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", results)
    if settings.svg:
        for name, figure in drawn.items():
            figure.savefig(out / f"{name}.svg")
    add_evaluation(out, drawn)
    return results


def _load(named: str) -> NamedEncoder:
    """Load an encoder given as PATH or NAME=PATH, and the config if the path is a run folder of this version."""
    name, _, path = ("", "", named) if Path(named).exists() else named.rpartition("=")
    folder = Path(path)
    encoder, is_run = load_encoder(folder).to(device()), (folder / "metrics.jsonl").exists()
    config = None
    if is_run:
        try:
            config = PretrainConfig.read(folder / "config.json")
        except UserError as error:  # its exported encoder is readable nevertheless
            logger.warning("figures of the run itself are left out: %s", error)
    return NamedEncoder(name or folder.name, folder, encoder, config)


def _image_batches(data: str, encoder: Encoder, count: int) -> Iterator[Tensor]:
    """Return batches uint8 [B, 3, H, W] of `count` validation images, or of training images if there are no others.

    The images have the encoder's size and are drawn with a fixed seed.
    """
    size = encoder.shape.image_size
    try:
        reader = ExampleReader(data, "val", size, labelled=False)
    except UserError:
        reader = ExampleReader(data, "train", size, labelled=False)
    indices = torch.randperm(len(reader), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return (batch.images for batch in batches(reader, BATCH_SIZE, 0, device(), indices))


@torch.no_grad()
def _reconstructions(named: NamedEncoder, data: str, count: int) -> Figure:
    """Draw reconstructions of the run's newest checkpoint."""
    config, checkpoint = named.config, newest_checkpoint(named.path)
    assert config is not None
    assert checkpoint is not None
    model = build_uninitialised_model(config)
    load_weights(checkpoint, "weight", model)
    model.to(device()).eval()
    rows = [row for row in read_metrics(named.path / "metrics.jsonl") if "loss/total" in row]
    betas = {name.removeprefix("beta/"): value for name, value in rows[-1].items() if name.startswith("beta/")}
    images = torch.cat(list(_image_batches(data, named.encoder, count)))
    return draw_reconstructions(model, config, images, pixel_betas(config, betas))


def _foreground_iou(named: NamedEncoder, settings: FigureSettings) -> float:
    """Return the mean IoU of the cls token's attention with the foreground: all but an image's most frequent class."""
    encoder = named.encoder
    height, width = encoder.shape.height_width
    try:
        dataset = SceneDataset(settings.masks, "val", max(height, width), open_cache(ShardsConfig()), settings.classes)
    except UserError as error:
        raise UserError(f"--masks: {error}") from None
    ious = []
    for scene in load_samples(dataset, range(0, len(dataset), max(1, len(dataset) // settings.num_images)), 0):
        image = torch.from_numpy(resize_image(scene.image.numpy(), height, width))[None].to(device())
        labels = torch.from_numpy(resize_labels(scene.labels.numpy(), *encoder.grid))
        valid = labels[labels != IGNORE_INDEX]
        background = valid.mode().values if valid.numel() else IGNORE_INDEX
        foreground = (labels != IGNORE_INDEX) & (labels != background)
        ious.append(foreground_iou(_cls_attention(encoder, image, settings.block), foreground[None]))
    return float(torch.cat(ious).nanmean())


def _cls_attention(encoder: Encoder, images: Tensor, block: int) -> Tensor:
    """Return the cls_attention() of images uint8 [B, 3, H, W] in a block: float [B, h, w] on the CPU."""
    pixels = normalise(images, encoder.normalisation, torch.float32)
    return cls_attention(attention_maps(encoder, pixels, [block])[block], encoder.grid).cpu()


def distance_maps(grid: tuple[int, int]) -> Figure:
    """Draw Figure 2: distances of masked patches to the nearest visible one, over their maximum, by mask and ratio."""
    size = (2.2 * len(MASK_RATIOS) + 1, 2.3 * len(MASK_KINDS))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(MASK_KINDS), len(MASK_RATIOS), squeeze=False)
    for row, kind in zip(axes, MASK_KINDS, strict=True):
        for axis, ratio in zip(row, MASK_RATIOS, strict=True):
            mask = sample_mask(kind, torch.tensor([7]), grid, round(ratio * grid[0] * grid[1]))
            largest = float(masked_distance(mask, grid).max())
            relative = scatter_to_grid(masked_distance(mask, grid, norm="max"), mask, grid)[0]
            axis.imshow(relative, cmap="cividis_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{ratio:.0%} masked, maximum {largest:.1f} patches", fontsize=8)
        row[0].set_ylabel(kind, fontsize=9)
    label = "distance / maximum distance (white: visible patch)"
    figure.colorbar(axes[0, 0].images[0], ax=axes, shrink=0.6, label=label)
    return figure


def attention_grid(encoders: Sequence[NamedEncoder], data: str, settings: FigureSettings) -> Figure:
    """Draw Figures 3 and 7: images, at the largest of the encoders' image sizes, above each encoder's cls attention.

    Every map is scaled from its minimum to its maximum.
    """
    images, maps = [], {}
    for each in encoders:
        depth = len(each.encoder.blocks)
        if not 1 <= settings.block <= depth:
            raise UserError(f"--block is {settings.block}; expected 1 to {depth}, the blocks of {each.name}.")
        images.append(torch.cat(list(_image_batches(data, each.encoder, settings.num_shown))))
        maps[each.name] = _cls_attention(each.encoder, images[-1], settings.block)
    if len({aspect_of(each.encoder.shape.image_size) for each in encoders}) > 1:
        sizes = ", ".join(f"{each.name}: {describe_size(each.encoder.shape.image_size)}" for each in encoders)
        raise UserError(f"the encoders have images of different aspect ({sizes}). Draw them one at a time.")
    largest = max(images, key=lambda of_encoder: of_encoder.shape[2])
    figure, axes = image_axes(1 + len(maps), len(largest), 1.5, 1.55)
    for axis, image in zip(axes[0], largest, strict=True):
        show_image(axis, image)
    for row, (name, attention) in zip(axes[1:], maps.items(), strict=True):
        size = tuple(largest.shape[2:])
        large = F.interpolate(attention[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]
        low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
        for axis, each in zip(row, (large - low) / (high - low).clamp(min=1e-12), strict=True):
            show_image(axis, each.numpy(), cmap="viridis", vmin=0, vmax=1)
        row[0].set_title(name, fontsize=8, loc="left")
    figure.suptitle(f"cls attention in block {settings.block}, averaged over heads (yellow: largest)", fontsize=9)
    return figure


def distance_dots(encoders: Sequence[NamedEncoder], data: str, num_images: int) -> tuple[Figure, dict[str, Any]]:
    """Draw Figure 4: the attention distance of every head in pixels, by block.

    Return the figure, and each encoder's mean distance and diversity over the later half of its blocks.
    """
    count, results = len(encoders), {}
    figure = Figure(figsize=(4.4 * count, 3.5), layout="tight")
    axes = figure.subplots(1, count, squeeze=False, sharey=True)
    for axis, (name, _, encoder, _), colour in zip(axes[0], encoders, cycle(COLOURS), strict=False):
        local, side = measure_locality(encoder, _image_batches(data, encoder, num_images)), encoder.shape.patch_size
        mean_distance, diversity = local.deep_half
        results[name] = {"distance_px": mean_distance * side, "diversity": diversity}
        distance, blocks = local.distance * side, np.arange(1, len(local.distance) + 1)
        for head in distance.T:
            axis.scatter(blocks, head, s=14, color=colour, alpha=0.6, linewidths=0)
        axis.plot(blocks, distance.mean(1), color=colour, linewidth=1.5, label="mean of the heads")
        uniform = float(patch_distances(encoder.grid).mean()) * side
        axis.set_title(f"{name}: mean of the later half {mean_distance * side:.1f} px", fontsize=10)
        axis.set_xticks(blocks if len(blocks) <= 12 else blocks[1::2])
        style_axis(axis, "block", levels={f"uniform attention: {uniform:.0f}": uniform})
    axes[0, 0].set_ylabel("attention distance in pixels (one dot per head)", fontsize=9)
    axes[0, 0].set_ylim(bottom=0)
    return figure, results


def beta_curves(runs: dict[str, list[dict[str, float]]]) -> Figure:
    """Draw Figures 5 and 6: the betas of each run by epoch, over the whole training and over its beginning."""
    size = (9.2, 0.6 + 2.9 * len(runs))
    figure = Figure(figsize=size, layout="tight")
    axes = figure.subplots(len(runs), 2, squeeze=False, sharey="col")
    for (run, rows), row_of_axes in zip(runs.items(), axes, strict=True):
        names, end = [name for name in rows[-1] if name.startswith("beta/")], rows[-1]["epoch"]
        panels = ((end, "whole training"), (BETA_ZOOM * end, f"first {BETA_ZOOM:.0%}"))
        for axis, (last, title) in zip(row_of_axes, panels, strict=True):
            within = [row for row in rows if row["epoch"] <= last and names[0] in row]
            epochs = [row["epoch"] for row in within]
            for name, colour in zip(names, COLOURS * 3, strict=False):
                label = f"block {int(name[-2:])}" + (f", {name.split('/')[1]}" if name.count("/") > 1 else "")
                axis.plot(epochs, [row[name] for row in within], color=colour, linewidth=1.4, label=label)
            axis.set_title(f"{run}: {title}" if len(runs) > 1 else title, fontsize=10)
            style_axis(axis, "epoch", "β")
    return figure
