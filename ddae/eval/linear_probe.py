"""Linear probing of a frozen encoder: heads on several blocks and both poolings, trained in one pass over the data
(docs/evaluation.md; paper, appendix "Linear probing").

The same heads are trained on an untrained encoder of the same architecture. A part of the training images is held out
to select a head. B: batch size, H: number of heads of all encoders, N: number of images, C: number of classes, D:
encoder width.
"""

import itertools
import json
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from matplotlib.figure import Figure
from timm.optim.lars import Lars
from torch import Tensor, nn
from torch.nn import functional as F

from ddae.config.evaluation import ProbeConfig
from ddae.data.backend import Decoding
from ddae.data.cache import open_cache
from ddae.data.loader import Batch, Loader
from ddae.distributed.checkpoint_format import Checkpointable, TensorShard
from ddae.distributed.comm import device, mean_over_ranks, rank, sum_over_ranks, world_size
from ddae.distributed.preemption import StopSignal
from ddae.errors import UserError
from ddae.eval import baselines
from ddae.eval.dataset import ExampleReader, Labels, batches_of_rank, training_labels, validation_reader
from ddae.eval.features import BATCH_SIZE, map_images, pooled_features
from ddae.eval.figures import confusion_matrix, metric_by_block
from ddae.eval.metrics import count_confusion
from ddae.eval.task import ClassificationTask
from ddae.export.encoder import load_encoder
from ddae.models.patches import normalise
from ddae.models.vit import Encoder
from ddae.report.figures import curves
from ddae.trainer import fit
from ddae.training.run import Run

BATCH_NORM_EPS = 1e-6
BATCH_NORM_MOMENTUM = 0.1  # weight of a micro-batch in the running mean and variance
TRUST_COEFFICIENT = 0.001  # LARS's
IGNORED = -100  # class of the training images that are held out


def linear_probe(config: ProbeConfig, stop: StopSignal | None = None) -> None:
    """Train all heads to the end, resuming from the newest checkpoint; then write results and figures.

    Raise SystemExit with code 75 if a signal stops the run, and UserError if the encoder or the shards cannot be read,
    the shards have no classes, or the classes of the two splits differ.
    """
    encoder = load_encoder(config.encoder, config.image_size, config.normalisation or None)
    config = config.resolved_for(encoder.shape.depth)
    batch_size = config.data.batch_size
    micro_batch = min(config.probe.micro_batch, batch_size // world_size())
    if micro_batch == 0 or batch_size % (micro_batch * world_size()):
        raise UserError(
            f"data.batch_size {batch_size} is not divisible by {world_size()} ranks x probe.micro_batch {micro_batch}. "
            "Change one of them."
        )
    if micro_batch == 1:
        raise UserError(
            "the heads' batch norm needs at least two images, but a micro-batch has one. "
            "Raise --probe.micro_batch or --data.batch_size, or train on fewer ranks."
        )
    run, size = Run(config, stop, {}, micro_batch), encoder.shape.image_size
    loader_class = IndexLoader if config.probe.cache else Loader
    loader = loader_class(config.data, size, config.train.seed, run.rank_batch, device())
    val = validation_reader(config, size)
    task = LinearProbe(config, encoder, training_labels(loader, val), val, run.rank_batch.grad_accum_steps)
    fit(task, run, loader)


class Heads(nn.Module):
    """H linear classifiers, each after a batch norm without affine parameters. Their initial weights are equal."""

    def __init__(self, count: int, width: int, num_classes: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.empty(num_classes, width).normal_(std=0.01, generator=generator)
        self.weights = nn.ParameterList([nn.Parameter(weight.clone()) for _ in range(count)])
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(num_classes)) for _ in range(count)])
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("mean", torch.zeros(count * width))
        self.register_buffer("var", torch.ones(count * width))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [H, B, C] of features float32 [H, B, D]."""
        flat = features.transpose(0, 1).flatten(1)  # each feature of each head is normalised over the batch
        momentum, eps = BATCH_NORM_MOMENTUM, BATCH_NORM_EPS
        flat = F.batch_norm(flat, self.mean, self.var, training=self.training, momentum=momentum, eps=eps)
        normalised = flat.unflatten(1, (len(self.weights), -1)).transpose(0, 1)
        return torch.baddbmm(torch.stack(list(self.biases))[:, None], normalised, torch.stack(list(self.weights)).mT)


class HeadsOptimizer:
    """LARS on the heads; gradients, and the norm's running statistics, are means over ranks and micro-batches."""

    sharded = False  # every rank has all of it

    def __init__(self, heads: Heads, momentum: float, weight_decay: float, grad_accum_steps: int, device: torch.device):
        self.module, self.device = heads.to(device), device
        self._grad_accum_steps = self._remaining = grad_accum_steps  # micro-batches of a step
        self._applied = torch.ones((), device=device)
        groups = [
            {"params": list(heads.weights), "always_adapt": True},
            {"params": list(heads.biases), "always_adapt": False, "weight_decay": 0.0},
        ]
        options: dict[str, Any] = {"momentum": momentum, "weight_decay": weight_decay, "trust_coeff": TRUST_COEFFICIENT}
        self.optimizer = Lars(groups, lr=0.0, **options)
        for parameter in heads.parameters():
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self._statistics = [each.clone() for each in (heads.mean, heads.var)]  # after the last applied step

    def backward(self, loss: Tensor) -> None:
        """Compute gradients of one micro-batch, whose loss [] is its share of the step's."""
        loss.backward()

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """End a micro-batch; after the last one of a step update the heads.

        Return float32 [], on the device: 1, or 0 if a gradient was non-finite on any rank and nothing has changed.
        """
        self._remaining -= 1
        if self._remaining:
            return self._applied
        self._remaining = self._grad_accum_steps
        heads, statistics = self.module, [self.module.mean, self.module.var]
        parameters = [parameter for parameter in heads.parameters() if parameter.grad is not None]
        averaged = [*(parameter.grad for parameter in parameters), *statistics]
        together = mean_over_ranks(torch.cat([each.flatten() for each in averaged]))
        for each, values in zip(averaged, together.split([each.numel() for each in averaged]), strict=True):
            each.copy_(values.view_as(each))
        applied = together.isfinite().all()
        updated = [*parameters, *(self.optimizer.state[each]["momentum_buffer"] for each in parameters)]
        before = [each.clone() for each in updated]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for each, old in zip([*updated, *statistics], [*before, *self._statistics], strict=True):
            each.copy_(torch.where(applied, each, old))
        self._statistics = [each.clone() for each in statistics]
        self.optimizer.zero_grad()
        self._applied = applied.float()
        return self._applied

    def local_shards(self) -> dict[str, list[TensorShard]]:
        """Return weights with running statistics, and momenta: views."""
        heads = self.module
        momenta = {name: self.optimizer.state[each]["momentum_buffer"] for name, each in heads.named_parameters()}
        tensors = {"weight": heads.state_dict(), "momentum": momenta}
        return {kind: [TensorShard(n, 0, t.detach().view(-1)) for n, t in of.items()] for kind, of in tensors.items()}

    def sync_model_weights(self) -> None:
        """Take over restored statistics; the heads are their own master weights."""
        self._statistics = [self.module.mean.clone(), self.module.var.clone()]


class IndexLoader(Loader):
    """The same sequence of samples without images, for training on cached features."""

    def select_backend(self, previous: Decoding | None = None) -> None:
        self.backend = "cache"

    def _batches(self, step: int) -> Generator[Batch, None, None]:
        for number in itertools.count(step * self.rank_batch.grad_accum_steps):
            epochs, samples = self.order.samples(self.rank_batch.positions(number))
            yield Batch(torch.empty(0), self.order.seeds(epochs, samples), samples)


class LinearProbe(ClassificationTask):
    """The task that fit() trains and evaluates."""

    def __init__(
        self, config: ProbeConfig, encoder: Encoder, labels: Labels, val: ExampleReader, grad_accum_steps: int
    ):
        super().__init__(config, encoder.to(device()), labels, val, config.probe.evaluate_every)
        self.encoders = [self.encoder]
        if config.probe.untrained:
            self.encoders.append(baselines.untrained_encoder(encoder, config.train.seed).to(device()))
        self.names = [f"block {layer} {pool}" for layer in config.probe.layers for pool in ("cls", "mean")]
        self.is_selection = baselines.selection_mask(len(labels.targets))  # bool [N]: held out to select a head
        self._train_targets = labels.targets.masked_fill(self.is_selection, IGNORED)
        self._grad_accum_steps = grad_accum_steps
        self._feature_cache: dict[str, Tensor] = {}  # by split, with probe.cache: float32 [N, H, D]
        self._autocast = config.engine.precision != "fp32" and device().type == "cuda"

    def build(self, ds_json: dict[str, Any]) -> dict[str, Checkpointable]:
        optim, seed = self.config.optim, self.config.train.seed
        count = len(self.encoders) * len(self.names)
        self.heads = Heads(count, self.encoder.shape.width, self.labels.num_classes, seed)
        momentum = self.config.probe.momentum
        self.optimizable = HeadsOptimizer(self.heads, momentum, optim.weight_decay, self._grad_accum_steps, device())
        self.description = f"{count} heads on features in {'bf16' if self._autocast else 'fp32'}"
        return {"heads": self.optimizable}

    def loss(self, batch: Batch, seed: int) -> Tensor:
        """Return the sum [] of all heads' mean cross-entropies; each head's gradient depends on its own loss alone."""
        if self.config.probe.cache:
            features = self._cached_features("train")[batch.samples].to(device())
        else:
            features = self.features(batch.images)
        targets = self._train_targets[batch.samples.cpu()].to(device())
        logits = self.heads(features.transpose(0, 1))
        count = (targets != IGNORED).sum().clamp(min=1)
        losses = (F.cross_entropy(each, targets, ignore_index=IGNORED, reduction="sum") for each in logits)
        return sum(losses, torch.zeros((), device=device())) / count

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the heads' inputs, float32 [B, H, D], of images uint8 [B, 3, S, S]; the untrained encoder's last.

        The last block's tokens are normalised by the encoder's norm, earlier blocks' by a LayerNorm without affine
        parameters (BootMAE).
        """
        pixels = normalise(images, self.encoder.normalisation, torch.float32)
        last_block, width = f"block {self.encoder.shape.depth} ", self.encoder.shape.width
        inputs = []
        for encoder in self.encoders:
            with torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=self._autocast):
                pooled = pooled_features(encoder, pixels, self.config.probe.layers)
            for name in self.names:
                values = pooled[name].float()
                inputs.append(values if name.startswith(last_block) else F.layer_norm(values, (width,), eps=1e-6))
        return torch.stack(inputs, 1)

    @torch.no_grad()
    def evaluate(self, poll: Callable[[], None]) -> dict[str, float]:
        """Return top-1 and top-5 accuracy of all heads in per cent; `untrained/` marks the untrained encoder's."""
        num_classes, num_heads = self.labels.num_classes, len(self.heads.weights)
        counts = torch.zeros(num_heads, num_classes, num_classes, device=device())
        parts = []
        for logits, labels in self._logits("val", poll):
            is_top = logits.topk(min(5, num_classes), -1).indices == labels[None, :, None]
            parts.append(torch.stack([is_top[..., 0], is_top.any(-1)]).float())
            for of_head, predicted in zip(counts, logits.argmax(-1), strict=True):
                of_head += count_confusion(labels, predicted, num_classes)
        correct = torch.zeros(2, num_heads, len(self.val), device=device())  # top-1 and top-5
        correct[:, :, rank() :: world_size()] = torch.cat(parts, -1)
        correct = sum_over_ranks(correct).cpu()
        self._correct, self.counts = correct[0] > 0, sum_over_ranks(counts).cpu()
        self.evaluated = True
        return {
            f"val/{top}/{name.replace(' ', '_')}": float(value)
            for top, values in zip(("top1", "top5"), 100 * correct.mean(2), strict=True)
            for name, value in zip(self._all_names(), values, strict=True)
        }

    @torch.no_grad()
    def select(self, poll: Callable[[], None]) -> list[tuple[str, float | None]]:
        """Return each encoder's most accurate head on the held-out training images, and that accuracy in per cent.

        All ranks call it. Without held-out images (fewer than ten training images) return the last head and None.
        """
        indices = self.is_selection.nonzero()[:, 0]
        if not len(indices):
            return [(self.names[-1], None)] * len(self.encoders)
        correct = torch.zeros(len(self.heads.weights), device=device())
        for logits, labels in self._logits("train", poll, indices):
            correct += (logits.argmax(-1) == labels).sum(1)
        by_encoder = 100 * sum_over_ranks(correct).view(len(self.encoders), -1) / len(indices)
        return [(self.names[int(each.argmax())], float(each.max())) for each in by_encoder]

    def _logits(
        self, split: str, poll: Callable[[], None], samples: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits [H, B, C] and classes of this rank's samples without padding, with the heads in eval mode.

        samples: int64 [N], use these alone.
        """
        self.heads.eval()
        for features, labels in self._rank_features(split, poll, samples):
            yield self.heads(features.transpose(0, 1)), labels
        self.heads.train()

    def _all_names(self) -> list[str]:
        """Return the names of all heads in order, the untrained encoder's last."""
        return [*self.names, *(f"untrained/{name}" for name in self.names if len(self.encoders) > 1)]

    def gather(self, heartbeat: Callable[[], None]) -> tuple[list[tuple[str, float | None]], float]:
        return self.select(heartbeat), self.raw_pixel_accuracy(heartbeat)

    def results(
        self, rows: list[dict[str, float]], gathered: tuple[list[tuple[str, float | None]], float]
    ) -> dict[str, Any]:
        """Return the comparison with baselines of the selected head, and the accuracies of all heads.

        gathered: select(), and the accuracy of raw pixels in per cent.
        """
        ((selected, selection_accuracy), *untrained), raw = gathered
        last = next(row for row in reversed(rows) if any(name.startswith("val/") for name in row))
        heads = {
            name: {top: last[f"val/{top}/{name.replace(' ', '_')}"] for top in ("top1", "top5")} for name in self.names
        }
        correct = dict(zip(self._all_names(), self._correct, strict=True))
        baseline = correct[f"untrained/{untrained[0][0]}"] if untrained else None
        comparison = self.compare(correct[selected], baseline, raw, "linear probe top-1")
        return comparison | {"best": selected, "selection_accuracy": selection_accuracy, "heads": heads}

    def figures(self, rows: list[dict[str, float]], results: dict[str, Any]) -> dict[str, Figure]:
        accuracies = [f"val/top1/{name.replace(' ', '_')}" for name in self.names]
        lines, title = baselines.by_label(results), "validation top-1 in %"
        top1 = {name: row["top1"] for name, row in results["heads"].items()}
        return {
            "curves": curves(rows, {"sum of the heads' losses": ["loss/total"], title: accuracies}, {title: lines}),
            "blocks": metric_by_block(top1, "top-1 in %", lines),
            "confusion": confusion_matrix(self.counts[self.names.index(results["best"])], self.labels.names),
        }

    def summary(self) -> str:
        """Return the results as text."""
        results = json.loads((self.folder / "results.json").read_text())
        lines = [baselines.verdict_of(results), f"{'features':18}{'top-1':>8}{'top-5':>8}"]
        for name, row in results["heads"].items():
            mark = "  <-- selected on a part of train" if name == results["best"] else ""
            lines.append(f"{name:18}{row['top1']:8.2f}{row['top5']:8.2f}{mark}")
        return "\n".join(lines)

    def _reader(self, split: str, samples: Tensor | None = None) -> ExampleReader:
        """Return a reader of all images of a split, or of these training images, int64 [N], without augmentation."""
        data, size = self.config.data, self.encoder.shape.image_size
        return self.val if split == "val" else ExampleReader(data.train, split, size, open_cache(data), samples=samples)

    def _cached_features(self, split: str, poll: Callable[[], None] = lambda: None) -> Tensor:
        """Return the features of a whole split, float32 [N, H, D] on the CPU, computed at the first call."""
        if split not in self._feature_cache:
            reader, workers = self._reader(split), self.config.data.workers
            self._feature_cache |= map_images(reader, workers, lambda images: {split: self.features(images)}, poll)
        return self._feature_cache[split]

    def _rank_features(
        self, split: str, poll: Callable[[], None], samples: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features [B, H, D] and classes int64 [B] of this rank's samples; see _logits()."""
        if not self.config.probe.cache:
            for batch in batches_of_rank(self._reader(split, samples), BATCH_SIZE, self.config.data.workers, device()):
                poll()
                valid = batch.labels >= 0
                yield self.features(batch.images)[valid], batch.labels[valid]
            return
        features = self._cached_features(split, poll)
        labels = self.val.labels if split == "val" else self.labels.targets
        share = (torch.arange(len(labels)) if samples is None else samples)[rank() :: world_size()]
        for part in share.split(BATCH_SIZE):
            yield features[part].to(device()), labels[part].to(device())
