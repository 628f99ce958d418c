"""Fine-tuning of a whole encoder on labelled images (docs/evaluation.md; paper, appendix "Fine-tuning").

B: batch size, N: number of validation images, C: number of classes, S: image side in pixels.
"""

import gc
import json
import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from ddae import atomic
from ddae.config.base import flatten
from ddae.config.evaluation import FinetuneConfig
from ddae.data.cache import open_cache
from ddae.data.loader import Batch, Loader
from ddae.data.shards import open_shards
from ddae.distributed.checkpoint_format import Checkpointable
from ddae.distributed.comm import broadcast_from_main, device, is_main, sum_over_ranks, world_size
from ddae.distributed.engine import Engine, start_process_group
from ddae.distributed.preemption import StopSignal
from ddae.errors import UserError
from ddae.eval import baselines
from ddae.eval.augment import BatchAugment, RandAugment
from ddae.eval.dataset import ExampleReader, Labels, batches_of_rank, training_labels, val_location, validation_reader
from ddae.eval.figures import confusion_matrix, prediction_grid
from ddae.eval.metrics import count_confusion, sum_metrics
from ddae.eval.task import ClassificationTask, deepspeed_run
from ddae.export.encoder import load_encoder
from ddae.export.formats import write_timm
from ddae.method.teacher import MovingAverage
from ddae.models.patches import normalise
from ddae.models.vit import Encoder, LayerNorm
from ddae.report import html as report
from ddae.report.figures import curves
from ddae.trainer import fit
from ddae.training import run_dir
from ddae.training.optimizer import build_layerwise_optimizer

MAX_BATCH = 128  # validation images of a rank at a time
EXAMPLES_SHOWN = 18  # images in the figure of predictions
METRIC = "fine-tuned top-1"  # name of the accuracy in the verdict
UNTRAINED = "untrained weights"  # in place of the encoder's path in the config of an untrained encoder's run
CORRECT_FILE = "val_right.txt"  # for each validation image 1 if the final weights classify it correctly, else 0
logger = logging.getLogger(__name__)


def finetune(config: FinetuneConfig, stop: StopSignal | None = None) -> None:
    """Fine-tune to the end, resuming from the newest checkpoint; then write results, figures and the classifier.

    With tune.untrained the same architecture is first trained from initial weights by the same recipe, in the folder
    untrained/, unless its result is cached in data.cache; the results then include it as a baseline. Raise SystemExit
    with code 75 if a signal stops the run, and UserError if the encoder or the shards cannot be read, the shards have
    no classes, or the classes of the two splits differ.
    """
    encoder = load_encoder(config.encoder, config.image_size, config.normalisation or None)
    config = config.resolved_for(encoder.shape.width)
    run_dir.check(config)
    untrained = None
    if config.tune.untrained:
        start_process_group(config.train.watchdog_timeout_s + 60)  # rank 0 broadcasts the cached result
        initial = baselines.untrained_encoder(encoder, config.train.seed)
        untrained = _evaluate_untrained(config, initial, stop)
    _finetune(config, encoder, untrained, stop)
    if untrained is not None and is_main():
        _add_untrained_baseline(Path(config.folder), untrained)


def _finetune(config: FinetuneConfig, encoder: Encoder, untrained: Tensor | None, stop: StopSignal | None) -> None:
    """Run one fine-tuning; untrained: bool [N], which validation images the untrained encoder classifies correctly."""
    run, size = deepspeed_run(config, stop), encoder.shape.image_size
    policy, micro_batch = config.augment.policy, run.rank_batch.micro_batch
    augment = RandAugment(policy, size, encoder.normalisation) if policy else None
    loader = Loader(config.data, size, config.train.seed, run.rank_batch, device(), augment)
    val = validation_reader(config, size)
    if (config.augment.mixup or config.augment.cutmix) and micro_batch % 2:
        raise UserError(
            f"the micro-batch has {micro_batch} images; mixup and CutMix expect an even number. "
            "Choose another --data.batch_size, or pass --augment.mixup 0 --augment.cutmix 0."
        )
    fit(Finetune(config, encoder, training_labels(loader, val), val, untrained), run, loader)


def _evaluate_untrained(config: FinetuneConfig, encoder: Encoder, stop: StopSignal | None) -> Tensor:
    """Return which validation images an untrained encoder classifies correctly after this recipe: bool [N].

    The result is read from the cache, or the encoder is trained now.
    """
    val = open_shards(val_location(config.data.train, config.val), open_cache(config.data), "val")
    train = open_shards(config.data.train, open_cache(config.data), "train")
    recipe = {key: value for key, value in flatten(config.to_dict()).items() if key not in config.FREE_ON_RESUME}
    protocol = {"task": "finetune", "recipe": recipe, "data": [train.fingerprint, val.fingerprint]}
    cached = broadcast_from_main(lambda: baselines.load_cached(config.data.cache, encoder, protocol))
    if cached is not None:
        return cached.correct
    folder = Path(config.folder) / "untrained"
    logger.info("%s: training untrained weights by the same recipe, as a baseline", folder)
    train_config, tune = replace(config.train, report=False), replace(config.tune, untrained=False)
    baseline_config = replace(config, run_dir=str(folder), encoder=UNTRAINED, train=train_config, tune=tune)
    _finetune(baseline_config, deepcopy(encoder), None, stop)
    gc.collect()

    def read_result() -> Tensor:
        correct = _read_correct(folder)
        if len(correct) != len(val):
            raise UserError(
                f"{folder} holds results on {len(correct)} validation images; expected {len(val)}. "
                "Delete the folder and run the same command again."
            )
        result = baselines.FeatureAccuracy("fine-tuned", 100 * float(correct.float().mean()), correct)
        baselines.store_cached(config.data.cache, encoder, protocol, result)
        return correct

    return broadcast_from_main(read_result)


def _read_correct(folder: Path) -> Tensor:
    """Return which validation images a finished run classifies correctly: bool [N]."""
    return torch.tensor([digit == "1" for digit in (folder / CORRECT_FILE).read_text()])


def _add_untrained_baseline(folder: Path, untrained: Tensor) -> None:
    """Add the baseline to the results, page and model card of a run that was finished without it.

    untrained: bool [N], which validation images the untrained encoder classifies correctly.
    """
    results = json.loads((folder / "results.json").read_text())
    if results.get("untrained") is not None or "raw_pixels" not in results:
        return
    comparison = baselines.compare(_read_correct(folder), untrained, results["raw_pixels"], results["chance"])
    results |= comparison.results(METRIC, baselines.baseline_name(Path(results["encoder"])))
    atomic.write_json(folder / "results.json", results)
    report.add_evaluation(folder, {})
    logger.info(results["verdict"])


class Classifier(nn.Module):
    """Encoder and linear head (BEiT, MAE).

    Pooling "mean": mean of the patch tokens, then a new LayerNorm. "cls": cls token after the encoder's norm.
    """

    def __init__(self, encoder: Encoder, num_classes: int, pool: str, head_std: float, generator: torch.Generator):
        super().__init__()
        self.encoder, self.pool = encoder, pool
        self.fc_norm = LayerNorm(encoder.shape.width) if pool == "mean" else nn.Identity()
        if pool == "mean":
            encoder.norm = nn.Identity()  # type: ignore[assignment]  # fc_norm replaces it
        self.head = nn.Linear(encoder.shape.width, num_classes)
        nn.init.normal_(self.head.weight, std=head_std, generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, pixels: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits [B, C] of pixels [B, 3, S, S]; with soft targets [B, C] their mean cross-entropy []."""
        (tokens,) = self.encoder(pixels, layers=(self.encoder.shape.depth,))
        pooled = tokens[:, 1:].mean(1) if self.pool == "mean" else self.encoder.norm(tokens[:, 0])
        logits = self.head(self.fc_norm(pooled))
        return logits if targets is None else F.cross_entropy(logits.float(), targets)


class Finetune(ClassificationTask):
    """The task that fit() trains and evaluates."""

    def __init__(
        self,
        config: FinetuneConfig,
        encoder: Encoder,
        labels: Labels,
        val: ExampleReader,
        untrained: Tensor | None = None,
    ):
        """untrained: bool [N], which validation images the untrained encoder classifies correctly."""
        super().__init__(config, encoder, labels, val, config.tune.evaluate_every)
        self.untrained, self.average = untrained, None
        self._augment = BatchAugment(config.augment, labels.num_classes, device())

    def build(self, ds_json: dict[str, Any]) -> dict[str, Checkpointable]:
        tune, encoder = self.config.tune, self.encoder
        encoder.set_drop_path(tune.drop_path)
        encoder.make_positions_learnable()
        encoder.activation_checkpointing = self.config.engine.activation_checkpointing
        generator = torch.Generator().manual_seed(self.config.train.seed)
        module = Classifier(encoder, self.labels.num_classes, tune.pool, tune.head_std, generator)
        module.train().requires_grad_(True)
        copy = deepcopy(module) if tune.ema else None
        optimizer = build_layerwise_optimizer(module, encoder.shape.depth, tune.layer_decay, self.config.optim)
        self.engine = Engine(module, optimizer, ds_json)
        self.optimizable, self.description = self.engine, f"{self.config.engine.precision}, ZeRO {self.engine.stage}"
        state: dict[str, Checkpointable] = {"engine": self.engine}
        if copy is not None:
            masters = self.engine.masters(self.engine.module)
            copy = copy.to(self.engine.device, self.engine.dtype)
            state["average"] = self.average = MovingAverage(copy, masters, self.engine.sharded)
        return state

    def loss(self, batch: Batch, seed: int) -> Tensor:
        """Return the mean cross-entropy [] of augmented images with soft targets."""
        pixels = normalise(batch.images, self.encoder.normalisation, torch.float32)
        labels = self.labels.targets[batch.samples.cpu()].to(pixels.device)
        pixels, targets = self._augment(pixels, labels, seed)
        return self.engine(pixels.to(self.engine.dtype), targets)

    def after_step(self, applied: Tensor) -> None:
        if self.average is not None:
            self.average.update(self.config.tune.ema, applied)

    def evaluate(self, poll: Callable[[], None]) -> dict[str, float]:
        """Return top-1 and top-5 accuracy in per cent and cross-entropy, of the weights and of their average."""
        engine, num_classes = self.engine, self.labels.num_classes
        modules = {"": engine.module} | ({"ema_": self.average.module} if self.average is not None else {})
        sums = {prefix: torch.zeros(4, device=engine.device) for prefix in modules}
        counts = torch.zeros(num_classes, num_classes, device=engine.device)
        correct, examples = torch.zeros(len(self.val), device=engine.device), []
        engine.module.eval()
        batch_size = min(self.config.data.batch_size // world_size(), MAX_BATCH)
        with torch.no_grad():
            for batch in batches_of_rank(self.val, batch_size, self.config.data.workers, engine.device):
                poll()
                pixels = normalise(batch.images, self.encoder.normalisation, engine.dtype)
                valid = batch.labels >= 0
                labels, logits = batch.labels[valid], {}
                for prefix, module in modules.items():
                    with engine.autocast():
                        logits[prefix] = module(pixels).float()[valid]
                    sums[prefix] += sum_metrics(logits[prefix], labels)
                predicted = logits[""].argmax(1)
                counts += count_confusion(labels, predicted, num_classes)
                correct[batch.indices[valid]] = (predicted == labels).float()
                examples = examples or [each.cpu() for each in (batch.images[valid], labels, logits[""])]
        engine.module.train()
        self.counts, self._correct = sum_over_ranks(counts).cpu(), sum_over_ranks(correct).cpu() > 0
        self._examples, self.evaluated = examples, True  # images, labels and logits of the first batch
        row = {}
        for prefix, values in sums.items():
            count, top1, top5, loss = sum_over_ranks(values).tolist()
            row |= {f"val/{prefix}top1": 100 * top1 / count, f"val/{prefix}top5": 100 * top5 / count}
            row[f"val/{prefix}loss"] = loss / count
        return row

    def gather(self, heartbeat: Callable[[], None]) -> tuple[dict[str, Tensor], float]:
        return self.engine.weights(self.engine.module), self.raw_pixel_accuracy(heartbeat)

    def results(self, rows: list[dict[str, float]], gathered: tuple[dict[str, Tensor], float]) -> dict[str, Any]:
        """Return the comparison with baselines, the last evaluation, and the best value of each metric."""
        weights, raw = gathered
        self._export(weights)
        (self.folder / CORRECT_FILE).write_text("".join(map(str, self._correct.int().tolist())))
        evaluations = [row for row in rows if "val/top1" in row]
        epochs_per_step = self.config.data.batch_size / len(self.labels.targets)
        last = {name.removeprefix("val/"): value for name, value in evaluations[-1].items() if name.startswith("val/")}
        best_row = max(evaluations, key=lambda row: row["val/top1"])
        best = {name: max(row[f"val/{name}"] for row in evaluations) for name in last if "top" in name}
        return self.compare(self._correct, self.untrained, raw, METRIC) | {
            "last": last | {"epoch": round(evaluations[-1]["step"] * epochs_per_step, 2)},
            "best": best | {"epoch": round(best_row["step"] * epochs_per_step, 2)},
        }

    def figures(self, rows: list[dict[str, float]], results: dict[str, Any]) -> dict[str, Figure]:
        accuracies, title = [name for name in rows[-1] if name.endswith("top1")], "validation top-1 in %"
        shown = torch.randperm(len(self._examples[0]), generator=torch.Generator().manual_seed(0))[:EXAMPLES_SHOWN]
        images, labels, logits = (each[shown] for each in self._examples)
        panels = {"loss": ["loss/total"], title: accuracies, "learning rate": ["lr"]}
        return {
            "curves": curves(rows, panels, {title: baselines.by_label(results)}),
            "confusion": confusion_matrix(self.counts, self.labels.names),
            "examples": prediction_grid(images, labels, logits, self.labels.names),
        }

    def summary(self) -> str:
        """Return the results as text, and where the classifier is."""
        results = json.loads((self.folder / "results.json").read_text())
        last, best = results["last"], results["best"]
        after_best = f"best on these images: {best['top1']:.2f} % after epoch {best['epoch']}"
        lines = [baselines.verdict_of(results), f"top-1 {last['top1']:.2f} % after the last epoch; {after_best}"]
        if results.get("untrained") is None and self.config.encoder != UNTRAINED:
            lines.append("Pass --tune.untrained to train untrained weights by the same recipe, as a baseline.")
        if "ema_top1" in last:
            last_average, best_average = (f"{each['ema_top1']:.2f} %" for each in (last, best))
            lines.append(f"averaged weights: {last_average} after the last epoch, best {best_average}")
        return "\n".join([*lines, f"classifier:           {self.folder / 'classifier'}"])

    def _export(self, weights: dict[str, Tensor]) -> None:
        """Write the classifier in timm's format."""
        encoder = Encoder(self.encoder.shape)
        encoder.normalisation = self.encoder.normalisation
        head = {name: each for name, each in weights.items() if not name.startswith("encoder.")}
        encoder.load_state_dict({name.removeprefix("encoder."): each for name, each in weights.items()}, strict=False)
        if self.config.tune.pool == "mean":
            encoder.norm = nn.Identity()  # type: ignore[assignment]
        pool = {"mean": "avg", "cls": "token"}[self.config.tune.pool]
        write_timm(encoder, self.folder / "classifier", head, pool, self.labels.names)
