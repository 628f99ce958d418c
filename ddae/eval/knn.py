"""Classes by the nearest neighbours, weighted as Wu et al. (2018) and DINO do: exp(cosine / temperature).

Exact. N bank images, Q queries, D width, C classes.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddae.config.base import ShardsConfig, TrackerConfig
from ddae.data.cache import open_cache
from ddae.distributed.comm import broadcast_from_main, device
from ddae.errors import UserError
from ddae.eval import baselines
from ddae.eval.baselines import Measured
from ddae.eval.dataset import ExampleReader, Examples, batches
from ddae.eval.features import RAW, Features, effective_rank, extract, quarters, spread, table_of
from ddae.eval.figures import by_block, confusion_matrix, neighbours
from ddae.export.encoder import load_encoder
from ddae.models.vit import Encoder
from ddae.report import html as report
from ddae.training.tracker import run_id_of, start_tracker

CHUNK = 1024  # queries at a time: as many rows of N similarities
MOST = 20_000  # images of train whose raw pixels are the bank beside a linear probe or a fine-tuning
SHOWN, NEAR = 8, 6  # queries in the picture, and neighbours of each


class Neighbours(NamedTuple):
    """What the neighbours of the queries say."""

    votes: Tensor  # float32 [Q, C]
    nearest: Tensor  # int64 [Q, k]: rows of the bank, the nearest first


def vote(bank: Tensor, labels: Tensor, queries: Tensor, k: int = 20, temperature: float = 0.07) -> Neighbours:
    """float32 [N, D], int64 [N], float32 [Q, D] -> votes of the classes and who cast them.

    ValueError where k is more than N.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k is {k}: the bank has {len(bank)} images")
    bank, classes = F.normalize(bank, dim=1).t().contiguous(), int(labels.max()) + 1
    votes, near = [], []
    for some in F.normalize(queries, dim=1).split(CHUNK):
        similarity, nearest = (some @ bank).topk(k)
        weights = (similarity / temperature).exp()
        votes.append(torch.zeros(len(some), classes).scatter_add_(1, labels[nearest], weights))
        near.append(nearest)
    return Neighbours(torch.cat(votes), torch.cat(near))


def accuracy(votes: Tensor, labels: Tensor, top: int = 1) -> float:
    """Share of the queries whose class is among the `top` most voted for, in per cent."""
    best = votes.topk(min(top, votes.shape[1])).indices
    return 100 * float((best == labels[:, None]).any(1).float().mean())


class Settings(NamedTuple):
    """The protocol, apart from the encoder and the data."""

    k: int = 20
    temperature: float = 0.07
    batch: int = 256
    workers: int = 4
    grey: bool = False  # images in grey, of equal mean and contrast
    untrained_seed: int = 0  # of the untrained encoder's weights
    cache: str = ShardsConfig.cache  # folder in which results of untrained encoders are remembered


def evaluate(encoder_path: str, data: str, out: Path, settings: Settings, tracker: str) -> dict[str, Any]:
    """Measure every quarter's block with both poolings: accuracies, and effective rank and spread, which need no class.

    The feature is chosen on a part of the training split and reported on the validation split, beside untrained
    weights, raw pixels and chance. Results and pictures are written into `out`. Shards without classes get what needs
    none. UserError where the encoder or the shards cannot be read, or k is more than they hold.
    """
    encoder = load_encoder(encoder_path).to(device())
    readers = {s: ExampleReader(data, s, encoder.shape.image_size, labelled=False) for s in ("train", "val")}
    labelled = all(len(reader.labels) for reader in readers.values())
    held = baselines.selection_part(len(readers["train"])) if labelled else torch.zeros(0, dtype=torch.bool)
    most = len(readers["train"]) - int(held.sum())
    if not 1 <= settings.k <= most:
        while_chosen = ", the others choose the feature" if held.any() else ""
        raise UserError(f"--k is {settings.k}; expected 1 to {most}, the images of {data} that can vote{while_chosen}")
    about = {"task": "knn", "encoder": encoder_path, "data": data, "images": "grey" if settings.grey else "as stored"}
    about |= {"k": settings.k, "temperature": settings.temperature, "untrained_seed": settings.untrained_seed}
    about |= {"bank": len(readers["train"]), "queries": len(readers["val"]), "width": encoder.shape.width}
    measured: dict[str, Any] = dict.fromkeys((*baselines.Compared._fields, "best"))
    if labelled:
        (train, val), measured = _compared(encoder, data, readers, settings)
    else:
        train, val = (each[0] for each in _features([encoder], readers, settings))
    rows = _rows(train, val, settings, labelled)
    results: dict[str, Any] = about | measured | {"features": rows}
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    files = report.add_evaluation(out, _drawn(results, train, val, readers, settings))
    log = start_tracker(TrackerConfig(kind=tracker), out, -1, about, parent=run_id_of(Path(encoder_path)))  # type: ignore[arg-type]
    numbers = {name: float(results[name]) for name in baselines.Compared._fields if results[name] is not None}
    by_feature = {f"{of}/{name.replace(' ', '_')}": v for name, row in rows.items() for of, v in row.items()}
    log.log({"step": 0.0} | numbers | by_feature)
    log.finish(files)
    return results


def _compared(
    encoder: Encoder, data: str, readers: dict[str, ExampleReader], settings: Settings
) -> tuple[tuple[Features, Features], dict[str, Any]]:
    """The encoder's features of train and val, and the entries of results.json that compare its accuracy."""
    fingerprints = [reader.shards.fingerprint for reader in readers.values()]
    untrained = baselines.untrained_encoder(encoder, settings.untrained_seed).to(device())
    asked = {name: getattr(settings, name) for name in ("k", "temperature", "grey", "untrained_seed")}
    protocol = {"task": "knn", **asked, "data": fingerprints}
    known = baselines.recall(settings.cache, untrained, protocol)
    train, val = _features([encoder] if known else [encoder, untrained], readers, settings)
    ours = by_neighbours(train[0], val[0], settings)
    baseline = known or by_neighbours(train[1], val[1], settings)
    if known is None:
        baselines.remember(settings.cache, untrained, protocol, baseline)
    shards = ShardsConfig(train=data, workers=settings.workers)
    raw = raw_pixels(shards, data, encoder.shape.image_size, lambda: None, settings)
    chance = baselines.chance(train[0].labels, val[0].labels)
    compared = baselines.compare(ours.right, baseline.right, raw, chance).results("k-NN top-1")
    return (train[0], val[0]), compared | {"best": ours.feature, "untrained_best": baseline.feature}


def _features(
    encoders: Sequence[Encoder], readers: dict[str, ExampleReader], settings: Settings
) -> tuple[list[Features], list[Features]]:
    """Features of train and of val, of each encoder."""
    layers = quarters(encoders[0].shape.depth)

    def images(reader: ExampleReader) -> Iterator[Examples]:
        for examples in batches(reader, settings.batch, settings.workers, device()):
            yield examples._replace(images=baselines.grey(examples.images)) if settings.grey else examples

    train, val = (extract(encoders, images(each), layers, device().type == "cuda") for each in readers.values())
    return train, val


def _rows(train: Features, val: Features, settings: Settings, labelled: bool) -> dict[str, dict[str, float]]:
    """Accuracies in per cent of each kind of features, where there are classes, and the features' health."""
    rows = {}
    for name, queries in val.by_name.items():
        rows[name] = {"effective_rank": effective_rank(queries), "spread": spread(queries)}
        if labelled:
            votes = vote(train.by_name[name], train.labels, queries, settings.k, settings.temperature).votes
            rows[name] |= {"top1": accuracy(votes, val.labels), "top5": accuracy(votes, val.labels, 5)}
    return rows


def _drawn(
    results: dict[str, Any], train: Features, val: Features, readers: dict[str, ExampleReader], settings: Settings
) -> dict[str, Any]:
    """Figures by name: neighbours by the chosen feature or the last one; with classes also accuracies, confusions."""
    labelled, feature = results["accuracy"] is not None, results["best"] or list(val.by_name)[-1]
    names = [str(name) for name in readers["train"].shards.classes] if labelled else []
    found = vote(train.by_name[feature], train.labels, val.by_name[feature], settings.k, settings.temperature)
    queries = torch.randperm(len(val.labels), generator=torch.Generator().manual_seed(0))[:SHOWN].tolist()
    shown = [(number, found.nearest[number, :NEAR].tolist()) for number in queries]
    drawn = {"neighbours": neighbours(shown, readers["val"], readers["train"], names)}
    if labelled:
        classes = found.votes.shape[1]
        confusion = (val.labels * classes + found.votes.argmax(1)).bincount(minlength=classes**2).view(classes, -1)
        tops = {name: row["top1"] for name, row in results["features"].items()}
        drawn["blocks"] = by_block(tops, "top-1 in %", baselines.lines(results))
        drawn["confusion"] = confusion_matrix(confusion, names)
    return drawn


def raw_pixels(
    data: ShardsConfig, val: str, size: int, poll: Callable[[], None], settings: Settings | None = None
) -> float:
    """Accuracy, in per cent, of the nearest neighbours of raw pixels: of MOST images of train for each image of val.

    All ranks share the reading. The images are cropped as evaluations see them, whatever training does to them.
    """
    protocol, tables = settings or Settings(), []
    for where, split, most in ((data.train, "train", MOST), (val, "val", 0)):
        reader = ExampleReader(where, split, size, open_cache(data), most=most)

        def pixels(images: Tensor) -> dict[str, Tensor]:
            return {RAW: baselines.pixel_features(baselines.grey(images) if protocol.grey else images)}

        tables.append(Features(table_of(reader, data.workers, pixels, poll), reader.labels))
    bank, queries = tables
    mean = bank.by_name[RAW].mean(0)  # without it cosines compare brightness alone
    for table in tables:
        table.by_name[RAW].sub_(mean)
    protocol = protocol._replace(k=min(protocol.k, len(bank.labels)))
    return broadcast_from_main(lambda: by_neighbours(bank, queries, protocol).accuracy)


def by_neighbours(train: Features, val: Features, settings: Settings) -> Measured:
    """Choose the feature that is best on the selection part of `train`, and measure it on `val`, with all of `train` as
    the bank."""
    held, k, temperature = baselines.selection_part(len(train.labels)), settings.k, settings.temperature
    *_, feature = train.by_name
    if len(train.by_name) > 1 and held.any():
        chosen_by = {}
        for name, bank in train.by_name.items():
            votes, _ = vote(bank[~held], train.labels[~held], bank[held], k, temperature)
            chosen_by[name] = accuracy(votes, train.labels[held])
        feature = max(chosen_by, key=lambda name: chosen_by[name])
    votes, _ = vote(train.by_name[feature], train.labels, val.by_name[feature], k, temperature)
    right = votes.argmax(1) == val.labels
    return Measured(feature, 100 * float(right.float().mean()), right)


def show(results: dict[str, Any]) -> str:
    """The results as text; the first line has the accuracy beside its baselines."""
    labelled = results["accuracy"] is not None
    missing = f"{results['data']} has no classes, which accuracies need: shard it with a class for each image"
    lines = [results["verdict"] if labelled else missing]
    lines.append(
        f"{results['queries']} images asked {results['bank']} for their {results['k']} nearest neighbours"
        + (", in grey of equal contrast" if results["images"] == "grey" else "")
    )
    columns = {"top1": ("top-1", "8.2f"), "top5": ("top-5", "8.2f")} if labelled else {}
    columns |= {"effective_rank": ("rank", "8.1f"), "spread": ("spread", "8.2f")}
    lines.append(f"{'features':18}" + "".join(f"{head:>8}" for head, _ in columns.values()))
    for name, row in results["features"].items():
        mark = "  <-- chosen on a part of train" if name == results["best"] else ""
        lines.append(f"{name:18}" + "".join(f"{row[of]:{form}}" for of, (_, form) in columns.items()) + mark)
    return "\n".join(lines)
