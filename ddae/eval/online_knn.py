"""Online evaluation during pretraining: k-NN accuracy on the validation split, effective rank and std of features.

The first measurement is made before the first step, on the untrained encoder, as the baseline of later ones.
"""

from collections.abc import Callable

from torch import Tensor

from ddae.config.base import ImageSize
from ddae.config.pretrain import DataConfig, tap_name
from ddae.data.cache import open_cache
from ddae.distributed.comm import is_main
from ddae.distributed.engine import Engine
from ddae.errors import UserError
from ddae.eval import baselines
from ddae.eval.dataset import ExampleReader, val_location
from ddae.eval.features import RAW_PIXELS, map_images, pooled_features, quarter_blocks
from ddae.eval.knn import accuracy, vote
from ddae.method.feature_statistics import effective_rank, feature_std
from ddae.models.patches import normalise

MAX_IMAGES = {"train": 20_000, "val": 5_000}  # of each split, spread evenly over it
K = 20


class OnlineProbe:
    """Evaluates an encoder on the splits train and val in the folder data.train; all ranks share the images."""

    def __init__(self, config: DataConfig, image_size: ImageSize):
        """Raise UserError if there is no split val."""
        try:
            source, cache = val_location(config.train), open_cache(config)
            self.readers = {
                split: ExampleReader(source, split, image_size, cache, labelled=False, max_images=max_images)
                for split, max_images in MAX_IMAGES.items()
            }
        except UserError as error:
            raise UserError(f"--probe_every needs a validation split: {error}") from None
        self._workers, self._normalisation = config.workers, config.normalisation
        self._first = True  # whether to measure raw pixels, too: once per start, on all ranks
        self._constant: dict[str, float] = {}  # metrics that do not depend on the encoder; on rank 0

    def measure(self, engine: Engine, poll: Callable[[], None]) -> dict[str, float]:
        """Return metrics of the last block of each quarter, such as block 12; empty on ranks other than 0.

        `features/effective_rank/tap_12` and `features/std/tap_12` of the mean of the patches. With labels also the
        accuracies in per cent `knn/tap_12/cls`, `knn/tap_12/mean`, `knn/raw_pixels` and `knn/chance`.
        """
        encoder = engine.module.encoder
        layers = quarter_blocks(encoder.shape.depth)

        def compute(images: Tensor) -> dict[str, Tensor]:
            with engine.autocast():
                features = pooled_features(encoder, normalise(images, self._normalisation, engine.dtype), layers)
            return features | ({RAW_PIXELS: baselines.pixel_features(images)} if self._first else {})

        features = {split: map_images(reader, self._workers, compute, poll) for split, reader in self.readers.items()}
        self._first = False
        if not is_main():
            return {}
        row, (labels, val_labels) = {}, (reader.labels for reader in self.readers.values())
        labelled = len(labels) > 0 and len(val_labels) > 0

        def knn(bank: Tensor, queries: Tensor) -> float:
            return accuracy(vote(bank, labels, queries, min(K, len(bank))).votes, val_labels)

        raw = [by_name.pop(RAW_PIXELS) for by_name in features.values() if RAW_PIXELS in by_name]
        if labelled and raw:
            bank, queries = (each - raw[0].mean(0) for each in raw)
            self._constant["knn/raw_pixels"] = knn(bank, queries)
            self._constant["knn/chance"] = baselines.chance(labels, val_labels)
        for name, queries in features["val"].items():
            _, layer, pool = name.split()
            tap = tap_name(int(layer))
            if labelled:
                row[f"knn/{tap}/{pool}"] = knn(features["train"][name], queries)
            if pool == "mean":
                row[f"features/effective_rank/{tap}"] = float(effective_rank(queries))
                row[f"features/std/{tap}"] = float(feature_std(queries))
        return row | self._constant
