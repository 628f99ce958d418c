"""Linear probes of a frozen encoder: heads on several blocks and both poolings, trained in one pass over the data
(docs/evaluation.md; paper, appendix "Linear probing").

B images, H heads, C classes, D width.
"""

import itertools
import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ddae import report, run_folder
from ddae.data.loader import Batch, Loader, cache_of
from ddae.data.reader import Part
from ddae.distributed import device, is_main, rank, sum_over_ranks, world_size
from ddae.errors import UserError
from ddae.eval.examples import ExampleReader, Labels, batches_of_rank, held_out, labels_of
from ddae.eval.features import pooled
from ddae.eval.fit import fit
from ddae.eval.heads import Heads, Trainer
from ddae.eval.pictures import by_block, confusion_matrix
from ddae.eval.recipes import ProbeConfig
from ddae.figures import curves
from ddae.model.vit import Encoder
from ddae.patches import normalise
from ddae.schedules import warmup_cosine
from ddae.session import Session
from ddae.slices import Saved
from ddae.stopping import Stop
from ddae.tracker import run_id_of
from ddae.weights import load_encoder

BATCH = 128  # images of an evaluation at a time


def linear_probe(config: ProbeConfig, stop: Stop | None = None) -> None:
    """Train all heads to the end, or from the newest checkpoint on; then write results and pictures.

    SystemExit with code 75 where the run is told to stop before. UserError where the encoder or the shards cannot be
    read, shards have no classes, or those of the two splits do not fit.
    """
    stop = stop or Stop()
    encoder = load_encoder(config.encoder, config.image_size, config.normalisation or None)
    config = config.settled(encoder.shape.depth)
    run_folder.check(config)
    batch = config.data.batch_size
    micro = min(config.probe.micro_batch, batch // world_size())
    if micro == 0 or batch % (micro * world_size()):
        raise UserError(
            f"data.batch_size {batch} is not divisible by {world_size()} ranks x probe.micro_batch {micro}: "
            "change one of them"
        )
    part, size = Part(batch, micro, rank(), world_size()), encoder.shape.image_size
    kind = Numbers if config.probe.cache else Loader
    loader = kind(config.data, size, config.train.seed, part, device())
    val = ExampleReader(held_out(config.data.train, config.val), "val", size, cache_of(config.data))
    task = LinearProbe(config, encoder, labels_of(loader, val), val, part.accumulation)
    fit(task, config, loader, stop, {}, part)


class Numbers(Loader):
    """The same stream of samples without their images, where what is wanted of them is known."""

    def settle(self, known: str | None = None) -> None:
        self.backend = "cache"

    def _batches(self, step: int) -> Generator[Batch, None, None]:
        for number in itertools.count(step * self.part.accumulation):
            epochs, samples = self.order.samples(self.part.positions(number))
            yield Batch(torch.empty(0), self.order.seeds(epochs, samples), samples)


class LinearProbe:
    """What fit() trains and measures."""

    schedule = staticmethod(warmup_cosine)
    learner: Trainer
    about: str

    def __init__(self, config: ProbeConfig, encoder: Encoder, labels: Labels, val: ExampleReader, accumulation: int):
        self.config, self.encoder, self.labels, self.val = config, encoder.to(device()), labels, val
        self.evaluate_every, self.parent = config.probe.evaluate_every, run_id_of(Path(config.encoder))
        self.folder = Path(config.folder)
        layers = config.probe.layers
        self.names = [f"block {layer} {pool}" for layer in layers for pool in ("cls", "mean")]
        self._accumulation = accumulation
        self._tables: dict[str, Tensor] = {}  # by split, where features are kept: float32 [N, H, D]
        self._confusion: Tensor | None = None

    def build(self, ds_json: dict[str, Any]) -> dict[str, Saved]:
        optim, width = self.config.optim, self.encoder.shape.width
        self.heads = Heads(len(self.names), width, self.labels.count, self.config.train.seed)
        momentum = self.config.probe.momentum
        self.learner = Trainer(self.heads, momentum, optim.weight_decay, self._accumulation, device())
        products = "bf16" if self._autocast else "fp32"
        self.about = f"{len(self.names)} heads on features in {products}"
        return {"heads": self.learner}

    @property
    def _autocast(self) -> bool:
        return self.config.engine.precision != "fp32" and device().type == "cuda"

    def loss(self, batch: Batch, seed: int) -> Tensor:
        """The sum of all heads' cross-entropies: none has a say in another's gradient."""
        if self.config.probe.cache:
            features = self._kept("train")[batch.samples].to(device())
        else:
            features = self.features(batch.images)
        labels = self.labels.numbers[batch.samples.cpu()].to(device())
        logits = self.heads(features.transpose(0, 1))
        return sum((F.cross_entropy(each, labels) for each in logits), torch.zeros((), device=device()))

    def updated(self) -> None:
        """Nothing follows the heads."""

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> float32 [B, H, D]: the last block's under the encoder's norm, earlier ones' under one
        without affine (BootMAE)."""
        pixels = normalise(images, self.encoder.normalisation, torch.float32)
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=self._autocast):
            found = pooled(self.encoder, pixels, self.config.probe.layers)
        last, width = f"block {self.encoder.shape.depth} ", self.encoder.shape.width
        normed = [
            found[name].float() if name.startswith(last) else F.layer_norm(found[name].float(), (width,), eps=1e-6)
            for name in self.names
        ]
        return torch.stack(normed, 1)

    @torch.no_grad()
    def evaluate(self, look_around: Callable[[], None]) -> dict[str, float]:
        """Top-1 and top-5 of every head, in per cent."""
        right = torch.zeros(2, len(self.names), device=device())
        confusion = torch.zeros(len(self.names), self.labels.count**2, device=device())
        self.heads.eval()
        for features, labels in self._of_val(look_around):
            logits = self.heads(features.transpose(0, 1))
            near = logits.topk(min(5, self.labels.count), -1).indices == labels[None, :, None]
            right += torch.stack([near[..., 0].sum(1), near.any(-1).sum(1)])
            for counts, guesses in zip(confusion, logits.argmax(-1), strict=True):
                counts += (labels * self.labels.count + guesses).bincount(minlength=self.labels.count**2)
        self.heads.train()
        shares = 100 * sum_over_ranks(right).cpu() / len(self.val)
        self._confusion = sum_over_ranks(confusion).cpu()
        tops = {"top1": shares[0], "top5": shares[1]}
        return {
            f"val/{top}/{name.replace(' ', '_')}": float(share)
            for top, values in tops.items()
            for name, share in zip(self.names, values, strict=True)
        }

    def finish(self, session: Session, look_alive: Callable[[], None]) -> list[Path]:
        if self._confusion is None:  # evaluated by an earlier start
            self.evaluate(look_alive)
        if not is_main():
            return []
        assert self._confusion is not None
        rows = session.rows()
        results = self._results([row for row in rows if any(name.startswith("val/") for name in row)])
        (self.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        if not self.config.train.report:
            return []
        tops = [f"val/top1/{name.replace(' ', '_')}" for name in self.names]
        best = self._confusion[self.names.index(results["best"])].view(self.labels.count, -1)
        drawn = {
            "curves": curves(rows, {"sum of the heads' losses": ["loss/total"], "validation top-1 in %": tops}, ""),
            "blocks": by_block({name: row["top1"] for name, row in results["heads"].items()}, "top-1 in %"),
            "confusion": confusion_matrix(best, self.labels.names),
        }
        return report.add_evaluation(self.folder, drawn)

    def summary(self) -> str:
        """The results in words."""
        results = json.loads((self.folder / "results.json").read_text())
        lines = [f"{'features':18}{'top-1':>8}{'top-5':>8}"]
        for name, row in results["heads"].items():
            mark = "  <-- best" if name == results["best"] else ""
            lines.append(f"{name:18}{row['top1']:8.2f}{row['top5']:8.2f}{mark}")
        return "\n".join(lines)

    def _kept(self, split: str, look_around: Callable[[], None] = lambda: None) -> Tensor:
        """The features of a split, each image read once by one of the ranks."""
        if split not in self._tables:
            reader = self.val
            if split == "train":
                data, size = self.config.data, self.encoder.shape.image_size
                reader = ExampleReader(data.train, "train", size, cache_of(data))
            table = torch.zeros(len(reader), len(self.names), self.encoder.shape.width, device=device())
            place = rank()
            for examples in batches_of_rank(reader, BATCH, self.config.data.workers, device()):
                look_around()
                features = self.features(examples.images)[examples.labels >= 0]
                places = torch.arange(len(features), device=device()) * world_size() + place
                table[places] = features
                place += len(features) * world_size()
            self._tables[split] = sum_over_ranks(table).cpu()
        return self._tables[split]

    def _of_val(self, look_around: Callable[[], None]) -> Generator[tuple[Tensor, Tensor], None, None]:
        """This rank's share of the validation images: features [B, H, D] and classes int64 [B]."""
        if self.config.probe.cache:
            mine = self._kept("val", look_around)[rank() :: world_size()]
            labels = self.val.labels[rank() :: world_size()]
            yield from zip(mine.to(device()).split(BATCH), labels.to(device()).split(BATCH), strict=True)
            return
        for examples in batches_of_rank(self.val, BATCH, self.config.data.workers, device()):
            look_around()
            counted = examples.labels >= 0
            yield self.features(examples.images)[counted], examples.labels[counted]

    def _results(self, measured: list[dict[str, float]]) -> dict[str, Any]:
        last = measured[-1]
        heads = {
            name: {top: last[f"val/{top}/{name.replace(' ', '_')}"] for top in ("top1", "top5")} for name in self.names
        }
        best = max(heads, key=lambda name: heads[name]["top1"])
        about = {"encoder": self.config.encoder, "recipe": self.config.preset}
        about["data"] = self.config.to_dict()["data"]["train"]
        images = {"train": len(self.labels.numbers), "val": len(self.val)}
        found = {"best": best, "top1": heads[best]["top1"], "heads": heads}
        return {"task": "linear_probe", **about, "classes": self.labels.count, "images": images, **found}
