"""Fine-tuning of a whole encoder on labelled images (docs/evaluation.md; paper, appendix "Fine-tuning").

B images, C classes.
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
from torch import Tensor, nn
from torch.nn import functional as F

from ddae.config import deepspeed as ds_config
from ddae.config.base import flatten
from ddae.config.evaluation import FinetuneConfig
from ddae.data.cache import open_cache
from ddae.data.loader import Batch, Loader
from ddae.data.shards import open_shards
from ddae.distributed.checkpoint_format import Checkpointable
from ddae.distributed.comm import broadcast_from_main, device, is_main, rank, sum_over_ranks, world_size
from ddae.distributed.engine import Engine, start_process_group
from ddae.distributed.preemption import StopSignal
from ddae.errors import UserError
from ddae.eval import baselines
from ddae.eval.augment import Mixer, Policy
from ddae.eval.dataset import ExampleReader, Labels, batches_of_rank, held_out, labels_of
from ddae.eval.figures import confusion_matrix, predictions
from ddae.eval.knn import raw_pixels
from ddae.export.encoder import load_encoder, write_timm
from ddae.method.teacher import MovingAverage
from ddae.models.patches import normalise
from ddae.models.vit import Encoder, LayerNorm
from ddae.report import html as report
from ddae.report.figures import curves
from ddae.trainer import fit
from ddae.training import run_dir
from ddae.training.optimizer import build_layerwise_optimizer
from ddae.training.run import Run
from ddae.training.schedules import warmup_cosine
from ddae.training.tracker import run_id_of


class Classifier(nn.Module):
    """Mean of the patches and a fresh norm, or the cls token and the encoder's norm; then a linear head (BEiT, MAE)."""

    def __init__(self, encoder: Encoder, num_classes: int, pool: str, head_std: float, generator: torch.Generator):
        super().__init__()
        self.encoder, self.pool = encoder, pool
        self.fc_norm = LayerNorm(encoder.shape.width) if pool == "mean" else nn.Identity()
        if pool == "mean":
            encoder.norm = nn.Identity()  # type: ignore[assignment]  # no token is normed but their mean
        self.head = nn.Linear(encoder.shape.width, num_classes)
        nn.init.normal_(self.head.weight, std=head_std, generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, pixels: Tensor, targets: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] -> logits [B, C]; with targets [B, C], whose rows add up to 1, the mean cross-entropy."""
        (tokens,) = self.encoder(pixels, layers=(self.encoder.shape.depth,))
        pooled = tokens[:, 1:].mean(1) if self.pool == "mean" else self.encoder.norm(tokens[:, 0])
        logits = self.head(self.fc_norm(pooled))
        return logits if targets is None else F.cross_entropy(logits.float(), targets)


logger = logging.getLogger(__name__)
SHOWN = 18  # images with their predictions
WHAT = "fine-tuned top-1"  # in words
UNTRAINED = "untrained weights"  # stands for the encoder's path
RIGHT = "val_right.txt"  # 1 for each validation image that is classified right at the end, else 0


def finetune(config: FinetuneConfig, stop: StopSignal | None = None) -> None:
    """Train to the end, or from the newest checkpoint on; then write results, pictures and the classifier.

    With tune.untrained the same architecture is first trained from initial weights by the same recipe, in the folder
    untrained/, unless data.cache holds its result; the results then compare with it. SystemExit with code 75 where a
    signal stops the run before its end. UserError where the encoder or the shards cannot be read, shards have no
    classes, or those of the two splits do not fit.
    """
    stop = stop or StopSignal()
    encoder = load_encoder(config.encoder, config.image_size, config.normalisation or None)
    config = config.resolved_for(encoder.shape.width)
    run_dir.check(config)
    untrained = None
    if config.tune.untrained:
        start_process_group(config.train.watchdog_timeout_s + 60)  # the ranks look together for what is remembered
        untrained = _untrained(config, baselines.untrained_encoder(encoder, config.train.seed), stop)
    _fit(config, encoder, untrained, stop)
    if untrained is not None and is_main():
        _compare_later(Path(config.folder), untrained)


def _fit(config: FinetuneConfig, encoder: Encoder, untrained: Tensor | None, stop: StopSignal) -> None:
    """untrained: bool [N], which validation images an untrained encoder got right by the same recipe."""
    resolved = ds_config.resolve(ds_config.load(config.ds_config), config, world_size())
    run = Run(config, stop, resolved.json, resolved.micro_batch)
    size, normalisation = encoder.shape.image_size, encoder.normalisation
    policy = Policy(config.augment.policy, size, normalisation) if config.augment.policy else None
    loader = Loader(config.data, size, config.train.seed, run.rank_batch, device(), policy)
    val = ExampleReader(held_out(config.data.train, config.val), "val", size, open_cache(config.data))
    if (config.augment.mixup or config.augment.cutmix) and resolved.micro_batch % 2:
        raise UserError(f"a micro-batch of {resolved.micro_batch} cannot be mixed in pairs: choose an even one")
    task = Finetune(config, encoder, labels_of(loader, val), val, untrained)
    fit(task, run, loader)


def _untrained(config: FinetuneConfig, encoder: Encoder, stop: StopSignal) -> Tensor:
    """Which validation images an untrained encoder gets right by this recipe: bool [N], remembered or trained now."""
    val = open_shards(held_out(config.data.train, config.val), open_cache(config.data), "val")
    train = open_shards(config.data.train, open_cache(config.data), "train")
    recipe = {key: value for key, value in flatten(config.to_dict()).items() if key not in config.FREE_ON_RESUME}
    protocol = {"task": "finetune", "recipe": recipe, "data": [train.fingerprint, val.fingerprint]}
    if known := broadcast_from_main(lambda: baselines.recall(config.data.cache, encoder, protocol)):
        return known.right
    folder = Path(config.folder) / "untrained"
    logger.info("%s: training untrained weights by the same recipe, to compare with", folder)
    alone = replace(
        config,
        run_dir=str(folder),
        encoder=UNTRAINED,
        train=replace(config.train, report=False),
        tune=replace(config.tune, untrained=False),
    )
    _fit(alone, deepcopy(encoder), None, stop)
    gc.collect()

    def result() -> Tensor:
        right = _read_right(folder)
        if len(right) != len(val):
            raise UserError(f"{folder} was measured on {len(right)} validation images, not {len(val)}: delete it")
        measured = baselines.Measured("fine-tuned", 100 * float(right.float().mean()), right)
        baselines.remember(config.data.cache, encoder, protocol, measured)
        return right

    return broadcast_from_main(result)


def _read_right(folder: Path) -> Tensor:
    return torch.tensor([digit == "1" for digit in (folder / RIGHT).read_text()])


def _compare_later(folder: Path, untrained: Tensor) -> None:
    """Compare a run that was complete before its untrained counterpart; its results, page and card are rewritten."""
    results = json.loads((folder / "results.json").read_text())
    if results.get("untrained") is not None or "raw_pixels" not in results:
        return
    compared = baselines.compare(_read_right(folder), untrained, results["raw_pixels"], results["chance"])
    results |= compared.results(WHAT)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    report.add_evaluation(folder, {})
    logger.info(results["verdict"])


class Finetune:
    """What fit() trains and measures."""

    schedule = staticmethod(warmup_cosine)
    engine: Engine
    optimizable: Engine
    description: str

    def __init__(
        self,
        config: FinetuneConfig,
        encoder: Encoder,
        labels: Labels,
        val: ExampleReader,
        untrained: Tensor | None = None,
    ):
        self.untrained = untrained  # bool [N]: which validation images an untrained encoder got right
        self.config, self.encoder, self.labels, self.val = config, encoder, labels, val
        self.evaluate_every = config.tune.evaluate_every
        self.folder = Path(config.folder)
        self.parent = run_id_of(Path(config.encoder))
        self.average: MovingAverage | None = None
        self._mixer = Mixer(config.augment, self.labels.count, device())
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None  # images, labels and logits of the last evaluation
        self._confusion = torch.zeros(self.labels.count, self.labels.count)
        self._right = torch.zeros(0)  # bool [N]: of the validation images

    def build(self, ds_json: dict[str, Any]) -> dict[str, Checkpointable]:
        tune, encoder = self.config.tune, self.encoder
        encoder.drop_paths(tune.drop_path)
        encoder.learn_positions()
        encoder.activation_checkpointing = self.config.engine.activation_checkpointing
        generator = torch.Generator().manual_seed(self.config.train.seed)
        module = Classifier(encoder, self.labels.count, tune.pool, tune.head_std, generator)
        module.train().requires_grad_(True)
        copy = deepcopy(module) if tune.ema else None
        assert tune.layer_decay is not None
        optimizer = build_layerwise_optimizer(module, encoder.shape.depth, tune.layer_decay, self.config.optim)
        self.engine = Engine(module, optimizer, ds_json)
        self.optimizable, self.description = self.engine, f"{self.config.engine.precision}, ZeRO {self.engine.stage}"
        parts: dict[str, Checkpointable] = {"engine": self.engine}
        if copy is not None:
            masters = self.engine.masters(self.engine.module)
            copy = copy.to(self.engine.device, self.engine.dtype)
            parts["average"] = self.average = MovingAverage(copy, masters, self.engine.sharded)
        return parts

    def loss(self, batch: Batch, seed: int) -> Tensor:
        """Cross-entropy with the soft targets of mixed, erased images."""
        pixels = normalise(batch.images, self.encoder.normalisation, torch.float32)
        pixels, targets = self._mixer(pixels, self.labels.numbers[batch.samples.cpu()].to(pixels.device), seed)
        return self.engine(pixels.to(self.engine.dtype), targets)

    def after_step(self, applied: Tensor) -> None:
        if self.average is not None:
            self.average.update(self.config.tune.ema, applied)

    def evaluate(self, poll: Callable[[], None]) -> dict[str, float]:
        """Top-1 and top-5 in per cent and the cross-entropy, of the weights and of their average, if there is one."""
        modules = {"": self.engine.module} | ({"ema_": self.average.module} if self.average is not None else {})
        sums = {name: torch.zeros(4, device=self.engine.device) for name in modules}  # images, right, near, loss
        confusion = torch.zeros_like(self._confusion, device=self.engine.device)
        self.engine.module.eval()
        micro = self.config.data.batch_size // world_size()
        right = torch.zeros(len(self.val), device=self.engine.device)
        place, self._seen = rank(), None
        with torch.no_grad():
            for examples in batches_of_rank(self.val, min(micro, 128), self.config.data.workers, self.engine.device):
                poll()
                pixels = normalise(examples.images, self.encoder.normalisation, self.engine.dtype)
                counted = examples.labels >= 0
                for name, module in modules.items():
                    with self.engine.autocast():
                        logits = module(pixels).float()
                    sums[name] += scores(logits[counted], examples.labels[counted])
                    if name == "":
                        pairs = examples.labels[counted] * self.labels.count + logits[counted].argmax(1)
                        confusion += pairs.bincount(minlength=self.labels.count**2).view_as(confusion)
                        places = place + torch.arange(len(pairs), device=right.device) * world_size()
                        right[places] = (logits.argmax(1) == examples.labels)[counted].float()
                        place += len(pairs) * world_size()
                        if self._seen is None:
                            shown = examples.images, examples.labels, logits
                            self._seen = tuple(each[counted].cpu() for each in shown)  # type: ignore[assignment]
        self.engine.module.train()
        self._confusion, self._right = sum_over_ranks(confusion).cpu(), sum_over_ranks(right).cpu() > 0
        row = {}
        for name, values in sums.items():
            count, right, near, loss = sum_over_ranks(values).tolist()
            row |= {f"val/{name}top1": 100 * right / count, f"val/{name}top5": 100 * near / count}
            row[f"val/{name}loss"] = loss / count
        return row

    def finish(self, run: Run, heartbeat: Callable[[], None]) -> list[Path]:
        weights = self.engine.weights(self.engine.module)
        if self._seen is None:  # evaluated by an earlier start
            self.evaluate(heartbeat)
        where = held_out(self.config.data.train, self.config.val)
        raw = raw_pixels(self.config.data, where, self.encoder.shape.image_size, heartbeat)
        if not is_main():
            return []
        assert self._seen is not None
        rows = run.rows()
        results = self._results(rows, raw)
        (self.folder / RIGHT).write_text("".join(map(str, self._right.int().tolist())))
        (self.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        self._export({name: values.contiguous() for name, values in weights.items()})
        if not self.config.train.report:
            return []
        tops, top_1 = [name for name in rows[-1] if name.endswith("top1")], "validation top-1 in %"
        images, labels, logits = self._seen
        some = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:SHOWN]
        drawn = {
            "curves": curves(
                *(rows, {"loss": ["loss/total"], top_1: tops, "lr": ["lr"]}, ""),
                {top_1: baselines.lines(results)},
            ),
            "confusion": confusion_matrix(self._confusion, self.labels.names),
            "examples": predictions(images[some], labels[some], logits[some], self.labels.names),
        }
        return report.add_evaluation(self.folder, drawn)

    def summary(self) -> str:
        """The results in words, and where the classifier is."""
        results = json.loads((self.folder / "results.json").read_text())
        last, best = results["last"], results["best"]
        lines = [
            baselines.first_line(results),
            f"top-1 {last['top1']:.2f} % after the last epoch, {best['top1']:.2f} % after epoch {best['epoch']}, "
            "the best on these images",
        ]
        if results.get("untrained") is None and self.config.encoder != UNTRAINED:
            lines.append("--tune.untrained trains untrained weights by the same recipe, to compare with")
        if "ema_top1" in last:
            lines.append(f"averaged weights: {last['ema_top1']:.2f} %, {best['ema_top1']:.2f} % at best")
        return "\n".join([*lines, f"classifier:           {self.folder / 'classifier'}"])

    def _export(self, weights: dict[str, Tensor]) -> None:
        """The classifier as timm loads it."""
        shape, normalisation = self.encoder.shape, self.encoder.normalisation
        encoder = Encoder(shape)
        encoder.normalisation = normalisation
        ours = {
            name.removeprefix("encoder."): values for name, values in weights.items() if name.startswith("encoder.")
        }
        encoder.load_state_dict(ours, strict=False)
        head = {name: values for name, values in weights.items() if not name.startswith("encoder.")}
        if self.config.tune.pool == "mean":
            encoder.norm = nn.Identity()  # type: ignore[assignment]
        pool = {"mean": "avg", "cls": "token"}[self.config.tune.pool]
        write_timm(encoder, self.folder / "classifier", head, pool, self.labels.names)

    def _results(self, rows: list[dict[str, float]], raw: float) -> dict[str, Any]:
        """Of the last evaluation, and the best of every number; raw: accuracy of raw pixels."""
        chance = baselines.chance(self.labels.numbers, self.val.labels)
        measured = [row for row in rows if "val/top1" in row]
        epoch = self.config.data.batch_size / len(self.labels.numbers)
        last = {name.removeprefix("val/"): value for name, value in measured[-1].items() if name.startswith("val/")}
        finest = max(measured, key=lambda row: row["val/top1"])
        best = {name: max(row[f"val/{name}"] for row in measured) for name in last if "top" in name}
        return {
            "task": "finetune",
            "encoder": self.config.encoder,
            "recipe": self.config.preset,
            "data": self.config.to_dict()["data"]["train"],
            "classes": self.labels.count,
            "images": {"train": len(self.labels.numbers), "val": len(self.val)},
            **baselines.compare(self._right, self.untrained, raw, chance).results(WHAT),
            "last": last | {"epoch": round(measured[-1]["step"] * epoch, 2)},
            "best": best | {"epoch": round(finest["step"] * epoch, 2)},
        }


def scores(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, C], int64 [B] -> float32 [4]: images, those whose class is the likeliest, or among the five likeliest, and
    the sum of their cross-entropies."""
    near = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    counts = [torch.tensor(float(len(labels)), device=logits.device), near[:, 0].sum(), near.sum(), loss]
    return torch.stack([each.float() for each in counts])
