"""Pictures of what an encoder has learnt. Each function draws one and returns it as a matplotlib figure."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddae.eval.dataset import ExampleReader
from ddae.report.figures import COLOURS

LISTED = 6  # classes that are named beside an image
CODES, PATCHES = 12, 16  # of a codebook, and patches of each, that are shown
MOST = 30  # classes that a confusion matrix shows
RIGHT, WRONG = COLOURS[0], COLOURS[1]


def confusion_matrix(counts: Tensor, names: Sequence[str]) -> Figure:
    """int64 [C, C], true classes in rows -> shares of each row. Of many classes, those that are mistaken most."""
    shares = counts.float() / counts.sum(1, keepdim=True).clamp(min=1)
    chosen = torch.arange(len(counts))
    if len(counts) > MOST:
        mistaken = (1 - shares.diagonal()).where(counts.sum(1) > 0, -1)
        chosen = mistaken.topk(MOST).indices.sort().values
    shown = shares[chosen][:, chosen]
    side = 2.4 + 0.26 * len(chosen)
    figure, axis = plt.subplots(figsize=(side + 0.8, side))
    picture = axis.imshow(shown, cmap="Blues", vmin=0, vmax=1)
    words = [_name(names, number) for number in chosen.tolist()]
    axis.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
    axis.set_yticks(range(len(words)), words, fontsize=7)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if len(chosen) <= 15:
        for row in range(len(chosen)):
            for column in range(len(chosen)):
                share = float(shown[row, column])
                if share >= 0.005:
                    colour = "white" if share > 0.5 else "#333"
                    axis.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=6, color=colour)
    if len(counts) > MOST:
        axis.set_title(f"the {MOST} of {len(counts)} classes that are mistaken most", fontsize=9)
    figure.colorbar(picture, ax=axis, shrink=0.7, label="share of a true class")
    figure.tight_layout()
    return figure


def predictions(images: Tensor, labels: Tensor, logits: Tensor, names: Sequence[str]) -> Figure:
    """uint8 [B, 3, H, W], int64 [B], [B, C] -> pictures with the predicted class and its probability, and the true
    class where that is another."""
    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.75 * columns, 2.15 * rows), squeeze=False)
    probabilities, best = logits.float().softmax(1).max(1)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, label, guess, sure in zip(axes.flat, images, labels, best, probabilities, strict=False):
        axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        right, true, said = bool(label == guess), _name(names, int(label)), _name(names, int(guess))
        words = f"{said}, {float(sure):.0%}" + ("" if right else f"\nnot {true}")
        axis.set_title(words, fontsize=7, color=RIGHT if right else WRONG)
    figure.tight_layout(pad=0.4)
    return figure


def patches_by_code(images: Tensor, codes: Tensor, patch: int) -> Figure:
    """uint8 [B, 3, H, W], int64 [B, N] -> a row for each of the codes that most patches take, with some of its patches
    in their surroundings (three patches a side, the code's own in the middle)."""
    side = images.shape[-1] // patch
    counts = codes.flatten().bincount()
    chosen = counts.argsort(descending=True)[: min(CODES, int((counts > 0).sum()))]
    framed = torch.nn.functional.pad(images, (patch,) * 4, value=255)
    generator = torch.Generator().manual_seed(0)
    figure, axes = plt.subplots(len(chosen), PATCHES, figsize=(0.62 * PATCHES, 0.66 * len(chosen)), squeeze=False)
    for row, code in zip(axes, chosen.tolist(), strict=True):
        found = (codes == code).nonzero()
        found = found[torch.randperm(len(found), generator=generator)[:PATCHES]]
        row[0].set_title(f"code {code}", fontsize=6, loc="left", pad=2)
        for axis in row:
            axis.set_axis_off()
        for axis, (image, place) in zip(row, found.tolist(), strict=False):
            top, left = place // side * patch, place % side * patch
            axis.imshow(framed[image, :, top : top + 3 * patch, left : left + 3 * patch].permute(1, 2, 0).numpy())
            corner = (patch - 0.5, patch - 0.5)
            axis.add_patch(Rectangle(corner, patch, patch, fill=False, edgecolor=COLOURS[1], linewidth=1))
    figure.tight_layout(pad=0.2)
    return figure


def _name(names: Sequence[str], number: int) -> str:
    return _short(names[number]) if number < len(names) else str(number)


def _short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"


def by_block(values: dict[str, float], what: str, baselines: dict[str, float]) -> Figure:
    """{"block 12 cls": 60.3, ...} -> one line a pooling over the blocks; baselines by name as dashed lines."""
    figure, axis = plt.subplots(figsize=(4.6, 3.2))
    poolings = list(dict.fromkeys(name.split()[2] for name in values))
    for pooling, colour in zip(poolings, COLOURS, strict=False):
        points = [(int(name.split()[1]), value) for name, value in values.items() if name.endswith(pooling)]
        label = "cls token" if pooling == "cls" else "mean of patches"
        axis.plot(*zip(*points, strict=True), color=colour, marker="o", linewidth=1.4, label=label)
    for number, (name, value) in enumerate(baselines.items()):
        axis.axhline(value, color="#777", linewidth=1, linestyle=("--", "-.", ":")[number % 3], label=name)
    axis.set_xticks(sorted({int(name.split()[1]) for name in values}))
    axis.set_xlabel("block")
    axis.set_ylabel(what)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return figure


def neighbours(
    rows: Sequence[tuple[int, Sequence[int]]], queries: ExampleReader, bank: ExampleReader, names: Sequence[str]
) -> Figure:
    """Each row: a query and the images of the bank that are nearest to it, by their numbers; with their classes, where
    these have names."""
    columns = 1 + len(rows[0][1])
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.35 * columns, 1.6 * len(rows)), squeeze=False)
    for axis_row, (query, near) in zip(axes, rows, strict=True):
        image, label = queries[query]
        shown = [(image, label), *(bank[number] for number in near)]
        for axis, (picture, number) in zip(axis_row, shown, strict=True):
            axis.set_axis_off()
            axis.imshow(picture.transpose(1, 2, 0), interpolation="nearest")
            if names:
                axis.set_title(_name(names, number), fontsize=7, color=RIGHT if number == label else WRONG)
        axis_row[0].set_title(_name(names, label) if names else "query", fontsize=7, color="black", fontweight="bold")
    figure.tight_layout(pad=0.4)
    return figure


def palette(count: int) -> np.ndarray:
    """Colours of classes, uint8 [count, 3]: neighbours differ in hue by the golden angle and in lightness by turns."""
    hues = (np.arange(count) * 0.61803) % 1
    values, strengths = np.tile([0.95, 0.6, 0.8], count)[:count], np.tile([0.75, 0.9, 0.45, 0.6], count)[:count]
    return (255 * hsv_to_rgb(np.stack([hues, strengths, values], -1))).round().astype(np.uint8)


def painted(image: np.ndarray, labels: np.ndarray, colours: np.ndarray, strength: float = 0.65) -> np.ndarray:
    """uint8 [H, W, 3] with each pixel's class in its colour over it; labels that are no class leave it grey."""
    known = labels < len(colours)
    over = np.where(known[..., None], colours[np.where(known, labels, 0)], 128)
    return (image * (1 - strength) + over * strength).astype(np.uint8)


def captioned(picture: np.ndarray, names: Sequence[str], colours: Sequence[Sequence[int]]) -> Image.Image:
    """uint8 [H, W, 3] with a line below it for each name, in its colour."""
    height, width = picture.shape[:2]
    line = max(14, width // 30)
    whole = Image.new("RGB", (width, height + line * len(names)), "white")
    whole.paste(Image.fromarray(picture))
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(line * 0.7)
    for number, (name, colour) in enumerate(zip(names, colours, strict=True)):
        top = height + line * number
        draw.rectangle((0, top, line - 2, top + line - 2), tuple(colour))
        draw.text((line + 4, top), name, "black", font)
    return whole


def overlays(seen: Sequence[tuple[Tensor, Tensor, Tensor]], names: Sequence[str]) -> Figure:
    """Each row: an image uint8 [3, h, w], its classes int64 [H, W] and the predicted ones, with the colours of those
    that there are most of."""
    colours = palette(len(names))
    figure, axes = plt.subplots(len(seen), 3, figsize=(8.4, 2.5 * len(seen)), squeeze=False)
    for number, (axis_row, (image, labels, guesses)) in enumerate(zip(axes, seen, strict=True)):
        size = labels.shape[1], labels.shape[0]
        picture = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size))
        shown = [picture, *(painted(picture, each.numpy(), colours) for each in (labels, guesses))]
        for axis, each, title in zip(axis_row, shown, ("image", "true classes", "predicted classes"), strict=True):
            axis.imshow(each, interpolation="nearest")
            axis.set_axis_off()
            axis.set_title(title if number == 0 else "", fontsize=9)
        there = torch.cat([labels[labels < len(names)], guesses.flatten()]).bincount(minlength=len(names))
        most = there.topk(min(LISTED, len(names)))
        patches = [
            Patch(color=tuple(colours[label] / 255), label=_name(names, label))
            for label, count in zip(most.indices.tolist(), most.values.tolist(), strict=True)
            if count
        ]
        place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        axis_row[-1].legend(handles=patches, fontsize=7, frameon=False, **place)
    figure.tight_layout(pad=0.4)
    return figure


def bars(values: dict[str, float], what: str) -> Figure:
    """A bar for each name, the longest first; of many names the first and the last ones."""
    ordered = sorted(values.items(), key=lambda pair: pair[1])
    if len(ordered) > 2 * MOST:
        ordered = ordered[:MOST] + ordered[-MOST:]
    figure, axis = plt.subplots(figsize=(6.4, 0.8 + 0.19 * len(ordered)))
    axis.barh(range(len(ordered)), [value for _, value in ordered], color=COLOURS[0], height=0.7)
    axis.set_yticks(range(len(ordered)), [_short(name) for name, _ in ordered])
    if len(ordered) < len(values):
        axis.set_title(f"the {MOST} best and the {MOST} worst of {len(values)} classes", fontsize=9)
    axis.set_xlabel(what)
    axis.set_ylim(-0.6, len(ordered) - 0.4)
    axis.tick_params(axis="y", labelsize=7)
    axis.grid(alpha=0.25, axis="x")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure
