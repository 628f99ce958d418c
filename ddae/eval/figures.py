"""Figures of evaluations: predictions, confusion matrices, neighbours, codebooks, segmentations.

The drawing functions return a matplotlib figure; class_colours(), blend_classes() and add_legend() work on pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddae.eval.dataset import ExampleReader
from ddae.report.figures import COLOURS, image_axes, show_image, style_axis

MAX_LEGEND_CLASSES = 6  # in the legend beside an image
MAX_CLASSES = 30  # in a confusion matrix, and at each end of a bar chart
MAX_CODES, PATCHES_PER_CODE = 12, 16  # rows and columns of patches_by_code()
POOLINGS = {"cls": "cls token", "mean": "mean of patches"}  # labels in a figure
CORRECT, WRONG = COLOURS[0], COLOURS[1]


def confusion_matrix(counts: Tensor, names: Sequence[str]) -> Figure:
    """Draw a confusion matrix, each row normalised to 1. counts: int64 [C, C], true classes in rows.

    Of more than MAX_CLASSES classes only those with the largest error rates are drawn.
    """
    rates = counts.float() / counts.sum(1, keepdim=True).clamp(min=1)
    classes = torch.arange(len(counts))
    if len(counts) > MAX_CLASSES:
        errors = (1 - rates.diagonal()).where(counts.sum(1) > 0, -1)
        classes = errors.topk(MAX_CLASSES).indices.sort().values
    rates = rates[classes][:, classes]
    side = 2.4 + 0.26 * len(classes)
    figure = Figure(figsize=(side + 0.8, side), layout="tight")
    axis = figure.subplots()
    image = axis.imshow(rates.numpy(), cmap="Blues", vmin=0, vmax=1)
    labels = [_name(names, number) for number in classes.tolist()]
    axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.set(xlabel="predicted class", ylabel="true class")
    for row, column in (rates >= 0.005).nonzero().tolist() if len(classes) <= 15 else ():
        rate = float(rates[row, column])
        colour = "white" if rate > 0.5 else "#333"
        axis.text(column, row, f"{rate:.2f}", ha="center", va="center", fontsize=6, color=colour)
    if len(counts) > MAX_CLASSES:
        axis.set_title(f"the {MAX_CLASSES} of {len(counts)} classes with the largest error rates", fontsize=9)
    figure.colorbar(image, ax=axis, shrink=0.7, label="share of the true class")
    return figure


def prediction_grid(images: Tensor, labels: Tensor, logits: Tensor, names: Sequence[str]) -> Figure:
    """Draw images with the predicted class and its probability, and with the true class if the prediction is wrong.

    images: uint8 [B, 3, H, W]; labels: int64 [B]; logits: [B, C].
    """
    columns = min(6, len(images))
    figure, axes = image_axes(-(-len(images) // columns), columns, 1.75, 2.15)
    probabilities, predicted = logits.float().softmax(1).max(1)
    for axis, image, label, guess, confidence in zip(axes.flat, images, labels, predicted, probabilities, strict=False):
        correct = bool(label == guess)
        title = f"{_name(names, int(guess))}, {float(confidence):.0%}"
        title += "" if correct else f"\nnot {_name(names, int(label))}"
        show_image(axis, image, title, CORRECT if correct else WRONG)
    return figure


def patches_by_code(images: Tensor, codes: Tensor, patch: int) -> Figure:
    """Draw a row of example patches for each of the most frequent codes.

    images: uint8 [B, 3, H, W]; codes: int64 [B, N]; patch: pixels a side. Each example is the patch, framed, with its
    eight neighbours.
    """
    columns = images.shape[-1] // patch
    counts = codes.flatten().bincount()
    frequent = counts.argsort(descending=True)[: min(MAX_CODES, int((counts > 0).sum()))]
    padded = torch.nn.functional.pad(images, (patch,) * 4, value=255)
    generator = torch.Generator().manual_seed(0)
    figure, axes = image_axes(len(frequent), PATCHES_PER_CODE, 0.62, 0.66)
    for row, code in zip(axes, frequent.tolist(), strict=True):
        positions = (codes == code).nonzero()
        positions = positions[torch.randperm(len(positions), generator=generator)[:PATCHES_PER_CODE]]
        for axis, (image, position) in zip(row, positions.tolist(), strict=False):
            top, left = position // columns * patch, position % columns * patch
            show_image(axis, padded[image, :, top : top + 3 * patch, left : left + 3 * patch])
            corner = (patch - 0.5, patch - 0.5)
            axis.add_patch(Rectangle(corner, patch, patch, fill=False, edgecolor=COLOURS[1], linewidth=1))
        row[0].set_title(f"code {code}", fontsize=6, loc="left", pad=2)
    return figure


def metric_by_block(values: dict[str, float], ylabel: str, baselines: dict[str, float]) -> Figure:
    """Draw a metric over the blocks, one line per pooling; baselines, by name, are dashed lines.

    values: {"block 12 cls": 60.3, ...}.
    """
    figure = Figure(figsize=(4.6, 3.2), layout="tight")
    axis = figure.subplots()
    for (pooling, label), colour in zip(POOLINGS.items(), COLOURS, strict=False):
        points = [(int(name.split()[1]), value) for name, value in values.items() if name.endswith(pooling)]
        axis.plot(*zip(*points, strict=True), color=colour, marker="o", linewidth=1.4, label=label)
    axis.set_xticks(sorted({int(name.split()[1]) for name in values}))
    style_axis(axis, "block", ylabel, baselines)
    return figure


def neighbour_grid(
    rows: Sequence[tuple[int, Sequence[int]]], queries: ExampleReader, bank: ExampleReader, names: Sequence[str]
) -> Figure:
    """Draw query images, each with its nearest images of the bank, and their classes if `names` is not empty.

    rows: (index of a query, indices of its neighbours in the bank).
    """
    figure, axes = image_axes(len(rows), 1 + len(rows[0][1]), 1.35, 1.6)
    for axis_row, (query, nearest) in zip(axes, rows, strict=True):
        image, label = queries[query]
        for axis, (picture, number) in zip(axis_row, [(image, label), *map(bank.__getitem__, nearest)], strict=True):
            title = _name(names, number) if names else ""
            show_image(axis, picture.transpose(1, 2, 0), title, CORRECT if number == label else WRONG)
        axis_row[0].set_title(_name(names, label) if names else "query", fontsize=7, color="black", fontweight="bold")
    return figure


def segmentation_grid(examples: Sequence[tuple[Tensor, Tensor, Tensor]], names: Sequence[str]) -> Figure:
    """Draw images beside their true and predicted classes, with a legend of the most frequent classes.

    examples: (image uint8 [3, h, w], true classes int64 [H, W], predicted classes int64 [H, W]).
    """
    colours = class_colours(len(names))
    figure, axes = image_axes(len(examples), 3, 2.8, 2.5)
    for number, (axis_row, (image, labels, predicted)) in enumerate(zip(axes, examples, strict=True)):
        size = labels.shape[1], labels.shape[0]
        picture = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size))
        pictures = [picture, *(blend_classes(picture, each.numpy(), colours) for each in (labels, predicted))]
        for axis, each, title in zip(axis_row, pictures, ("image", "true classes", "predicted classes"), strict=True):
            show_image(axis, each, title if number == 0 else "")
        counts = torch.cat([labels[labels < len(names)], predicted.flatten()]).bincount(minlength=len(names))
        frequent = counts.topk(min(MAX_LEGEND_CLASSES, len(names))).indices.tolist()
        patches = [Patch(color=tuple(colours[n] / 255), label=_name(names, n)) for n in frequent if counts[n]]
        position = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        axis_row[-1].legend(handles=patches, fontsize=7, frameon=False, **position)
    return figure


def bar_chart(values: dict[str, float], xlabel: str) -> Figure:
    """Draw one bar of 0 to 100 per name, the longest first; of more than 2 * MAX_CLASSES the longest and shortest."""
    ordered = sorted(values.items(), key=lambda pair: pair[1])
    if len(ordered) > 2 * MAX_CLASSES:
        ordered = ordered[:MAX_CLASSES] + ordered[-MAX_CLASSES:]
    figure = Figure(figsize=(6.4, 0.8 + 0.19 * len(ordered)), layout="tight")
    axis = figure.subplots()
    axis.barh(range(len(ordered)), [value for _, value in ordered], color=COLOURS[0], height=0.7)
    axis.set_yticks(range(len(ordered)), [_shorten(name) for name, _ in ordered], fontsize=7)
    if len(ordered) < len(values):
        axis.set_title(f"the {MAX_CLASSES} best and the {MAX_CLASSES} worst of {len(values)} classes", fontsize=9)
    axis.set_ylim(-0.6, len(ordered) - 0.4)
    axis.set_xlim(0, 100)
    style_axis(axis, xlabel)
    return figure


def class_colours(count: int) -> np.ndarray:
    """Return a colour per class, uint8 [count, 3].

    Consecutive classes differ in hue by the golden angle; brightness and saturation cycle.
    """
    hues = (np.arange(count) * 0.61803) % 1
    values, saturations = np.tile([0.95, 0.6, 0.8], count)[:count], np.tile([0.75, 0.9, 0.45, 0.6], count)[:count]
    return (255 * hsv_to_rgb(np.stack([hues, saturations, values], -1))).round().astype(np.uint8)


def blend_classes(image: np.ndarray, labels: np.ndarray, colours: np.ndarray, alpha: float = 0.65) -> np.ndarray:
    """Return the image uint8 [H, W, 3] in grey, blended with its classes' colours; pixels of no class stay grey."""
    valid = labels < len(colours)
    overlay = np.where(valid[..., None], colours[np.where(valid, labels, 0)], 128)
    return (image.mean(-1, keepdims=True) * (1 - alpha) + overlay * alpha).astype(np.uint8)


def add_legend(picture: np.ndarray, names: Sequence[str], colours: Sequence[Sequence[int]]) -> Image.Image:
    """Return the picture uint8 [H, W, 3] with a line of text below it for each name, beside a square of its colour."""
    height, width = picture.shape[:2]
    line = max(14, width // 30)
    canvas = Image.new("RGB", (width, height + line * len(names)), "white")
    canvas.paste(Image.fromarray(picture))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(line * 0.7)
    for number, (name, colour) in enumerate(zip(names, colours, strict=True)):
        top = height + line * number
        draw.rectangle((0, top, line - 2, top + line - 2), tuple(colour))
        draw.text((line + 4, top), name, "black", font)
    return canvas


def _name(names: Sequence[str], number: int) -> str:
    return _shorten(names[number]) if number < len(names) else str(number)


def _shorten(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"
