"""Classes by the nearest neighbours, weighted as Wu et al. (2018) and DINO do: exp(cosine / temperature).

Exact. N bank images, Q queries, D width, C classes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddae.distributed import device
from ddae.errors import UserError
from ddae.eval.examples import ExampleReader, batches
from ddae.eval.features import Features, effective_rank, extract, spread
from ddae.weights import load_encoder

CHUNK = 1024  # queries at a time: as many rows of N similarities


def vote(bank: Tensor, labels: Tensor, queries: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """float32 [N, D], int64 [N], float32 [Q, D] -> votes of the classes: float32 [Q, C].

    ValueError where k is more than N.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k is {k}: the bank has {len(bank)} images")
    bank, classes = F.normalize(bank, dim=1).t().contiguous(), int(labels.max()) + 1
    votes = []
    for some in F.normalize(queries, dim=1).split(CHUNK):
        similarity, nearest = (some @ bank).topk(k)
        weights = (similarity / temperature).exp()
        votes.append(torch.zeros(len(some), classes).scatter_add_(1, labels[nearest], weights))
    return torch.cat(votes)


def accuracy(votes: Tensor, labels: Tensor, top: int = 1) -> float:
    """Share of the queries whose class is among the `top` most voted for, in per cent."""
    best = votes.topk(min(top, votes.shape[1])).indices
    return 100 * float((best == labels[:, None]).any(1).float().mean())


def evaluate(encoder_folder: str, data: str, k: int, temperature: float, batch: int, workers: int) -> dict[str, Any]:
    """Top-1 and top-5 of every quarter's block and both poolings, and the features' health.

    UserError where the encoder or the shards cannot be read, the shards have no classes, or k is more than they hold.
    """
    encoder = load_encoder(encoder_folder).to(device())
    size, depth = encoder.shape.image_size, encoder.shape.depth
    layers = sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3, 4)})
    splits: dict[str, Features] = {}
    for split in ("train", "val"):
        reader = ExampleReader(data, split, size)
        if split == "train" and not 1 <= k <= len(reader):
            raise UserError(f"--k is {k}: the bank of {data} has {len(reader)} images")
        splits[split] = extract(encoder, batches(reader, batch, workers, device()), layers, device().type == "cuda")
    train, val = splits["train"], splits["val"]
    rows = {}
    for name, bank in train.by_name.items():
        votes = vote(bank, train.labels, val.by_name[name], k, temperature)
        rows[name] = {
            "top1": accuracy(votes, val.labels),
            "top5": accuracy(votes, val.labels, 5),
            "effective_rank": effective_rank(val.by_name[name]),
            "spread": spread(val.by_name[name]),
        }
    best = max(rows, key=lambda name: rows[name]["top1"])
    about = {"encoder": encoder_folder, "data": data, "k": k, "temperature": temperature}
    counts = {"bank": len(train.labels), "queries": len(val.labels), "width": encoder.shape.width}
    return about | counts | {"best": best, "top1": rows[best]["top1"], "features": rows}


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
