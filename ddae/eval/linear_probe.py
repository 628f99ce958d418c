"""Linear probes of a frozen encoder: heads on several blocks and both poolings, trained in one pass over the data
(docs/evaluation.md; paper, appendix "Linear probing").

The same heads learn on an untrained encoder of the same architecture beside it. A part of the training images is held
out to choose between heads. B images, H heads of all encoders, C classes, D width.
"""

import itertools
import json
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from timm.optim.lars import Lars
from torch import Tensor, nn
from torch.nn import functional as F

from ddae.config.evaluation import ProbeConfig
from ddae.data.cache import open_cache
from ddae.data.loader import Batch, Loader
from ddae.distributed.checkpoint_format import Checkpointable, TensorShard
from ddae.distributed.comm import device, is_main, mean_over_ranks, rank, sum_over_ranks, world_size
from ddae.distributed.preemption import StopSignal
from ddae.errors import UserError
from ddae.eval import baselines
from ddae.eval.dataset import ExampleReader, Labels, batches_of_rank, held_out, labels_of
from ddae.eval.features import pooled, table_of
from ddae.eval.figures import by_block, confusion_matrix
from ddae.eval.knn import raw_pixels
from ddae.export.encoder import load_encoder
from ddae.models.patches import normalise
from ddae.models.vit import Encoder
from ddae.report import html as report
from ddae.report.figures import curves
from ddae.trainer import fit
from ddae.training.run import Run
from ddae.training.schedules import warmup_cosine
from ddae.training.tracker import run_id_of

EPS = 1e-6  # of the batch norm
KEPT = 0.9  # of the norm's running mean and variance, a micro-batch


class Heads(nn.Module):
    """Forward: features float32 [H, B, D] -> logits [H, B, C]."""

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
        flat = features.transpose(0, 1).flatten(1)  # every feature of every head is normed over the batch
        flat = F.batch_norm(flat, self.mean, self.var, training=self.training, momentum=1 - KEPT, eps=EPS)
        normed = flat.unflatten(1, (len(self.weights), -1)).transpose(0, 1)
        return torch.baddbmm(torch.stack(list(self.biases))[:, None], normed, torch.stack(list(self.weights)).mT)


class HeadsOptimizer:
    """LARS on the heads; gradients, and the norm's running statistics, are means over ranks and micro-batches."""

    sharded = False  # every rank has all of it

    def __init__(self, heads: Heads, momentum: float, weight_decay: float, accumulation: int, device: torch.device):
        self.module, self.device = heads.to(device), device
        self._accumulation, self._remaining = accumulation, accumulation  # micro-batches of a step
        self._applied = torch.ones((), device=device)
        groups = [
            {"params": list(heads.weights), "always_adapt": True},
            {"params": list(heads.biases), "always_adapt": False, "weight_decay": 0.0},
        ]
        options: dict[str, Any] = {"momentum": momentum, "weight_decay": weight_decay, "trust_coeff": 0.001}
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
        self._remaining = self._accumulation
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


BATCH = 128  # images of an evaluation at a time
IGNORED = -100  # the class of training images that are held out


def linear_probe(config: ProbeConfig, stop: StopSignal | None = None) -> None:
    """Train all heads to the end, or from the newest checkpoint on; then write results and pictures.

    SystemExit with code 75 where the run is told to stop before. UserError where the encoder or the shards cannot be
    read, shards have no classes, or those of the two splits do not fit.
    """
    stop = stop or StopSignal()
    encoder = load_encoder(config.encoder, config.image_size, config.normalisation or None)
    config = config.resolved_for(encoder.shape.depth)
    batch = config.data.batch_size
    micro = min(config.probe.micro_batch, batch // world_size())
    if micro == 0 or batch % (micro * world_size()):
        raise UserError(
            f"data.batch_size {batch} is not divisible by {world_size()} ranks x probe.micro_batch {micro}: "
            "change one of them"
        )
    run, size = Run(config, stop, {}, micro), encoder.shape.image_size
    kind = Numbers if config.probe.cache else Loader
    loader = kind(config.data, size, config.train.seed, run.rank_batch, device())
    val = ExampleReader(held_out(config.data.train, config.val), "val", size, open_cache(config.data))
    task = LinearProbe(config, encoder, labels_of(loader, val), val, run.rank_batch.accumulation)
    fit(task, run, loader)


class Numbers(Loader):
    """The same stream of samples without their images, where what is wanted of them is known."""

    def select_backend(self, known: str | None = None) -> None:
        self.backend = "cache"

    def _batches(self, step: int) -> Generator[Batch, None, None]:
        for number in itertools.count(step * self.part.accumulation):
            epochs, samples = self.order.samples(self.part.positions(number))
            yield Batch(torch.empty(0), self.order.seeds(epochs, samples), samples)


class LinearProbe:
    """What fit() trains and measures."""

    schedule = staticmethod(warmup_cosine)
    optimizable: HeadsOptimizer
    description: str

    def __init__(self, config: ProbeConfig, encoder: Encoder, labels: Labels, val: ExampleReader, accumulation: int):
        self.config, self.encoder, self.labels, self.val = config, encoder.to(device()), labels, val
        self.encoders = [self.encoder]
        if config.probe.untrained:
            self.encoders.append(baselines.untrained_encoder(encoder, config.train.seed).to(device()))
        self.evaluate_every, self.parent = config.probe.evaluate_every, run_id_of(Path(config.encoder))
        self.folder = Path(config.folder)
        layers = config.probe.layers
        self.names = [f"block {layer} {pool}" for layer in layers for pool in ("cls", "mean")]
        self.held = baselines.selection_part(len(labels.numbers))  # bool [N]: those that choose between heads
        self._learnt = labels.numbers.masked_fill(self.held, IGNORED)
        self._accumulation = accumulation
        self._tables: dict[str, Tensor] = {}  # by split, where features are kept: float32 [N, H, D]
        self._confusion: Tensor | None = None
        self._right: Tensor | None = None  # bool [H, N]: of the validation images

    def build(self, ds_json: dict[str, Any]) -> dict[str, Checkpointable]:
        optim, width = self.config.optim, self.encoder.shape.width
        count = len(self.encoders) * len(self.names)
        self.heads = Heads(count, width, self.labels.count, self.config.train.seed)
        momentum = self.config.probe.momentum
        self.optimizable = HeadsOptimizer(self.heads, momentum, optim.weight_decay, self._accumulation, device())
        products = "bf16" if self._autocast else "fp32"
        self.description = f"{count} heads on features in {products}"
        return {"heads": self.optimizable}

    @property
    def _autocast(self) -> bool:
        return self.config.engine.precision != "fp32" and device().type == "cuda"

    def loss(self, batch: Batch, seed: int) -> Tensor:
        """The sum of all heads' cross-entropies: none has a say in another's gradient."""
        if self.config.probe.cache:
            features = self._kept("train")[batch.samples].to(device())
        else:
            features = self.features(batch.images)
        labels = self._learnt[batch.samples.cpu()].to(device())
        logits = self.heads(features.transpose(0, 1))
        count = (labels != IGNORED).sum().clamp(min=1)
        summed = (F.cross_entropy(each, labels, ignore_index=IGNORED, reduction="sum") for each in logits)
        return sum(summed, torch.zeros((), device=device())) / count

    def after_step(self, applied: Tensor) -> None:
        """Nothing follows the heads."""

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> float32 [B, H, D], one encoder after the other: the last block's under the encoder's
        norm, earlier ones' under one without affine (BootMAE)."""
        pixels = normalise(images, self.encoder.normalisation, torch.float32)
        last, width = f"block {self.encoder.shape.depth} ", self.encoder.shape.width
        normed = []
        for encoder in self.encoders:
            with torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=self._autocast):
                found = pooled(encoder, pixels, self.config.probe.layers)
            normed += [
                found[name].float() if name.startswith(last) else F.layer_norm(found[name].float(), (width,), eps=1e-6)
                for name in self.names
            ]
        return torch.stack(normed, 1)

    @torch.no_grad()
    def evaluate(self, poll: Callable[[], None]) -> dict[str, float]:
        """Top-1 and top-5 of every head, in per cent; names of the untrained encoder's begin with `untrained/`."""
        count, heads = self.labels.count, len(self.heads.weights)
        right = torch.zeros(2, heads, len(self.val), device=device())  # top-1 and top-5
        confusion = torch.zeros(heads, count**2, device=device())
        place = rank()
        for logits, labels in self._logits(self._of_val(poll)):
            near = logits.topk(min(5, count), -1).indices == labels[None, :, None]
            places = place + torch.arange(len(labels), device=device()) * world_size()
            right[:, :, places] = torch.stack([near[..., 0], near.any(-1)]).float()
            place += len(labels) * world_size()
            for counts, guesses in zip(confusion, logits.argmax(-1), strict=True):
                counts += (labels * count + guesses).bincount(minlength=count**2)
        right = sum_over_ranks(right).cpu()
        self._right, self._confusion = right[0] > 0, sum_over_ranks(confusion).cpu()
        names = [self._metric(name) for name in self._all_names()]
        shares = 100 * right.mean(2)
        return {
            f"val/{top}/{name}": float(share)
            for top, values in zip(("top1", "top5"), shares, strict=True)
            for name, share in zip(names, values, strict=True)
        }

    @torch.no_grad()
    def select(self, poll: Callable[[], None]) -> list[str]:
        """The head of each encoder that is best on the held-out part of the training images; all ranks call it."""
        numbers = self.held.nonzero()[:, 0]
        if not len(numbers):
            return [self.names[-1]] * len(self.encoders)
        right = torch.zeros(len(self.heads.weights), device=device())
        data, size = self.config.data, self.encoder.shape.image_size
        if self.config.probe.cache:
            mine = numbers[rank() :: world_size()]
            features, labels = self._kept("train")[mine].to(device()), self.labels.numbers[mine].to(device())
            parts = zip(features.split(BATCH), labels.split(BATCH), strict=True)
        else:
            reader = ExampleReader(data.train, "train", size, open_cache(data), samples=numbers)
            parts = self._of(reader, poll)
        for logits, labels in self._logits(parts):
            right += (logits.argmax(-1) == labels).sum(1)
        right = sum_over_ranks(right).view(len(self.encoders), -1)
        return [self.names[best] for best in right.argmax(1).tolist()]

    def _logits(self, parts: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits [H, B, C] and classes for each (features [B, H, D], classes), with the heads in eval mode."""
        self.heads.eval()
        for features, labels in parts:
            yield self.heads(features.transpose(0, 1)), labels
        self.heads.train()

    def _all_names(self) -> list[str]:
        """Return the names of all heads in order, the untrained encoder's last."""
        return [*self.names, *(f"untrained/{name}" for name in self.names if len(self.encoders) > 1)]

    @staticmethod
    def _metric(name: str) -> str:
        return name.replace(" ", "_")

    def finish(self, run: Run, heartbeat: Callable[[], None]) -> list[Path]:
        if self._confusion is None:  # evaluated by an earlier start
            self.evaluate(heartbeat)
        chosen = self.select(heartbeat)
        where = held_out(self.config.data.train, self.config.val)
        raw = raw_pixels(self.config.data, where, self.encoder.shape.image_size, heartbeat)
        if not is_main():
            return []
        assert self._confusion is not None
        rows = run.rows()
        results = self._results([row for row in rows if any(name.startswith("val/") for name in row)], chosen, raw)
        (self.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        if not self.config.train.report:
            return []
        tops = [f"val/top1/{self._metric(name)}" for name in self.names]
        top_1 = "validation top-1 in %"
        best = self._confusion[self.names.index(results["best"])].view(self.labels.count, -1)
        drawn = {
            "curves": curves(
                *(rows, {"sum of the heads' losses": ["loss/total"], top_1: tops}, ""),
                {top_1: baselines.lines(results)},
            ),
            "blocks": by_block(
                {name: row["top1"] for name, row in results["heads"].items()}, "top-1 in %", baselines.lines(results)
            ),
            "confusion": confusion_matrix(best, self.labels.names),
        }
        return report.add_evaluation(self.folder, drawn)

    def summary(self) -> str:
        """The results in words."""
        results = json.loads((self.folder / "results.json").read_text())
        lines = [baselines.first_line(results), f"{'features':18}{'top-1':>8}{'top-5':>8}"]
        for name, row in results["heads"].items():
            mark = "  <-- chosen on a part of train" if name == results["best"] else ""
            lines.append(f"{name:18}{row['top1']:8.2f}{row['top5']:8.2f}{mark}")
        return "\n".join(lines)

    def _kept(self, split: str, poll: Callable[[], None] = lambda: None) -> Tensor:
        """The features of a split, each image read once by one of the ranks."""
        if split not in self._tables:
            reader = self.val
            if split == "train":
                data, size = self.config.data, self.encoder.shape.image_size
                reader = ExampleReader(data.train, "train", size, open_cache(data))
            made = table_of(reader, self.config.data.workers, lambda images: {"": self.features(images)}, poll)
            self._tables[split] = made[""]
        return self._tables[split]

    def _of_val(self, poll: Callable[[], None]) -> Generator[tuple[Tensor, Tensor], None, None]:
        """This rank's share of the validation images: features [B, H, D] and classes int64 [B]."""
        if self.config.probe.cache:
            mine = self._kept("val", poll)[rank() :: world_size()]
            labels = self.val.labels[rank() :: world_size()]
            yield from zip(mine.to(device()).split(BATCH), labels.to(device()).split(BATCH), strict=True)
            return
        yield from self._of(self.val, poll)

    def _of(self, reader: ExampleReader, poll: Callable[[], None]) -> Generator[tuple[Tensor, Tensor], None, None]:
        """This rank's share of a reader's images: features [B, H, D] and classes int64 [B]."""
        for examples in batches_of_rank(reader, BATCH, self.config.data.workers, device()):
            poll()
            counted = examples.labels >= 0
            yield self.features(examples.images)[counted], examples.labels[counted]

    def _results(self, measured: list[dict[str, float]], chosen: list[str], raw: float) -> dict[str, Any]:
        """Return results.json. chosen: the name of one head per encoder; raw: accuracy of raw pixels in per cent."""
        last, best, names = measured[-1], chosen[0], self._all_names()
        heads = {
            name: {top: last[f"val/{top}/{self._metric(name)}"] for top in ("top1", "top5")} for name in self.names
        }
        assert self._right is not None
        untrained = self._right[names.index(f"untrained/{chosen[1]}")] if len(chosen) > 1 else None
        chance = baselines.chance(self.labels.numbers, self.val.labels)
        compared = baselines.compare(self._right[names.index(best)], untrained, raw, chance)
        about = {"encoder": self.config.encoder, "recipe": self.config.preset}
        about["data"] = self.config.to_dict()["data"]["train"]
        images = {"train": len(self.labels.numbers), "val": len(self.val)}
        found = {**compared.results("linear probe top-1"), "best": best, "heads": heads}
        return {"task": "linear_probe", **about, "classes": self.labels.count, "images": images, **found}
