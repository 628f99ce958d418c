"""What can be judged of an encoder without labels, beside untrained weights and raw pixels.

N: images, D: width of a feature, S: image side in pixels.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from ddae import atomic
from ddae.config.base import ImageSize
from ddae.config.pretrain import PretrainConfig
from ddae.data.cache import Cache
from ddae.data.masking import sample_mask
from ddae.data.sampling import aspect_of, random_crops
from ddae.distributed.checkpoint_format import load_weights
from ddae.distributed.comm import device
from ddae.errors import UserError
from ddae.eval import baselines
from ddae.eval.dataset import ExampleReader, batches
from ddae.eval.features import pooled_features, require_finite_features
from ddae.eval.knn import unit_length
from ddae.export.encoder import encoder_hash, load_encoder, newest_checkpoint
from ddae.method.feature_statistics import effective_rank, feature_std
from ddae.method.model import build_uninitialised_model
from ddae.models.patches import gather_tokens, normalise, patchify
from ddae.models.vit import Encoder
from ddae.report.figures import image_axes, reconstruct, show_image
from ddae.report.html import add_evaluation

TRAINED, UNTRAINED, PIXELS = "trained", "untrained", "raw pixels"  # what is compared, in this order
CONSTANTS = ("mean colour of the visible patches", "mean colour of each masked patch")  # that predict masked pixels
BATCH_SIZE = 64
CROP_SCALE = (0.1, 0.4)  # area of the two crops over the image's: they seldom show the same
NUM_QUERIES, NUM_NEIGHBOURS = 8, 3  # in the figure
CHUNK = 1024  # queries at a time


class Views(NamedTuple):
    """One feature of all images, in three crops."""

    central: Tensor  # float32 [N, D]
    first: Tensor  # of a random crop
    second: Tensor  # of another one


def evaluate(encoder_path: str, data: str, out: Path, num_images: int) -> dict[str, Any]:
    """Compare an encoder with untrained weights and raw pixels. Write results.json and figures to `out`.

    data: shards, of which the validation split is used if there is one. Return results.json. Raise UserError if the
    encoder or the images cannot be read.
    """
    encoder = load_encoder(encoder_path).to(device())
    reader = _reader(data, encoder.shape.image_size, num_images)
    encoders = {TRAINED: encoder, UNTRAINED: baselines.untrained_encoder(encoder).to(device())}
    views = _views(encoders, reader)
    results: dict[str, Any] = {"task": "report", "encoder": encoder_path, "encoder_sha256": encoder_hash(encoder)}
    results |= {
        "baseline": baselines.baseline_name(encoder),
        "data": data,
        "split": reader.shards_split,
        "images": len(reader),
    }
    results["features"] = {
        name: {
            "two_crop_retrieval": retrieval(each.first, each.second),
            "effective_rank": float(effective_rank(each.central - each.central.mean(0))),
            "std": float(feature_std(each.central)),
        }
        for name, each in views.items()
    }
    results["chance"] = {"two_crop_retrieval": 100 / len(reader)}
    results |= masked_pixel_errors(Path(encoder_path), reader)
    results["verdict"] = verdict(results)
    out.mkdir(parents=True, exist_ok=True)
    atomic.write_json(out / "results.json", results)
    add_evaluation(out, {"similar": neighbours_side_by_side(views, reader)})
    return results


class _Reader(ExampleReader):
    """Images of the validation split, or of the training split where there is no other."""

    shards_split: str


def _reader(data: str, size: ImageSize, num_images: int) -> _Reader:
    cache = Cache(Path("data/cache"), 1 << 40)
    try:
        reader, split = _Reader(data, "val", size, cache, labelled=False, max_images=num_images), "val"
    except UserError:
        reader, split = _Reader(data, "train", size, cache, labelled=False, max_images=num_images), "train"
    reader.shards_split = split
    if len(reader) < 2:
        raise UserError(f"{data} has {len(reader)} images; expected at least 2 to compare. Pass others as --data.")
    return reader


@torch.inference_mode()
def _views(encoders: dict[str, Encoder], reader: ExampleReader) -> dict[str, Views]:
    """Return the mean patch token after the final norm of each encoder, and the pixels, in three crops each."""
    central = reader.boxes
    samples = np.asarray(reader.samples)
    sizes = (np.asarray(each)[samples].astype(np.int64) for each in (reader.shards.width, reader.shards.height))
    width, height = map(torch.from_numpy, sizes)
    crops = [central]
    for stream in (1, 2):
        seeds = torch.arange(len(reader)) * 2 + stream
        crops.append(random_crops(seeds, width, height, CROP_SCALE, aspect_of(reader.size)).boxes)
    found: dict[str, list[Tensor]] = {name: [] for name in (*encoders, PIXELS)}
    for boxes in crops:
        reader.boxes = boxes
        parts: dict[str, list[Tensor]] = {name: [] for name in found}
        for batch in batches(reader, BATCH_SIZE, 0, device()):
            for name, encoder in encoders.items():
                pixels = normalise(batch.images, encoder.normalisation, torch.float32)
                depth = encoder.shape.depth
                parts[name].append(pooled_features(encoder, pixels, [depth])[f"block {depth} mean"].float().cpu())
            parts[PIXELS].append(baselines.pixel_features(batch.images).cpu())
        for name, values in parts.items():
            found[name].append(torch.cat(values))
    reader.boxes = central
    for each in found.values():
        require_finite_features(*each)
    return {name: Views(*each) for name, each in found.items()}


def retrieval(first: Tensor, second: Tensor) -> float:
    """Return how often, in per cent, a crop's nearest one among the other crops of all images is of the same image.

    first, second: float32 [N, D]. Features are centred by their common mean and compared by cosine similarity.
    """
    mean = torch.cat([first, second]).mean(0)
    queries, bank = unit_length(first - mean), unit_length(second - mean).t()
    nearest = torch.cat([(chunk @ bank).argmax(1) for chunk in queries.split(CHUNK)])
    return 100 * float((nearest == torch.arange(len(first))).float().mean())


@torch.inference_mode()
def masked_pixel_errors(path: Path, reader: ExampleReader) -> dict[str, Any]:
    """Return the mean squared error of the masked pixels, in [0, 1]^2, by what predicts them.

    That is the last tap's decoder (if targets are normalised, with each patch's true mean and standard deviation), the
    mean colour of the image's visible patches, and the mean colour of each masked patch. Only runs with a pixel branch
    have a decoder; for others the result is empty.
    """
    checkpoint = newest_checkpoint(path) if (path / "config.json").exists() else None
    if checkpoint is None:
        return {}
    config = PretrainConfig.read(path / "config.json")
    if not config.pixel.enabled:
        return {}
    model = build_uninitialised_model(config)
    load_weights(checkpoint, "weight", model)
    model.to(device()).eval()
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for batch in batches(reader, BATCH_SIZE, 0, device()):
        mask = sample_mask(config.mask.kind, batch.indices.cpu() + 1, config.grid, config.num_masked)
        on_device = type(mask)(*(each.to(device()) for each in mask))
        rebuilt = list(reconstruct(model, batch.images, on_device).values())[-1]
        patch = config.model.patch_size
        patches, guess = patchify(batch.images, patch).float() / 255, patchify(rebuilt, patch)
        true, guess = (gather_tokens(each, on_device.masked) for each in (patches, guess))
        visible = gather_tokens(patches, on_device.visible)
        of_image = visible.unflatten(-1, (-1, 3)).mean((1, 2), keepdim=True)
        of_patch = true.unflatten(-1, (-1, 3)).mean(-2, keepdim=True)
        constant = (each.expand(-1, true.shape[1], patch**2, -1).flatten(-2) for each in (of_image, of_patch))
        sums += torch.stack([F.mse_loss(each, true) for each in (guess, *constant)]).double().cpu() * len(true)
        count += len(true)
    decoder = "decoder" if config.pixel.norm == "none" else "decoder, given mean and contrast of each masked patch"
    return {"masked_pixel_error": dict(zip((decoder, *CONSTANTS), (sums / count).tolist(), strict=True))}


def verdict(results: dict[str, Any]) -> str:
    """Return a sentence that compares the encoder with its baselines."""
    values = {name: row["two_crop_retrieval"] for name, row in results["features"].items()}
    comparison = "above" if values[TRAINED] > max(values[UNTRAINED], values[PIXELS]) else "NOT above both"
    return (
        f"the encoder finds the other crop of a photo in {values[TRAINED]:.1f} % of {results['images']:,} cases, "
        f"{comparison} {results['baseline']} ({values[UNTRAINED]:.1f} %) and raw pixels ({values[PIXELS]:.1f} %); "
        f"chance {results['chance']['two_crop_retrieval']:.1f} %"
    )


def neighbours_side_by_side(views: dict[str, Views], reader: ExampleReader) -> Figure:
    """Draw a few photos and, by each kind of feature, the photos nearest to each."""
    count = min(NUM_NEIGHBOURS, len(reader) - 1)
    queries = np.unique(np.linspace(0, len(reader) - 1, NUM_QUERIES).astype(int)).tolist()
    figure, axes = image_axes(len(queries), 1 + len(views) * count, 1.05, 1.12)
    for row, query in zip(axes, queries, strict=True):
        show_image(row[0], reader[query][0].transpose(1, 2, 0), "photo" if query == queries[0] else "")
        for number, (name, each) in enumerate(views.items()):
            centred = unit_length(each.central - each.central.mean(0))
            similarity = centred @ centred[query]
            similarity[query] = -torch.inf
            for place, neighbour in enumerate(similarity.topk(count).indices.tolist()):
                title = f"{name}: nearest" if query == queries[0] and place == 0 else ""
                axis = row[1 + number * count + place]
                show_image(axis, reader[neighbour][0].transpose(1, 2, 0), title)
    return figure


def format_results(results: dict[str, Any]) -> str:
    """Return the results as text; the first line is the comparison."""
    lines = [results["verdict"], f"{results['images']:,} images of split {results['split']} of {results['data']}"]
    lines.append(f"{'':12}{'two-crop retrieval, %':>24}{'effective rank':>18}{'std':>10}")
    for name, row in results["features"].items():
        values = f"{row['two_crop_retrieval']:24.1f}{row['effective_rank']:18.1f}{row['std']:10.3f}"
        lines.append(f"{name:12}{values}")
    if errors := results.get("masked_pixel_error"):
        lines.append("squared error of masked pixels: " + ", ".join(f"{name} {v:.4f}" for name, v in errors.items()))
    return "\n".join(lines)
