"""Embeddings of image files: one vector a photo, near-duplicates among the photos, and a map of all of them.

N: photos, D: encoder width, S: the encoder's image side in pixels.
"""

import csv
import importlib.util
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddae.atomic import new_folder, write_json
from ddae.config.base import ImageSize, height_width
from ddae.data.loader import ignore_signals
from ddae.data.memory import require_shared_memory
from ddae.data.photo import central_crop, load_rgb, upright_rgb
from ddae.distributed.comm import device
from ddae.errors import UserError
from ddae.eval.dataset import PREFETCH
from ddae.eval.features import require_finite_features
from ddae.models.patches import normalise
from ddae.models.vit import Encoder
from ddae.progress import ImageProgress
from ddae.sharding.inspection import IMAGE_ENDINGS
from ddae.sharding.scan import LabelRule, Scan

FILES = ("embeddings.npz", "embeddings.parquet", "duplicates.csv", "results.json", "map.png", "duplicates.png")
BATCH_SIZE = 64
CHUNK = 1024  # photos at a time whose nearest ones are searched
CANDIDATES = 5  # nearest photos of each that may be near-duplicates
MIN_COSINE = 0.95  # of the embeddings of near-duplicates, relative to the mean embedding
MIN_CORRELATION = 0.95  # of their pixels, at THUMBNAIL x THUMBNAIL
THUMBNAIL = 12  # pixels a side of the grey pictures that confirm near-duplicates

Photo = str | Path | Image.Image


class Embeddings(NamedTuple):
    """The embeddings of the photos that can be read."""

    values: np.ndarray  # float32 [N, D]: the mean of the patch tokens after the final norm
    rows: list[int]  # positions of these photos in the list that was given
    unreadable: dict[int, str]  # reason by position, of the others
    thumbnails: np.ndarray  # float32 [N, THUMBNAIL^2]: grey, of mean 0 and norm 1


class Duplicate(NamedTuple):
    """Two photos that show the same."""

    first: int  # row of the embeddings
    second: int
    cosine: float  # of the embeddings, relative to the mean embedding
    correlation: float  # of the pixels


class _Photos(Dataset):
    """Crops of the photos, uint8 [3, S, S]; the error's text for one that cannot be read."""

    def __init__(self, photos: Sequence[Photo], size: ImageSize):
        self.photos, self.size = photos, size

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, position: int) -> np.ndarray | str:
        photo = self.photos[position]
        try:
            image = upright_rgb(photo) if isinstance(photo, Image.Image) else load_rgb(photo)
        except UserError as error:
            return str(error)
        return central_crop(image, self.size)


def find_photos(paths: Sequence[Path]) -> list[Path]:
    """Return the image files among the paths and in the folders among them, of any tree, sorted within each folder.

    Raise UserError if a path does not exist or if there is no image.
    """
    photos = []
    for path in paths:
        if path.is_dir():
            scan = Scan([path], None, LabelRule(labels="none"))
            scan.add_folder(path)
            images = zip(scan.images.folder_number, scan.images.base, strict=True)
            photos += [path / scan.folders[number].path / os.fsdecode(base) for number, base in images]
        elif path.is_file():
            photos.append(path)
        else:
            raise UserError(f"{path} does not exist. Pass image files, or a folder that contains them.")
    if not photos:
        fix = f"Pass files ending in {', '.join(IMAGE_ENDINGS)}."
        raise UserError(f"{' '.join(map(str, paths))} contains no image. {fix}")
    return photos


@torch.inference_mode()
def embed(encoder: Encoder, photos: Sequence[Photo], workers: int = 0, show_progress: bool = False) -> Embeddings:
    """Embed photos: paths of image files, or PIL images. Raise UserError if none can be read.

    encoder: on any device. workers: processes that decode.
    """
    values, thumbnails, rows, unreadable = [], [], [], {}
    for positions, images in _batches(photos, encoder.shape.image_size, workers, show_progress, unreadable):
        pixels = normalise(images.to(encoder.cls_token.device), encoder.normalisation, torch.float32)
        values.append(encoder(pixels)[:, 1:].mean(1).float().cpu())
        grey = F.adaptive_avg_pool2d(images.float().mean(1), THUMBNAIL).flatten(1)
        thumbnails.append(F.normalize(grey - grey.mean(1, keepdim=True), dim=1))
        rows += positions
    if not rows:
        first = f", the first: {unreadable[min(unreadable)]}" if unreadable else ""
        raise UserError(f"none of {len(photos)} images can be read{first}")
    embeddings = torch.cat(values)
    require_finite_features(embeddings)
    return Embeddings(embeddings.numpy(), rows, unreadable, torch.cat(thumbnails).numpy())


def _batches(
    photos: Sequence[Photo], size: ImageSize, workers: int, show_progress: bool, unreadable: dict[int, str]
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield positions and crops, uint8 [B, 3, H, W]; add those that cannot be read to `unreadable`."""
    if workers:
        require_shared_memory(workers * PREFETCH * 3 * math.prod(height_width(size)), workers)
    options: dict[str, Any] = {"num_workers": workers, "worker_init_fn": ignore_signals, "batch_size": None}
    stream = enumerate(DataLoader(_Photos(photos, size), **options))
    positions, crops = [], []
    with ImageProgress(len(photos), enabled=show_progress) as progress:
        for position, crop in progress.track(stream):
            if isinstance(crop, str):
                unreadable[position] = crop
                continue
            positions.append(position)
            crops.append(torch.as_tensor(crop))
            if len(crops) == BATCH_SIZE:
                yield positions, torch.stack(crops)
                positions, crops = [], []
    if crops:
        yield positions, torch.stack(crops)


def find_duplicates(embeddings: Embeddings) -> list[Duplicate]:
    """Return pairs of photos that show the same, the most similar first: copies, re-encoded or resized ones.

    Their embeddings are among each other's CANDIDATES nearest and their pixels agree. Memory: CHUNK x N similarities.
    """
    values = torch.from_numpy(embeddings.values)
    centred = F.normalize(values - values.mean(0), dim=1)
    pixels = torch.from_numpy(embeddings.thumbnails)
    found = []
    for start in range(0, len(values) if len(values) > 1 else 0, CHUNK):
        similarity = centred[start : start + CHUNK] @ centred.t()
        rows = torch.arange(len(similarity))
        similarity[rows, start + rows] = -torch.inf
        nearest = similarity.topk(min(CANDIDATES, len(values) - 1))
        for row, column in (nearest.values >= MIN_COSINE).nonzero().tolist():
            first, second = start + row, int(nearest.indices[row, column])
            correlation = float(pixels[first] @ pixels[second])
            if first < second and correlation >= MIN_CORRELATION:
                found.append(Duplicate(first, second, float(nearest.values[row, column]), correlation))
    return sorted(found, key=lambda pair: (-pair.correlation, pair.first, pair.second))


def write_embeddings(
    folder: Path,
    names: Sequence[str],
    embeddings: Embeddings,
    duplicates: Sequence[Duplicate],
    facts: dict[str, Any],
    with_parquet: bool,
    figures: dict[str, Any],
) -> None:
    """Write a folder of embeddings atomically.

    embeddings.npz: `embeddings` float32 [N, D] and `names` [N]; embeddings.parquet: the same; duplicates.csv: pairs of
    names; results.json: `facts` and the counts. names: of the N photos; figures: by name.
    """
    with new_folder(folder) as partial:
        np.savez(partial / "embeddings.npz", embeddings=embeddings.values, names=np.array(names))
        if with_parquet:
            _write_parquet(partial / "embeddings.parquet", names, embeddings.values)
        with open(partial / "duplicates.csv", "w", newline="", errors="backslashreplace") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("first", "second", "cosine", "correlation"))
            for pair in duplicates:
                writer.writerow(
                    (names[pair.first], names[pair.second], f"{pair.cosine:.4f}", f"{pair.correlation:.4f}")
                )
        write_json(partial / "results.json", facts)
        for name, figure in figures.items():
            figure.savefig(partial / f"{name}.png", dpi=130)


def require_parquet() -> None:
    """Raise UserError if pyarrow is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError("--parquet needs pyarrow, which is not installed. pip install 'ddae[parquet]'")


def _write_parquet(file: Path, names: Sequence[str], values: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    pq.write_table(pa.table({"name": pa.array(names), "embedding": vectors}), file)


def check_out(folder: Path) -> None:
    """Raise UserError if the folder exists and holds anything but embeddings, or cannot be created."""
    if folder.is_dir() and any(folder.iterdir()):
        names = {path.name for path in folder.iterdir()}
        try:
            is_ours = json.loads((folder / "results.json").read_text())["task"] == "embed"
        except (OSError, ValueError, KeyError, TypeError):
            is_ours = False
        if foreign := names - set(FILES) if is_ours else names:
            raise UserError(
                f"--out {folder} contains {min(foreign)}, which ddae embed did not write. Pass a new folder."
            )
    elif folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file. Pass a new folder.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error.strerror}). Pass another path.") from None


def on_device(encoder: Encoder) -> Encoder:
    """Return the encoder on the GPU, if there is one."""
    return encoder.to(device())
