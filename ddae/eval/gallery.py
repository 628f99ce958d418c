"""The paper's figures of runs and encoders, side by side: pictures, and what they show as numbers."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ddae import figures, report
from ddae.config import Config
from ddae.data.loader import cache_of
from ddae.distributed import device
from ddae.errors import UserError
from ddae.eval.attention import attention, cls_map, foreground_iou, locality
from ddae.eval.attention_pictures import attention_grid, beta_curves, distance_dots, distance_maps
from ddae.eval.examples import ExampleReader, read
from ddae.eval.scenes import IGNORED, SceneReader, resized, resized_labels
from ddae.experiment import ShardsConfig
from ddae.method import assemble
from ddae.model.vit import Encoder
from ddae.patches import normalise
from ddae.slices import load_weights
from ddae.tracker import read_metrics
from ddae.weights import load_encoder, newest_checkpoint

KINDS = ("distance", "attention", "locality", "betas", "reconstructions")
BATCH = 32  # images at a time


class Shown(NamedTuple):
    """An encoder, or the run that it is of."""

    name: str
    path: Path
    encoder: Encoder
    config: Config | None  # of a run of ours


class Settings(NamedTuple):
    kinds: Sequence[str]  # what to draw; empty: all that there is to be drawn
    block: int  # whose attention is shown
    images: int  # over which attention is measured
    shown: int  # images that are shown
    svg: bool  # beside the PNG
    masks: str  # shards with masks, by which attention is held against the foreground; empty: none
    classes: int  # how many these have, where they do not name them


def gallery(named: Sequence[str], data: str, out: Path, settings: Settings) -> dict[str, Any]:
    """Draw into `out`; the numbers, which results.json has, too. `named`: PATH or NAME=PATH.

    UserError where an encoder, a run or images cannot be read, or what is asked for is not there.
    """
    for kind in settings.kinds:
        if kind not in KINDS:
            raise UserError(f"there is no figure {kind!r}: choose some of {', '.join(KINDS)}")
    all_shown = [_open(each) for each in named]
    if len({each.name for each in all_shown}) < len(all_shown):
        raise UserError("two of the encoders have one name: give names of your own, as in MAE=files/mae.pth")
    data = data or next((each.config.data.train for each in all_shown if each.config), "")
    if not data:
        raise UserError("no images are named: add --data with a folder of shards")
    drawn: dict[str, Figure] = {}
    results: dict[str, Any] = {"task": "figures", "encoders": {each.name: str(each.path) for each in all_shown}}

    def wanted(kind: str, there: bool, lack: str) -> bool:
        if kind in settings.kinds and not there:
            raise UserError(lack)
        return there and (not settings.kinds or kind in settings.kinds)

    if wanted("distance", True, ""):
        drawn["distance"] = distance_maps(all_shown[0].encoder.grid)
    if wanted("attention", True, ""):
        drawn["attention"] = _attention(all_shown, data, settings)
    if wanted("locality", True, ""):
        drawn["locality"], results["locality"] = _locality(all_shown, data, settings.images)
    if settings.masks:
        results["foreground_iou"] = {each.name: _foreground(each, settings) for each in all_shown}
    exponents: dict[str, list[dict[str, float]]] = {}
    for each in all_shown:
        suffix = "" if len(all_shown) == 1 else f"_{each.name}"
        rows = read_metrics(each.path / "metrics.jsonl") if each.config else []
        rows = [row for row in rows if any(name.startswith("beta/") for name in row)]
        if wanted("betas", bool(rows), f"{each.path} logged no betas: name a run of a dynamic method"):
            exponents[each.name] = rows
        method = each.config is not None and each.config.pixel.enabled and newest_checkpoint(each.path) is not None
        lack = f"{each.path} has no checkpoint of a pixel branch: name a run folder with its checkpoints/"
        if wanted("reconstructions", method, lack):
            drawn[f"reconstructions{suffix}"] = _reconstructions(each, data, settings.shown)
    if exponents:
        drawn["betas"] = beta_curves(exponents)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    if settings.svg:
        for name, figure in drawn.items():
            figure.savefig(out / f"{name}.svg")
    report.add_evaluation(out, drawn)
    return results


def _open(named: str) -> Shown:
    name, _, path = ("", "", named) if Path(named).exists() else named.rpartition("=")
    folder = Path(path)
    encoder = load_encoder(folder).to(device())
    config = None
    if (folder / "metrics.jsonl").exists():
        config = Config.from_dict(json.loads((folder / "config.json").read_text()))
    return Shown(name or folder.name, folder, encoder, config)


def _images(data: str, size: int, count: int) -> Iterator[Tensor]:
    """uint8 [B, 3, S, S]: some of the validation images, or of the others where there are none; always the same."""
    try:
        reader = ExampleReader(data, "val", size, labelled=False)
    except UserError:
        reader = ExampleReader(data, "train", size, labelled=False)
    some = torch.randperm(len(reader), generator=torch.Generator().manual_seed(0))[:count].tolist()
    for images, _ in read(reader, some, 0, BATCH):
        yield images.to(device())


def _some(data: str, size: int, count: int) -> Tensor:
    return torch.cat(list(_images(data, size, count)))


def _attention(all_shown: Sequence[Shown], data: str, settings: Settings) -> Figure:
    maps, images = {}, None
    for each in all_shown:
        if settings.block > len(each.encoder.blocks):
            raise UserError(f"{each.name} has {len(each.encoder.blocks)} blocks: choose one of them with --block")
        own = _some(data, each.encoder.shape.image_size, settings.shown)
        images = own if images is None or own.shape[2] > images.shape[2] else images
        shares = attention(each.encoder, normalise(own, each.encoder.normalisation, torch.float32), [settings.block])
        maps[each.name] = cls_map(shares[settings.block], each.encoder.grid).cpu()
    assert images is not None
    return attention_grid(images.cpu(), maps, settings.block)


def _locality(all_shown: Sequence[Shown], data: str, count: int) -> tuple[Figure, dict[str, Any]]:
    found = {
        each.name: locality(each.encoder, _images(data, each.encoder.shape.image_size, count)) for each in all_shown
    }
    patches = {each.name: (each.encoder.grid, each.encoder.shape.patch_size) for each in all_shown}
    numbers = {}
    for name, local in found.items():
        distance, diversity = local.deep_half
        numbers[name] = {"distance_px": distance * patches[name][1], "diversity": diversity}
    return distance_dots(found, patches), numbers


@torch.no_grad()
def _reconstructions(each: Shown, data: str, count: int) -> Figure:
    config = each.config
    checkpoint = newest_checkpoint(each.path)
    assert config is not None
    assert checkpoint is not None
    method = assemble(config)
    load_weights(checkpoint, "weight", method)
    method.to(device()).eval()
    rows = [row for row in read_metrics(each.path / "metrics.jsonl") if "loss/total" in row]
    by_name = {name.removeprefix("beta/"): value for name, value in rows[-1].items() if name.startswith("beta/")}
    images = _some(data, config.model.image_size, count)
    return figures.reconstructions(method, config, images, figures.betas_of_pixels(config, by_name))


def _foreground(each: Shown, settings: Settings) -> float:
    """Mean intersection over union of what the cls token looks at with what is not of an image's commonest class."""
    encoder, side = each.encoder, each.encoder.shape.image_size
    try:
        reader = SceneReader(settings.masks, "val", side, cache_of(ShardsConfig()), settings.classes)
    except UserError as error:
        raise UserError(f"--masks: {error}") from None
    found = []
    for scene in read(reader, range(0, len(reader), max(1, len(reader) // settings.images)), 0):
        image = torch.from_numpy(resized(scene.image.numpy(), side, side))[None].to(device())
        shares = attention(encoder, normalise(image, encoder.normalisation, torch.float32), [settings.block])
        labels = torch.from_numpy(resized_labels(scene.labels.numpy(), *encoder.grid))
        known = labels[labels != IGNORED]
        common = known.mode().values if known.numel() else IGNORED
        foreground = (labels != IGNORED) & (labels != common)
        found.append(foreground_iou(cls_map(shares[settings.block], encoder.grid).cpu(), foreground[None]))
    return float(torch.cat(found).nanmean())
