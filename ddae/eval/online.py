"""What an encoder knows while it is pretrained: k-NN on a held-out split, and its features' health without labels.

The first measurement comes before the first step: the encoder untrained, which later ones are compared with.

D width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ddae.config import DataConfig, tap_name
from ddae.data.loader import cache_of
from ddae.distributed import device, is_main, rank, sum_over_ranks, world_size
from ddae.engine import Engine
from ddae.errors import UserError
from ddae.eval import baselines
from ddae.eval.examples import ExampleReader, batches_of_rank, held_out
from ddae.eval.features import RAW, effective_rank, pooled, quarters, spread
from ddae.eval.knn import accuracy, vote
from ddae.patches import normalise

MOST = {"train": 20_000, "val": 5_000}  # images of each split, evenly over it
BATCH = 128
K = 20


class OnlineProbe:
    """Measures an encoder on the splits train and val of data.train's folder; all ranks share the work."""

    def __init__(self, config: DataConfig, image_size: int):
        """UserError where there is no split val."""
        try:
            where = held_out(config.train)
            cache = cache_of(config)
            self.readers = {s: ExampleReader(where, s, image_size, cache, labelled=False, most=MOST[s]) for s in MOST}
        except UserError as error:
            raise UserError(f"--probe_every wants a split to hold out: {error}") from None
        self._workers, self._normalisation = config.workers, config.normalisation
        self._first = True  # raw pixels are asked once a start, on all ranks
        self._fixed: dict[str, float] = {}  # what no step changes: on the main rank

    def measure(self, engine: Engine, look_around: Callable[[], None]) -> dict[str, float]:
        """Of each quarter's block: `knn/tap_12/cls` and `knn/tap_12/mean`, the accuracy in per cent, where there are
        labels, beside `knn/raw_pixels` and `knn/chance`; `health/rank/tap_12` and `health/spread/tap_12` of the mean of
        the patches."""
        found = {split: self._features(engine, split, look_around) for split in self.readers}
        self._first = False
        if not is_main():
            return {}
        row, labels = {}, {split: reader.labels for split, reader in self.readers.items()}
        labelled = len(labels["train"]) > 0 and len(labels["val"]) > 0

        def knn(bank: Tensor, queries: Tensor) -> float:
            return accuracy(vote(bank, labels["train"], queries, min(K, len(bank))).votes, labels["val"])

        raw = {split: features.pop(RAW, None) for split, features in found.items()}
        if labelled and raw["train"] is not None and raw["val"] is not None:
            mean = raw["train"].mean(0)
            self._fixed["knn/raw_pixels"] = knn(raw["train"] - mean, raw["val"] - mean)
            self._fixed["knn/chance"] = baselines.chance(labels["train"], labels["val"])
        for name, queries in found["val"].items():
            _, layer, pool = name.split()
            tap = tap_name(int(layer))
            if labelled:
                row[f"knn/{tap}/{pool}"] = knn(found["train"][name], queries)
            if pool == "mean":
                row |= {f"health/rank/{tap}": effective_rank(queries), f"health/spread/{tap}": spread(queries)}
        return row | self._fixed

    @torch.no_grad()
    def _features(self, engine: Engine, split: str, look_around: Callable[[], None]) -> dict[str, Tensor]:
        """Features of a split by name, whole, on the CPU."""
        encoder, reader, place = engine.module.encoder, self.readers[split], rank()
        layers, tables = quarters(encoder.shape.depth), {}
        for examples in batches_of_rank(reader, BATCH, self._workers, device()):
            look_around()
            with engine.autocast():
                found = pooled(encoder, normalise(examples.images, self._normalisation, engine.dtype), layers)
            if self._first:
                found[RAW] = baselines.pixel_features(examples.images)
            places = torch.arange(len(examples.labels), device=device()) * world_size() + place
            place += len(places) * world_size()
            counted = places < len(reader)
            for name, values in found.items():
                table = tables.setdefault(name, torch.zeros(len(reader), values.shape[1], device=device()))
                table[places[counted]] = values[counted].float()
        return {name: sum_over_ranks(table).cpu() for name, table in tables.items()}
