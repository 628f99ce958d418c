"""Semantic segmentation: UperNet on a fine-tuned encoder (docs/evaluation.md; paper, appendix "Semantic Segmentation").

Shapes: C classes, H x W pixels of an image.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ddae.config.base import describe_size
from ddae.config.segmentation import SegmentConfig
from ddae.data.cache import open_cache
from ddae.data.loader import Batch
from ddae.distributed.checkpoint_format import Checkpointable
from ddae.distributed.comm import device, mean_over_ranks, sum_over_ranks, world_size
from ddae.distributed.engine import Engine
from ddae.distributed.preemption import StopSignal
from ddae.errors import UserError
from ddae.eval.augment import seed_all
from ddae.eval.dataset import load_samples, rank_share, val_location
from ddae.eval.figures import bar_chart, confusion_matrix, segmentation_grid
from ddae.eval.metrics import count_confusion, intersection_over_union, majority_class_scores, segmentation_scores
from ddae.eval.segmentation_data import (
    IGNORE_INDEX,
    SceneCrop,
    SceneDataset,
    SceneLoader,
    require_several_classes,
    split_planes,
)
from ddae.eval.task import SupervisedTask, deepspeed_run
from ddae.eval.upernet import Segmenter, extend_encoder, predict_classes, write_segmenter
from ddae.export.encoder import encoder_hash, load_encoder
from ddae.models.patches import normalise
from ddae.models.vit import Encoder
from ddae.report.figures import curves
from ddae.trainer import fit
from ddae.training.optimizer import build_layerwise_optimizer
from ddae.training.schedules import warmup_linear

NUM_SHOWN = 6  # validation images in the report
METRICS = ("miou", "class_accuracy", "pixel_accuracy")


def segment(config: SegmentConfig, stop: StopSignal | None = None) -> None:
    """Train to the end, resuming from the newest checkpoint; then write results, figures and the segmenter.

    Raise SystemExit with code 75 if a signal stops the run. Raise UserError if the encoder or the shards cannot be
    read, if the shards have no masks, or if training and validation shards have different classes.
    """
    encoder = load_encoder(config.encoder, config.image_size, config.normalisation or None)
    config = config.resolved_for(encoder.shape.width, encoder.shape.depth)
    run = deepspeed_run(config, stop)
    if run.rank_batch.micro_batch * (world_size() if device().type == "cuda" else 1) == 1:
        raise UserError(
            "the micro-batch is 1 image; batch norm needs 2 or more. Pass a larger --data.batch_size, or set "
            "train_micro_batch_size_per_gpu in the DeepSpeed JSON."
        )
    size, patch = encoder.shape.image_size, encoder.shape.patch_size
    if not isinstance(size, int):
        raise UserError(f"image_size is {describe_size(size)}; segmentation expects a square. Pass --image_size 512.")
    if size < 2 * patch:
        expected = f"a single patch; expected {2 * patch} or more. Pass a larger --image_size."
        raise UserError(f"image_size is {size}, {expected}")
    source = val_location(config.data.train, config.val)
    val = SceneDataset(source, "val", size, open_cache(config.data), config.seg.classes)
    require_several_classes(val)
    crop = SceneCrop(config.seg, size, encoder.normalisation, len(val.classes))
    loader = SceneLoader(config.data, size, config.train.seed, run.rank_batch, device(), crop)
    fit(SegmentationTask(config, encoder, loader, val), run, loader)


class SegmentationTask(SupervisedTask):
    """Task of fit(): UperNet with cross-entropy, evaluated by mIoU."""

    schedule = staticmethod(warmup_linear)

    def __init__(self, config: SegmentConfig, encoder: Encoder, loader: SceneLoader, val: SceneDataset):
        """Raise UserError if the training shards have other classes than the validation shards."""
        super().__init__(config, val, config.seg.evaluate_every, config.encoder)
        self.encoder_hash = encoder_hash(encoder)
        self.encoder, self.classes, self.images = encoder, val.classes, {"train": loader.num_samples, "val": len(val)}
        train_classes = () if loader.shards is None else loader.shards.classes
        for number, (in_train, in_val) in enumerate(itertools.zip_longest(train_classes, val.shards.classes)):
            if in_train != in_val:
                raise UserError(
                    f"class {number} is {in_train!r} in the training shards and {in_val!r} in the validation shards; "
                    "expected the same classes. Make both with the same data_prep/ command."
                )

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

    def evaluate(self, poll: Callable[[], None]) -> dict[str, float]:
        """Return segmentation_scores() over the validation images of all ranks, in percent, as val/ metrics."""
        engine, seg, num_classes = self.engine, self.config.seg, len(self.classes)
        BatchNormStats(engine.module).average_over_ranks()
        counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=engine.device)
        engine.module.eval()
        self._examples: list[tuple[Tensor, Tensor, Tensor]] = []  # image, labels, predictions
        share = rank_share(len(self.val))
        for index, (image, labels) in zip(share, load_samples(self.val, share, self.config.data.workers), strict=True):
            poll()
            pixels = normalise(image.to(engine.device), self.encoder.normalisation, engine.dtype)
            with engine.autocast():
                predicted = predict_classes(engine.module, pixels, seg.stride, tuple(labels.shape))
            if index < len(self.val):  # not padding
                counts += count_confusion(labels.to(predicted.device), predicted, num_classes)
                if len(self._examples) < NUM_SHOWN:
                    self._examples.append((image, labels, predicted.cpu()))
        engine.module.train()
        self.counts, self.evaluated = sum_over_ranks(counts).cpu(), True
        return {f"val/{name}": value for name, value in segmentation_scores(self.counts).items()}

    def gather(self, heartbeat: Callable[[], None]) -> dict[str, Tensor]:
        return self.engine.weights(self.engine.module)

    def results(self, rows: list[dict[str, float]], gathered: dict[str, Tensor]) -> dict[str, Any]:
        """Write the segmenter, and return the last evaluation and the best value of each metric."""
        module = self.engine.module
        persistent = module.state_dict().keys()
        buffers = {name: values.cpu().contiguous() for name, values in module.named_buffers() if name in persistent}
        write_segmenter(gathered | buffers, module.encoder, self.config.seg, self.classes, self.folder / "segmenter")
        evaluations = [row for row in rows if "val/miou" in row]
        last = {name: evaluations[-1][f"val/{name}"] for name in METRICS}
        best = {name: max(row[f"val/{name}"] for row in evaluations) for name in METRICS}
        best_row = max(evaluations, key=lambda row: row["val/miou"])
        ious = 100 * intersection_over_union(self.counts.double())
        return self.facts(len(self.classes), self.images) | {
            "pixels": int(self.counts.sum()),
            "last": last | {"step": evaluations[-1]["step"]},
            "best": best | {"step": best_row["step"]},
            "chance": majority_class_scores(self.counts),
            "iou": {name: float(iou) for name, iou in zip(self.classes, ious, strict=True) if iou.isfinite()},
        }

    def figures(self, rows: list[dict[str, float]], results: dict[str, Any]) -> dict[str, Figure]:
        groups = {
            "loss": ["loss/total"],
            "validation, in %": [f"val/{name}" for name in METRICS],
            "learning rate": ["lr"],
        }
        return {
            "curves": curves(rows, groups),
            "overlays": segmentation_grid(self._examples, self.classes),
            "classes": bar_chart(results["iou"], "IoU in %"),
            "confusion": confusion_matrix(self.counts, self.classes),
        }

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
