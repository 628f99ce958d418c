"""What an encoder knows while it is pretrained: k-NN on a held-out split, and its features' health without labels.

The first measurement comes before the first step: the encoder untrained, which later ones are compared with.

D width.
"""

from collections.abc import Callable

from torch import Tensor

from ddae.config.pretrain import DataConfig, tap_name
from ddae.data.cache import open_cache
from ddae.distributed.comm import is_main
from ddae.distributed.engine import Engine
from ddae.errors import UserError
from ddae.eval import baselines
from ddae.eval.dataset import ExampleReader, held_out
from ddae.eval.features import RAW, effective_rank, pooled, quarters, spread, table_of
from ddae.eval.knn import accuracy, vote
from ddae.models.patches import normalise

MOST = {"train": 20_000, "val": 5_000}  # images of each split, evenly over it
K = 20


class OnlineProbe:
    """Measures an encoder on the splits train and val of data.train's folder; all ranks share the work."""

    def __init__(self, config: DataConfig, image_size: int):
        """UserError where there is no split val."""
        try:
            where = held_out(config.train)
            cache = open_cache(config)
            self.readers = {s: ExampleReader(where, s, image_size, cache, labelled=False, most=MOST[s]) for s in MOST}
        except UserError as error:
            raise UserError(f"--probe_every wants a split to hold out: {error}") from None
        self._workers, self._normalisation = config.workers, config.normalisation
        self._first = True  # raw pixels are measured once per start, on all ranks
        self._fixed: dict[str, float] = {}  # what no step changes: on the main rank

    def measure(self, engine: Engine, poll: Callable[[], None]) -> dict[str, float]:
        """Of each quarter's block: `knn/tap_12/cls` and `knn/tap_12/mean`, the accuracy in per cent, where there are
        labels, beside `knn/raw_pixels` and `knn/chance`; `features/effective_rank/tap_12` and `features/std/tap_12` of the mean of
        the patches."""
        found = {split: self._features(engine, split, poll) for split in self.readers}
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
                row |= {
                    f"features/effective_rank/{tap}": effective_rank(queries),
                    f"features/std/{tap}": spread(queries),
                }
        return row | self._fixed

    def _features(self, engine: Engine, split: str, poll: Callable[[], None]) -> dict[str, Tensor]:
        """Features of a split by name, whole, on the CPU; raw pixels among them in the first measurement of a start."""
        encoder = engine.module.encoder
        layers = quarters(encoder.shape.depth)

        def make(images: Tensor) -> dict[str, Tensor]:
            with engine.autocast():
                found = pooled(encoder, normalise(images, self._normalisation, engine.dtype), layers)
            return found | ({RAW: baselines.pixel_features(images)} if self._first else {})

        return table_of(self.readers[split], self._workers, make, poll)
