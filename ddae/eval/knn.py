"""Weighted k-NN classification with frozen features (Wu et al. 2018; DINO): votes of weight exp(cosine / temperature).

The search is exact. N: bank images, Q: queries, D: encoder width, C: number of classes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddae import atomic
from ddae.config.base import ImageSize, ShardsConfig, TrackerConfig
from ddae.data.cache import open_cache
from ddae.distributed.comm import broadcast_from_main, device
from ddae.errors import UserError
from ddae.eval import baselines
from ddae.eval.baselines import FeatureAccuracy
from ddae.eval.dataset import ExampleBatch, ExampleReader, batches
from ddae.eval.features import (
    RAW_PIXELS,
    Features,
    extract_features,
    map_images,
    quarter_blocks,
    require_finite_features,
)
from ddae.eval.figures import confusion_matrix, metric_by_block, neighbour_grid
from ddae.eval.metrics import count_confusion
from ddae.export.encoder import encoder_hash, load_encoder
from ddae.method.feature_statistics import effective_rank, feature_std
from ddae.models.vit import Encoder
from ddae.report import html as report
from ddae.training.tracker import run_id_of
from ddae.training.tracking import check_installed, start_tracker

CHUNK = 1024  # queries at a time, which bounds the similarity matrix to [CHUNK, N]
MAX_RAW_BANK = 20_000  # training images in the bank of raw pixels
QUERIES_SHOWN, NEIGHBOURS_SHOWN = 8, 6  # in the figure


class Neighbours(NamedTuple):
    """The nearest bank images of each query, and their votes."""

    votes: Tensor  # float32 [Q, C]
    nearest: Tensor  # int64 [Q, k]: rows of the bank, the nearest first


def vote(bank: Tensor, labels: Tensor, queries: Tensor, k: int = 20, temperature: float = 0.07) -> Neighbours:
    """Find the k nearest bank images of each query by cosine similarity, and add up their votes per class.

    bank float32 [N, D], labels int64 [N], queries float32 [Q, D]. A query's votes are relative to that of its nearest
    image. Raise ValueError if k is not in 1..N, UserError for features that are not finite.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k is {k}; expected 1 to {len(bank)}, the number of images in the bank.")
    require_finite_features(bank, queries)
    bank, num_classes = unit_length(bank).t().contiguous(), int(labels.max()) + 1
    votes, neighbours = [], []
    for chunk in unit_length(queries).split(CHUNK):
        similarity, nearest = (chunk @ bank).topk(k)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # the difference cannot overflow
        votes.append(torch.zeros(len(chunk), num_classes).scatter_add_(1, labels[nearest], weights))
        neighbours.append(nearest)
    return Neighbours(torch.cat(votes), torch.cat(neighbours))


def unit_length(features: Tensor) -> Tensor:
    """Divide each row by its norm, float32 [N, D], whatever its magnitude: its square could overflow or vanish."""
    largest = features.abs().amax(1, keepdim=True).clamp(min=torch.finfo(features.dtype).tiny)
    return F.normalize(features / largest, dim=1)


def accuracy(votes: Tensor, labels: Tensor, top: int = 1) -> float:
    """Return the top-`top` accuracy in per cent; votes [Q, C], labels int64 [Q]."""
    best = votes.topk(min(top, votes.shape[1])).indices
    return 100 * float((best == labels[:, None]).any(1).float().mean())


class Settings(NamedTuple):
    """The protocol, apart from encoder and data."""

    k: int = 20
    temperature: float = 0.07
    batch: int = 256
    workers: int = 4
    grey: bool = False  # convert images to grey with equal mean and contrast
    untrained_seed: int = 0  # for the untrained encoder's weights
    cache: str = ShardsConfig.cache  # folder with cached results of untrained encoders


def _check(settings: Settings) -> None:
    """Raise UserError for a number out of its range."""
    ranges = {"batch": (1, math.inf), "workers": (0, math.inf), "temperature": (1e-6, math.inf)}
    ranges["untrained_seed"] = (0, 2**64 - 1)
    for name, (low, high) in ranges.items():
        if not low <= (value := getattr(settings, name)) <= high:
            expected = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise UserError(f"--{name} is {value}; expected a number {expected}. Correct it.")


def evaluate(encoder_path: str, data: str, out: Path, settings: Settings, tracker: str) -> dict[str, Any]:
    """Evaluate an encoder by k-NN: the last block of each quarter, both poolings. Write results and figures to `out`.

    The feature is selected on a part of the training split and reported on the validation split, with the baselines:
    untrained weights, raw pixels and chance. Effective rank and standard deviation need no labels; for shards without
    classes they are all that is reported. Return results.json. Raise UserError if the encoder or the shards cannot be
    read, or if k is larger than the bank.
    """
    _check(settings)
    config = TrackerConfig(kind=tracker)  # type: ignore[arg-type]
    check_installed(config)
    encoder = load_encoder(encoder_path).to(device())
    readers = {s: ExampleReader(data, s, encoder.shape.image_size, labelled=False) for s in ("train", "val")}
    labelled = all(len(reader.labels) for reader in readers.values())
    is_selection = baselines.selection_mask(len(readers["train"])) if labelled else torch.zeros(0, dtype=torch.bool)
    max_k = len(readers["train"]) - int(is_selection.sum())
    if not 1 <= settings.k <= max_k:
        excluded = ", not counting those that select the feature" if is_selection.any() else ""
        raise UserError(f"--k is {settings.k}; expected 1 to {max_k}, the images of {data} in the bank{excluded}.")
    params = {"task": "knn", "encoder": encoder_path, "encoder_sha256": encoder_hash(encoder), "data": data}
    params |= {"images": "grey" if settings.grey else "as stored"}
    params |= {"k": settings.k, "temperature": settings.temperature, "untrained_seed": settings.untrained_seed}
    params |= {"bank": len(readers["train"]), "queries": len(readers["val"]), "width": encoder.shape.width}
    comparison: dict[str, Any] = dict.fromkeys((*baselines.Comparison._fields, "best"))
    if labelled:
        (train, val), comparison = _compare_with_baselines(encoder, data, readers, settings)
    else:
        train, val = (each[0] for each in _extract([encoder], readers, settings))
    metrics = _metrics_by_feature(train, val, settings, labelled)
    results: dict[str, Any] = params | comparison | {"features": metrics}
    out.mkdir(parents=True, exist_ok=True)
    atomic.write_json(out / "results.json", results)
    files = report.add_evaluation(out, _figures(results, train, val, readers, settings))
    log = start_tracker(config, out, -1, params, parent=run_id_of(Path(encoder_path)))
    accuracies = {name: float(results[name]) for name in baselines.Comparison._fields if results[name] is not None}
    by_feature = {f"{metric}/{name.replace(' ', '_')}": v for name, row in metrics.items() for metric, v in row.items()}
    log.log({"step": 0.0} | accuracies | by_feature)
    log.finish(files)
    return results


def _compare_with_baselines(
    encoder: Encoder, data: str, readers: dict[str, ExampleReader], settings: Settings
) -> tuple[tuple[Features, Features], dict[str, Any]]:
    """Return the encoder's features of train and val, and the entries of results.json with accuracy and baselines."""
    fingerprints = [reader.shards.fingerprint for reader in readers.values()]
    untrained = baselines.untrained_encoder(encoder, settings.untrained_seed).to(device())
    options = {name: getattr(settings, name) for name in ("k", "temperature", "grey", "untrained_seed")}
    protocol = {"task": "knn", **options, "data": fingerprints}
    cached = baselines.load_cached(settings.cache, untrained, protocol)
    train, val = _extract([encoder] if cached else [encoder, untrained], readers, settings)
    trained = select_and_evaluate(train[0], val[0], settings)
    baseline = cached or select_and_evaluate(train[1], val[1], settings)
    if cached is None:
        baselines.store_cached(settings.cache, untrained, protocol, baseline)
    shards = ShardsConfig(train=data, workers=settings.workers)
    raw = raw_pixel_accuracy(shards, data, encoder.shape.image_size, lambda: None, settings)
    chance = baselines.chance(train[0].labels, val[0].labels)
    results = baselines.compare(trained.correct, baseline.correct, raw, chance).results(
        "k-NN top-1", baselines.baseline_name(encoder)
    )
    return (train[0], val[0]), results | {"best": trained.feature, "untrained_best": baseline.feature}


def _extract(
    encoders: Sequence[Encoder], readers: dict[str, ExampleReader], settings: Settings
) -> tuple[list[Features], list[Features]]:
    """Return the features of train and of val, one item per encoder."""
    layers = quarter_blocks(encoders[0].shape.depth)

    def images(reader: ExampleReader) -> Iterator[ExampleBatch]:
        for batch in batches(reader, settings.batch, settings.workers, device()):
            yield batch._replace(images=baselines.to_grey(batch.images)) if settings.grey else batch

    autocast = device().type == "cuda"
    train, val = (extract_features(encoders, images(reader), layers, autocast) for reader in readers.values())
    return train, val


def _metrics_by_feature(
    train: Features, val: Features, settings: Settings, labelled: bool
) -> dict[str, dict[str, float]]:
    """Return effective rank and standard deviation of each feature, and with labels its accuracies in per cent."""
    metrics = {}
    for name, queries in val.by_name.items():
        metrics[name] = {"effective_rank": float(effective_rank(queries)), "std": float(feature_std(queries))}
        if labelled:
            votes = vote(train.by_name[name], train.labels, queries, settings.k, settings.temperature).votes
            metrics[name] |= {"top1": accuracy(votes, val.labels), "top5": accuracy(votes, val.labels, 5)}
    return metrics


def _figures(
    results: dict[str, Any], train: Features, val: Features, readers: dict[str, ExampleReader], settings: Settings
) -> dict[str, Any]:
    """Return figures by name: neighbours by the selected feature; with labels also accuracy by block and confusion."""
    labelled, feature = results["accuracy"] is not None, results["best"] or list(val.by_name)[-1]
    names = [str(name) for name in readers["train"].shards.classes] if labelled else []
    votes, nearest = vote(train.by_name[feature], train.labels, val.by_name[feature], settings.k, settings.temperature)
    queries = torch.randperm(len(val.labels), generator=torch.Generator().manual_seed(0))[:QUERIES_SHOWN].tolist()
    rows = [(query, nearest[query, :NEIGHBOURS_SHOWN].tolist()) for query in queries]
    figures = {"neighbours": neighbour_grid(rows, readers["val"], readers["train"], names)}
    if labelled:
        top1 = {name: row["top1"] for name, row in results["features"].items()}
        figures["blocks"] = metric_by_block(top1, "top-1 in %", baselines.by_label(results))
        confusion = count_confusion(val.labels, votes.argmax(1), votes.shape[1])
        figures["confusion"] = confusion_matrix(confusion, names)
    return figures


def raw_pixel_accuracy(
    data: ShardsConfig, val: str, size: ImageSize, poll: Callable[[], None], settings: Settings | None = None
) -> float:
    """Return the k-NN accuracy, in per cent, of raw pixels, with MAX_RAW_BANK training images as the bank.

    All ranks call it and share the images, which are central crops whatever the training crops are. poll() is called
    regularly.
    """
    protocol, splits = settings or Settings(), []
    for source, split, max_images in ((data.train, "train", MAX_RAW_BANK), (val, "val", 0)):
        reader = ExampleReader(source, split, size, open_cache(data), max_images=max_images)

        def pixels(images: Tensor) -> dict[str, Tensor]:
            return {RAW_PIXELS: baselines.pixel_features(baselines.to_grey(images) if protocol.grey else images)}

        splits.append(Features(map_images(reader, data.workers, pixels, poll), reader.labels))
    bank, queries = splits
    mean = bank.by_name[RAW_PIXELS].mean(0)  # otherwise cosine similarity compares brightness alone
    for features in splits:
        features.by_name[RAW_PIXELS].sub_(mean)
    protocol = protocol._replace(k=min(protocol.k, len(bank.labels)))
    return broadcast_from_main(lambda: select_and_evaluate(bank, queries, protocol).accuracy)


def select_and_evaluate(train: Features, val: Features, settings: Settings) -> FeatureAccuracy:
    """Select the most accurate feature on the selection part of train; return its accuracy on val, with train as bank.

    Without a selection part (fewer than ten training images) the last feature is used.
    """
    is_selection, k, temperature = baselines.selection_mask(len(train.labels)), settings.k, settings.temperature
    *_, feature = train.by_name
    if len(train.by_name) > 1 and is_selection.any():
        accuracies = {}
        for name, values in train.by_name.items():
            votes, _ = vote(values[~is_selection], train.labels[~is_selection], values[is_selection], k, temperature)
            accuracies[name] = accuracy(votes, train.labels[is_selection])
        feature = max(accuracies, key=lambda name: accuracies[name])
    votes, _ = vote(train.by_name[feature], train.labels, val.by_name[feature], k, temperature)
    correct = votes.argmax(1) == val.labels
    return FeatureAccuracy(feature, 100 * float(correct.float().mean()), correct)


def format_results(results: dict[str, Any]) -> str:
    """Return the results as text; the first line is the accuracy with its baselines."""
    labelled = results["accuracy"] is not None
    unlabelled = f"{results['data']} has no classes, so no accuracy is reported. Write shards with a class per image."
    grey = ", images in grey of equal contrast" if results["images"] == "grey" else ""
    protocol = f"{results['queries']} queries, {results['bank']} images in the bank, k = {results['k']}{grey}"
    lines = [results["verdict"] if labelled else unlabelled, protocol]
    columns = {"top1": ("top-1", "8.2f"), "top5": ("top-5", "8.2f")} if labelled else {}
    columns |= {"effective_rank": ("rank", "8.1f"), "std": ("std", "8.2f")}
    lines.append(f"{'features':18}" + "".join(f"{head:>8}" for head, _ in columns.values()))
    for name, row in results["features"].items():
        mark = "  <-- selected on a part of train" if name == results["best"] else ""
        lines.append(f"{name:18}" + "".join(f"{row[key]:{form}}" for key, (_, form) in columns.items()) + mark)
    return "\n".join(lines)
