"""Classes by the nearest neighbours, weighted as Wu et al. (2018) and DINO do: exp(cosine / temperature).

Exact. N bank images, Q queries, D width, C classes.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddae import report
from ddae.distributed import device
from ddae.errors import UserError
from ddae.eval.examples import ExampleReader, batches
from ddae.eval.features import Features, effective_rank, extract, quarters, spread
from ddae.eval.pictures import by_block, confusion_matrix, neighbours
from ddae.experiment import TrackerConfig
from ddae.tracker import run_id_of, start_tracker
from ddae.weights import load_encoder

CHUNK = 1024  # queries at a time: as many rows of N similarities
SHOWN, NEAR = 8, 6  # queries in the picture, and neighbours of each


class Found(NamedTuple):
    """What the neighbours of the queries say."""

    votes: Tensor  # float32 [Q, C]
    nearest: Tensor  # int64 [Q, k]: rows of the bank, the nearest first


def vote(bank: Tensor, labels: Tensor, queries: Tensor, k: int = 20, temperature: float = 0.07) -> Found:
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
    return Found(torch.cat(votes), torch.cat(near))


def accuracy(votes: Tensor, labels: Tensor, top: int = 1) -> float:
    """Share of the queries whose class is among the `top` most voted for, in per cent."""
    best = votes.topk(min(top, votes.shape[1])).indices
    return 100 * float((best == labels[:, None]).any(1).float().mean())


def evaluate(
    encoder_path: str, data: str, out: Path, k: int, temperature: float, batch: int, workers: int, tracker: str
) -> dict[str, Any]:
    """Top-1 and top-5 of every quarter's block and both poolings, and the features' health; written into `out`, with
    pictures.

    UserError where the encoder or the shards cannot be read, the shards have no classes, or k is more than they hold.
    """
    encoder = load_encoder(encoder_path).to(device())
    layers = quarters(encoder.shape.depth)
    readers = {split: ExampleReader(data, split, encoder.shape.image_size) for split in ("train", "val")}
    if not 1 <= k <= len(readers["train"]):
        raise UserError(f"--k is {k}: the bank of {data} has {len(readers['train'])} images")
    train, val = (
        extract(encoder, batches(reader, batch, workers, device()), layers, device().type == "cuda")
        for reader in readers.values()
    )
    found = {name: vote(bank, train.labels, val.by_name[name], k, temperature) for name, bank in train.by_name.items()}
    rows = {name: measure(votes.votes, val, name) for name, votes in found.items()}
    best = max(rows, key=lambda name: rows[name]["top1"])
    about = {"task": "knn", "encoder": encoder_path, "data": data, "k": k, "temperature": temperature}
    counts = {"bank": len(train.labels), "queries": len(val.labels), "width": encoder.shape.width}
    results = about | counts | {"best": best, "top1": rows[best]["top1"], "features": rows}
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    names = [str(name) for name in readers["train"].shards.classes]
    pairs = val.labels * found[best].votes.shape[1] + found[best].votes.argmax(1)
    confusion = pairs.bincount(minlength=found[best].votes.shape[1] ** 2).view(found[best].votes.shape[1], -1)
    queries = torch.randperm(len(val.labels), generator=torch.Generator().manual_seed(0))[:SHOWN].tolist()
    shown = [(n, found[best].nearest[n, :NEAR].tolist()) for n in queries]
    drawn = {
        "blocks": by_block({name: row["top1"] for name, row in rows.items()}, "top-1 in %"),
        "neighbours": neighbours(shown, readers["val"], readers["train"], names),
        "confusion": confusion_matrix(confusion, names),
    }
    files = report.add_evaluation(out, drawn)
    told = start_tracker(TrackerConfig(kind=tracker), out, -1, about, parent=run_id_of(Path(encoder_path)))  # type: ignore[arg-type]
    told.log(
        {"step": 0, **{f"{of}/{name.replace(' ', '_')}": v for name, row in rows.items() for of, v in row.items()}}
    )
    told.finish(files)
    return results


def measure(votes: Tensor, val: Features, name: str) -> dict[str, float]:
    """Accuracies in per cent of one kind of features, and their health."""
    features = val.by_name[name]
    tops = {"top1": accuracy(votes, val.labels), "top5": accuracy(votes, val.labels, 5)}
    return tops | {"effective_rank": effective_rank(features), "spread": spread(features)}


def show(results: dict[str, Any]) -> str:
    """The results as text."""
    lines = [
        f"{results['queries']} images asked {results['bank']} for their {results['k']} nearest neighbours",
        f"{'features':18}{'top-1':>8}{'top-5':>8}{'rank':>8}{'spread':>8}",
    ]
    for name, row in results["features"].items():
        mark = "  <-- best" if name == results["best"] else ""
        numbers = f"{row['top1']:8.2f}{row['top5']:8.2f}{row['effective_rank']:8.1f}{row['spread']:8.2f}"
        lines.append(f"{name:18}{numbers}{mark}")
    return "\n".join(lines)
