"""Figures of embeddings: a map of the photos, and pairs of near-duplicates."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ddae.data.photo import load_rgb
from ddae.eval.embed import Duplicate
from ddae.report.figures import image_axes, show_image

MAX_MAPPED = 5000  # photos on the map, spread evenly over all
CELLS = 32  # pictures along each side of the map
THUMBNAIL = 48  # pixels a side of a picture on the map
MAX_PAIRS = 12  # near-duplicates that are drawn


def draw_map(photos: Sequence[Path], values: np.ndarray) -> Figure:
    """Draw the photos so that similar ones are close (t-SNE): a picture in each cell of a grid that holds a photo.

    values: float32 [N, D].
    """
    chosen = np.unique(np.linspace(0, len(photos) - 1, min(MAX_MAPPED, len(photos))).astype(int))
    places = _two_dimensions(values[chosen])
    low, span = places.min(0), np.maximum(np.ptp(places, axis=0), 1e-9)
    cells = np.minimum((places - low) / span * CELLS, CELLS - 1).astype(int)
    nearest: dict[tuple[int, int], tuple[float, int]] = {}  # cell -> distance to its centre, photo
    for place, (column, row), photo in zip((places - low) / span * CELLS, cells.tolist(), chosen.tolist(), strict=True):
        distance = float(np.abs(place - (column + 0.5, row + 0.5)).max())
        nearest[column, row] = min(nearest.get((column, row), (distance, photo)), (distance, photo))
    canvas = np.full((CELLS * THUMBNAIL, CELLS * THUMBNAIL, 3), 255, np.uint8)
    for (column, row), (_, photo) in nearest.items():
        top, left = (CELLS - 1 - row) * THUMBNAIL, column * THUMBNAIL
        canvas[top : top + THUMBNAIL, left : left + THUMBNAIL] = _thumbnail(photos[photo])
    figure = Figure(figsize=(12, 12.4), layout="tight")
    axis = figure.subplots()
    axis.imshow(canvas, interpolation="nearest")
    axis.set_axis_off()
    shown = f"{len(nearest):,} of {len(photos):,} photos, one for each place that has any"
    axis.set_title(f"Similar photos are close to each other (t-SNE of the embeddings); {shown}", fontsize=11)
    return figure


def _two_dimensions(values: np.ndarray) -> np.ndarray:
    """Return a place for each embedding: float [N, D] -> [N, 2]."""
    if len(values) < 5:  # too few for t-SNE
        return np.stack([np.arange(len(values)), np.zeros(len(values))], 1)
    from sklearn.manifold import TSNE

    centred = values - values.mean(0)
    scaled = centred / max(float(np.linalg.norm(centred, axis=1).mean()), 1e-12)
    perplexity = min(30.0, (len(values) - 1) / 4)
    return TSNE(perplexity=perplexity, init="random", random_state=0, metric="cosine").fit_transform(scaled)


def draw_duplicates(photos: Sequence[Path], pairs: Sequence[Duplicate]) -> Figure:
    """Draw the first MAX_PAIRS pairs of near-duplicates side by side, with their names."""
    shown = pairs[:MAX_PAIRS]
    rows = -(-len(shown) // 3)
    figure, axes = image_axes(rows, 6, 1.7, 1.9)
    for number, pair in enumerate(shown):
        for side, photo in enumerate((photos[pair.first], photos[pair.second])):
            axis = axes[number // 3, 2 * (number % 3) + side]
            show_image(axis, _thumbnail(photo, 160), f"{photo.parent.name}/{photo.name}"[-32:])
    if len(pairs) > len(shown):
        figure.suptitle(f"the {len(shown)} most similar of {len(pairs):,} pairs of near-duplicates", fontsize=9)
    return figure


def _thumbnail(photo: Path, side: int = THUMBNAIL) -> np.ndarray:
    """Return the central square of an image file, uint8 [side, side, 3]."""
    image = load_rgb(photo)
    half = min(image.size) / 2
    box = (image.width / 2 - half, image.height / 2 - half, image.width / 2 + half, image.height / 2 + half)
    return np.asarray(image.resize((side, side), box=box))
