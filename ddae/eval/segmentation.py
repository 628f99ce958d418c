"""Semantic segmentation: UperNet on a fine-tuned encoder (docs/evaluation.md; paper, appendix "Semantic Segmentation").

Shapes: C classes, H x W pixels of an image.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddae.atomic import write_json
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
from ddae.eval.dataset import load_samples, val_location
from ddae.eval.figures import bar_chart, confusion_matrix, segmentation_grid
from ddae.eval.segmentation_data import IGNORE_INDEX, Scene, SceneCrop, SceneDataset, SceneLoader, split_planes
from ddae.eval.upernet import Segmenter, extend_encoder, predict_classes, write_segmenter
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

NUM_SHOWN = 6  # validation images in the report
METRICS = ("miou", "class_accuracy", "pixel_accuracy")


def segment(config: SegmentConfig, stop: StopSignal | None = None) -> None:
    """Train to the end, resuming from the newest checkpoint; then write results, figures and the segmenter.

    Raise SystemExit with code 75 if a signal stops the run. Raise UserError if the encoder or the shards cannot be
    read, if the shards have no masks, or if training and validation shards have different classes.
    """
    stop = stop or StopSignal()
    encoder = load_encoder(config.encoder, config.image_size, config.normalisation or None)
    config = config.resolved_for(encoder.shape.width, encoder.shape.depth)
    resolved = ds_config.resolve(ds_config.load(config.ds_config), config, world_size())
    run = Run(config, stop, resolved.json, resolved.micro_batch)
    if resolved.micro_batch * (world_size() if device().type == "cuda" else 1) == 1:
        raise UserError(
            "the micro-batch is 1 image; batch norm needs 2 or more. Pass a larger --data.batch_size, or set "
            "train_micro_batch_size_per_gpu in the DeepSpeed JSON."
        )
    size, patch = encoder.shape.image_size, encoder.shape.patch_size
    if size < 2 * patch:
        raise UserError(
            f"image_size is {size}, a single patch; expected {2 * patch} or more. Pass a larger --image_size."
        )
    source = val_location(config.data.train, config.val)
    val = SceneDataset(source, "val", size, open_cache(config.data), config.seg.classes)
    val[0]  # raises errors that all samples have before the training starts
    crop = SceneCrop(config.seg, size, encoder.normalisation, len(val.classes))
    loader = SceneLoader(config.data, size, config.train.seed, run.rank_batch, device(), crop)
    fit(SegmentationTask(config, encoder, loader, val), run, loader)


class SegmentationTask:
    """Task of fit(): UperNet with cross-entropy, evaluated by mIoU."""

    schedule = staticmethod(warmup_linear)
    engine: Engine
    optimizable: Engine
    description: str

    def __init__(self, config: SegmentConfig, encoder: Encoder, loader: SceneLoader, val: SceneDataset):
        """Raise UserError if the training shards have other classes than the validation shards."""
        self.config, self.encoder, self.classes, self.val = config, encoder, val.classes, val
        self.evaluate_every, self.parent = config.seg.evaluate_every, run_id_of(Path(config.encoder))
        self.folder = Path(config.folder)
        self.images = {"train": loader.num_samples, "val": len(val)}
        train_classes = () if loader.shards is None else loader.shards.classes
        for number, (in_train, in_val) in enumerate(itertools.zip_longest(train_classes, val.shards.classes)):
            if in_train != in_val:
                raise UserError(
                    f"class {number} is {in_train!r} in the training shards and {in_val!r} in the validation shards; "
                    "expected the same classes. Make both with the same data_prep/ command."
                )
        self._confusion: Tensor | None = None  # int64 [C, C], of the last evaluation
        self._examples: list[tuple[Tensor, Tensor, Tensor]] = []  # (image, labels, predictions) of the last evaluation

    def build(self, ds_json: dict[str, Any]) -> dict[str, Checkpointable]:
        seg = self.config.seg
        encoder = extend_encoder(self.encoder, seg.relative_positions, seg.layer_scale)
        encoder.set_drop_path(seg.drop_path)
        encoder.make_positions_learnable()
        encoder.activation_checkpointing = self.config.engine.activation_checkpointing
        generator = torch.Generator().manual_seed(self.config.train.seed)
        module: nn.Module = Segmenter(encoder, len(self.classes), seg, generator)
        if device().type == "cuda" and world_size() > 1:
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        module.train().requires_grad_(True)
        optimizer = build_layerwise_optimizer(module, encoder.shape.depth, seg.layer_decay, self.config.optim)
        self.engine = Engine(module, optimizer, ds_json)
        self.optimizable, self.description = self.engine, f"{self.config.engine.precision}, ZeRO {self.engine.stage}"
        return {"engine": self.engine, "statistics": BatchNormStats(self.engine.module)}

    def loss(self, batch: Batch, seed: int) -> Tensor:
        seed_all(seed)  # of stochastic depth and dropout
        images, labels = split_planes(batch.images)
        return self.engine(normalise(images, self.encoder.normalisation, self.engine.dtype), labels, IGNORE_INDEX)

    def after_step(self, applied: Tensor) -> None:
        """Nothing to update."""

    def evaluate(self, poll: Callable[[], None]) -> dict[str, float]:
        """Return segmentation_scores() over the validation images of all ranks, in percent, as val/ metrics."""
        BatchNormStats(self.engine.module).average_over_ranks()
        confusion = torch.zeros([len(self.classes)] * 2, dtype=torch.int64, device=self.engine.device)
        self.engine.module.eval()
        self._examples = []
        for scene, is_padding in self._validation_scenes():
            poll()
            predicted = self._predict(scene)
            if not is_padding:
                confusion += count_confusion(scene.labels.to(predicted.device), predicted, len(self.classes))
                if len(self._examples) < NUM_SHOWN:
                    self._examples.append((scene.image, scene.labels, predicted.cpu()))
        self.engine.module.train()
        self._confusion = sum_over_ranks(confusion).cpu()
        return {f"val/{name}": value for name, value in segmentation_scores(self._confusion).items()}

    def finish(self, run: Run, heartbeat: Callable[[], None]) -> list[Path]:
        weights = self.engine.weights(self.engine.module)
        if self._confusion is None:  # an earlier start of the run made the last evaluation
            self.evaluate(heartbeat)
        if not is_main():
            return []
        assert self._confusion is not None
        rows = run.rows()
        results = self._results(rows, self._confusion)
        write_json(self.folder / "results.json", results)
        module = self.engine.module
        persistent = module.state_dict().keys()
        buffers = {name: buffer.cpu() for name, buffer in module.named_buffers() if name in persistent}
        state = {name: values.contiguous() for name, values in (weights | buffers).items()}
        write_segmenter(state, module.encoder, self.config.seg, self.classes, self.folder / "segmenter")
        if not self.config.train.report:
            return []
        groups = {"loss": ["loss/total"], "validation, in %": [f"val/{name}" for name in METRICS], "lr": ["lr"]}
        drawn = {
            "curves": curves(rows, groups, ""),
            "overlays": segmentation_grid(self._examples, self.classes),
            "classes": bar_chart(results["iou"], "IoU in %"),
            "confusion": confusion_matrix(self._confusion, self.classes),
        }
        return report.add_evaluation(self.folder, drawn)

    def summary(self) -> str:
        """Return the results as text, and the path of the segmenter."""
        results = json.loads((self.folder / "results.json").read_text())
        last, best, chance = results["last"], results["best"], "chance not measured"
        if "chance" in results:  # older results lack it
            miou, pixels = (results["chance"][name] for name in ("miou", "pixel_accuracy"))
            chance = f"predicting the most frequent class everywhere: mIoU {miou:.2f} %, pixel accuracy {pixels:.2f} %"
        return (
            f"last mIoU {last['miou']:.2f} %, best mIoU {best['miou']:.2f} % (step {best['step']}), "
            f"last pixel accuracy {last['pixel_accuracy']:.2f} %; {chance}; untrained weights not measured\n"
            f"segmenter:            {self.folder / 'segmenter'}"
        )

    def _predict(self, scene: Scene) -> Tensor:
        """Return the most likely class of every pixel at the stored image's size: int64 [H, W]."""
        pixels = normalise(scene.image.to(self.engine.device), self.encoder.normalisation, self.engine.dtype)
        with self.engine.autocast():
            return predict_classes(self.engine.module, pixels, self.config.seg.stride, tuple(scene.labels.shape))

    def _validation_scenes(self) -> Iterator[tuple[Scene, bool]]:
        """Yield (scene, whether it is padding) of this rank's share.

        Every rank has the same number of scenes; the first ones of the split are the padding.
        """
        share = range(rank(), len(self.val) + -len(self.val) % world_size(), world_size())
        scenes = load_samples(self.val, [number % len(self.val) for number in share], self.config.data.workers)
        for number, scene in zip(share, scenes, strict=True):
            yield scene, number >= len(self.val)

    def _results(self, rows: list[dict[str, float]], confusion: Tensor) -> dict[str, Any]:
        """Return the content of results.json: the last evaluation and the best value of each metric."""
        evaluations = [row for row in rows if "val/miou" in row]
        last = {name: evaluations[-1][f"val/{name}"] for name in METRICS}
        best = {name: max(row[f"val/{name}"] for row in evaluations) for name in METRICS}
        best_row = max(evaluations, key=lambda row: row["val/miou"])
        ious = 100 * intersection_over_union(confusion.double())
        return {
            "task": "segment",
            "encoder": self.config.encoder,
            "recipe": self.config.preset,
            "data": self.config.to_dict()["data"]["train"],
            "classes": len(self.classes),
            "images": self.images,
            "pixels": int(confusion.sum()),
            "last": last | {"step": evaluations[-1]["step"]},
            "best": best | {"step": best_row["step"]},
            "chance": majority_class_scores(confusion),
            "iou": {name: float(iou) for name, iou in zip(self.classes, ious, strict=True) if iou.isfinite()},
        }


class BatchNormStats:
    """Running statistics of a module's batch norms, as a part of the checkpoint."""

    def __init__(self, module: nn.Module):
        self._buffers = {
            name: buffer for name, buffer in module.named_buffers() if name.endswith(("running_mean", "running_var"))
        }

    def average_over_ranks(self) -> None:
        """Replace the statistics by their mean over ranks. On CPUs each rank has those of its own images."""
        for buffer in self._buffers.values():
            mean_over_ranks(buffer)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: mean_over_ranks(buffer.clone()).cpu() for name, buffer in self._buffers.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, values in state.items():
            self._buffers[name].copy_(values)


def count_confusion(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Count pixels by true class (rows) and predicted class (columns): int64 [H, W] twice -> int64 [C, C].

    Pixels labelled IGNORE_INDEX are not counted.
    """
    valid = labels != IGNORE_INDEX
    pairs = labels[valid] * num_classes + predicted[valid]
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def intersection_over_union(confusion: Tensor) -> Tensor:
    """Return the IoU of each class, float [C, C] -> [C]; NaN for a class that is neither labelled nor predicted."""
    correct = confusion.diagonal()
    return correct / (confusion.sum(0) + confusion.sum(1) - correct)


def majority_class_scores(confusion: Tensor) -> dict[str, float]:
    """Return segmentation_scores() of predicting the most frequent class for every pixel."""
    pixels = confusion.sum(1)
    constant = torch.zeros_like(confusion)
    constant[:, pixels.argmax()] = pixels
    return segmentation_scores(constant)


def segmentation_scores(confusion: Tensor) -> dict[str, float]:
    """Return mean IoU, mean class accuracy and pixel accuracy in percent. confusion: int64 [C, C].

    The means are over the classes that occur.
    """
    confusion = confusion.double()
    correct = confusion.diagonal()
    return {
        "miou": 100 * float(intersection_over_union(confusion).nanmean()),
        "class_accuracy": 100 * float((correct / confusion.sum(1)).nanmean()),
        "pixel_accuracy": 100 * float(correct.sum() / confusion.sum()),
    }
