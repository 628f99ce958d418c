"""Segmentation: a class a pixel, by UperNet on a fine-tuned encoder (docs/evaluation.md; paper, appendix "Semantic
Segmentation").

C classes, H x W pixels of an image.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddae.config import deepspeed as ds_config
from ddae.config.segmentation import SegmentConfig
from ddae.data.cache import open_cache
from ddae.data.loader import Batch
from ddae.distributed.checkpoint_format import Checkpointable
from ddae.distributed.comm import device, is_main, mean_over_ranks, rank, sum_over_ranks, world_size
from ddae.distributed.engine import Engine
from ddae.distributed.preemption import StopSignal
from ddae.errors import UserError
from ddae.eval.augment import seed_all
from ddae.eval.dataset import held_out, read
from ddae.eval.figures import bars, confusion_matrix, overlays
from ddae.eval.segmentation_data import IGNORED, Scene, SceneCrop, SceneLoader, SceneReader, split_planes
from ddae.eval.upernet import Segmenter, classify, prepared, write_segmenter
from ddae.export.encoder import load_encoder
from ddae.models.patches import normalise
from ddae.models.vit import Encoder
from ddae.report import html as report
from ddae.report.figures import curves
from ddae.trainer import fit
from ddae.training.optimizer import build_layerwise_optimizer
from ddae.training.run import Run
from ddae.training.schedules import warmup_linear
from ddae.training.tracker import run_id_of

SHOWN = 6  # images with their classes


def segment(config: SegmentConfig, stop: StopSignal | None = None) -> None:
    """Train to the end, or from the newest checkpoint on; then write results, pictures and the segmenter.

    SystemExit with code 75 where the run is told to stop before. UserError where the encoder or the shards cannot be
    read, shards have no masks, or those of the two splits do not fit.
    """
    stop = stop or StopSignal()
    encoder = load_encoder(config.encoder, config.image_size, config.normalisation or None)
    config = config.resolved_for(encoder.shape.width, encoder.shape.depth)
    resolved = ds_config.resolve(ds_config.load(config.ds_config), config, world_size())
    run = Run(config, stop, resolved.json, resolved.micro_batch)
    if resolved.micro_batch * (world_size() if device().type == "cuda" else 1) == 1:
        raise UserError(
            "a micro-batch of 1 image has no statistics for a batch norm: choose a larger --data.batch_size, or "
            "train_micro_batch_size_per_gpu in the DeepSpeed JSON"
        )
    size = encoder.shape.image_size
    if size < 2 * encoder.shape.patch_size:
        raise UserError(f"image_size {size} is a single patch, which has no half: choose a larger one")
    val = SceneReader(held_out(config.data.train, config.val), "val", size, open_cache(config.data), config.seg.classes)
    val[0]  # a mistake that all samples share is told at once, not at the first evaluation
    crop = SceneCrop(config.seg, size, encoder.normalisation, len(val.classes))
    loader = SceneLoader(config.data, size, config.train.seed, run.rank_batch, device(), crop)
    fit(Segmentation(config, encoder, loader, val), run, loader)


class Segmentation:
    """What fit() trains and measures."""

    schedule = staticmethod(warmup_linear)
    engine: Engine
    optimizable: Engine
    description: str

    def __init__(self, config: SegmentConfig, encoder: Encoder, loader: SceneLoader, val: SceneReader):
        """UserError where the shards to train on have other classes than those to validate on."""
        self.config, self.encoder, self.classes, self.val = config, encoder, val.classes, val
        self.evaluate_every, self.parent = config.seg.evaluate_every, run_id_of(Path(config.encoder))
        self.folder = Path(config.folder)
        self.images = {"train": loader.num_samples, "val": len(val)}
        train, held = () if loader.shards is None else loader.shards.classes, val.shards.classes
        for number, names in enumerate(itertools.zip_longest(train, held)):
            if names[0] != names[1]:
                raise UserError(
                    f"class {number} is {names[0]!r} of the shards to train on and {names[1]!r} of those to validate "
                    "on: make both with the same data_prep/ command"
                )
        self._confusion: Tensor | None = None
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []  # images, labels and guesses of the last evaluation

    def build(self, ds_json: dict[str, Any]) -> dict[str, Checkpointable]:
        seg = self.config.seg
        encoder = prepared(self.encoder, seg.relative_positions, seg.layer_scale)
        encoder.drop_paths(seg.drop_path)
        encoder.learn_positions()
        encoder.activation_checkpointing = self.config.engine.activation_checkpointing
        generator = torch.Generator().manual_seed(self.config.train.seed)
        module: nn.Module = Segmenter(encoder, len(self.classes), seg, generator)
        if device().type == "cuda" and world_size() > 1:
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        module.train().requires_grad_(True)
        optimizer = build_layerwise_optimizer(module, encoder.shape.depth, seg.layer_decay, self.config.optim)
        self.engine = Engine(module, optimizer, ds_json)
        self.optimizable, self.description = self.engine, f"{self.config.engine.precision}, ZeRO {self.engine.stage}"
        return {"engine": self.engine, "statistics": Statistics(self.engine.module)}

    def loss(self, batch: Batch, seed: int) -> Tensor:
        seed_all(seed)  # of the paths and channels that are dropped
        images, labels = split_planes(batch.images)
        return self.engine(normalise(images, self.encoder.normalisation, self.engine.dtype), labels, IGNORED)

    def after_step(self, applied: Tensor) -> None:
        """Nothing follows the weights."""

    def evaluate(self, poll: Callable[[], None]) -> dict[str, float]:
        """Mean intersection over union, mean accuracy of the classes and accuracy of the pixels, in per cent."""
        Statistics(self.engine.module).agree()
        confusion = torch.zeros([len(self.classes)] * 2, dtype=torch.int64, device=self.engine.device)
        self.engine.module.eval()
        self._seen = []
        for scene, counted in self._of_val():
            poll()
            guesses = self._guess(scene)
            if counted:
                confusion += confusion_of(scene.labels.to(guesses.device), guesses, len(self.classes))
                if len(self._seen) < SHOWN:
                    self._seen.append((scene.image, scene.labels, guesses.cpu()))
        self.engine.module.train()
        self._confusion = sum_over_ranks(confusion).cpu()
        return {f"val/{name}": value for name, value in scores(self._confusion).items()}

    def finish(self, run: Run, heartbeat: Callable[[], None]) -> list[Path]:
        weights = self.engine.weights(self.engine.module)
        if self._confusion is None:  # evaluated by an earlier start
            self.evaluate(heartbeat)
        if not is_main():
            return []
        assert self._confusion is not None
        rows = run.rows()
        results = self._results(rows, self._confusion)
        (self.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        module = self.engine.module
        kept = module.state_dict().keys()
        buffers = {name: buffer.cpu() for name, buffer in module.named_buffers() if name in kept}
        state = {name: values.contiguous() for name, values in (weights | buffers).items()}
        write_segmenter(state, module.encoder, self.config.seg, self.classes, self.folder / "segmenter")
        if not self.config.train.report:
            return []
        measures = ["val/miou", "val/class_accuracy", "val/pixel_accuracy"]
        drawn = {
            "curves": curves(rows, {"loss": ["loss/total"], "validation, in %": measures, "lr": ["lr"]}, ""),
            "overlays": overlays(self._seen, self.classes),
            "classes": bars(results["iou"], "intersection over union in %"),
            "confusion": confusion_matrix(self._confusion, self.classes),
        }
        return report.add_evaluation(self.folder, drawn)

    def summary(self) -> str:
        """The results in words, and where the segmenter is."""
        results = json.loads((self.folder / "results.json").read_text())
        last, best, chance = results["last"], results["best"], "chance not measured"
        if "chance" in results:  # else of an earlier version
            miou, pixels = (results["chance"][name] for name in ("miou", "pixel_accuracy"))
            chance = f"always the most frequent class: mIoU {miou:.2f} %, {pixels:.2f} % of the pixels"
        return (
            f"mIoU {last['miou']:.2f} % at the end, {best['miou']:.2f} % at best (step {best['step']}); "
            f"{last['pixel_accuracy']:.2f} % of the pixels are right; "
            f"{chance}; untrained weights not measured\n"
            f"segmenter:            {self.folder / 'segmenter'}"
        )

    def _guess(self, scene: Scene) -> Tensor:
        """The likeliest class of every pixel of the image as it is stored: int64 [H, W]."""
        pixels = normalise(scene.image.to(self.engine.device), self.encoder.normalisation, self.engine.dtype)
        with self.engine.autocast():
            return classify(self.engine.module, pixels, self.config.seg.stride, tuple(scene.labels.shape))

    def _of_val(self) -> Iterator[tuple[Scene, bool]]:
        """This rank's share of the validation images, as many on each rank: where they run out, first ones that do not
        count."""
        share = range(rank(), len(self.val) + -len(self.val) % world_size(), world_size())
        scenes = read(self.val, [number % len(self.val) for number in share], self.config.data.workers)
        for number, scene in zip(share, scenes, strict=True):
            yield scene, number < len(self.val)

    def _results(self, rows: list[dict[str, float]], confusion: Tensor) -> dict[str, Any]:
        """Of the last evaluation, and the best of every number."""
        measured = [row for row in rows if "val/miou" in row]
        names = ("miou", "class_accuracy", "pixel_accuracy")
        last = {name: measured[-1][f"val/{name}"] for name in names}
        best = {name: max(row[f"val/{name}"] for row in measured) for name in names}
        finest = max(measured, key=lambda row: row["val/miou"])
        ious = 100 * intersection_over_union(confusion.double())
        return {
            "task": "segment",
            "encoder": self.config.encoder,
            "recipe": self.config.preset,
            "data": self.config.to_dict()["data"]["train"],
            "classes": len(self.classes),
            "images": self.images,
            "pixels": int(confusion.sum()),
            "last": last | {"step": measured[-1]["step"]},
            "best": best | {"step": finest["step"]},
            "chance": constant_answer(confusion),
            "iou": {name: float(iou) for name, iou in zip(self.classes, ious, strict=True) if iou.isfinite()},
        }


class Statistics:
    """The running statistics of batch norms, which a checkpoint holds beside the weights."""

    def __init__(self, module: nn.Module):
        self._buffers = {
            name: buffer for name, buffer in module.named_buffers() if name.endswith(("running_mean", "running_var"))
        }

    def agree(self) -> None:
        """The mean over the ranks, on all of them: on CPUs each has seen its own images alone."""
        for buffer in self._buffers.values():
            mean_over_ranks(buffer)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: mean_over_ranks(buffer.clone()).cpu() for name, buffer in self._buffers.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, values in state.items():
            self._buffers[name].copy_(values)


def confusion_of(labels: Tensor, guesses: Tensor, num_classes: int) -> Tensor:
    """int64 [H, W] each -> pixels by true and guessed class: int64 [C, C]."""
    known = labels != IGNORED
    pairs = labels[known] * num_classes + guesses[known]
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def intersection_over_union(confusion: Tensor) -> Tensor:
    """float [C, C] -> [C]; NaN for a class that is neither there nor guessed."""
    right = confusion.diagonal()
    return right / (confusion.sum(0) + confusion.sum(1) - right)


def constant_answer(confusion: Tensor) -> dict[str, float]:
    """scores() of the answer that is the most frequent class everywhere: [C, C] -> per cent."""
    pixels = confusion.sum(1)
    answer = torch.zeros_like(confusion)
    answer[:, pixels.argmax()] = pixels
    return scores(answer)


def scores(confusion: Tensor) -> dict[str, float]:
    """In per cent: the mean intersection over union and the mean accuracy, of the classes that there are, and the share
    of right pixels."""
    confusion = confusion.double()
    right = confusion.diagonal()
    return {
        "miou": 100 * float(intersection_over_union(confusion).nanmean()),
        "class_accuracy": 100 * float((right / confusion.sum(1)).nanmean()),
        "pixel_accuracy": 100 * float(right.sum() / confusion.sum()),
    }
