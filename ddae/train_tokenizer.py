"""Training a tokenizer: a codebook from which a teacher's features can be told (BEiT-v2's VQ-KD).

B images, N patches, F width of the teacher's features, C codes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddae.config import deepspeed as ds_config
from ddae.config.tokenizer import TokenizerConfig
from ddae.data.cache import open_cache
from ddae.data.loader import Batch, Loader
from ddae.distributed.checkpoint_format import Checkpointable, FrozenModule
from ddae.distributed.comm import device, is_main, sum_over_ranks, world_size
from ddae.distributed.engine import Engine
from ddae.distributed.preemption import StopSignal
from ddae.errors import UserError
from ddae.eval.dataset import ExampleReader, batches_of_rank, held_out
from ddae.eval.figures import patches_by_code
from ddae.export.encoder import load_encoder, write_tokenizer
from ddae.models.patches import normalise
from ddae.models.tokenizer import Quantizer, Tokenizer, usage
from ddae.models.vit import initialise
from ddae.report import html as report
from ddae.report.figures import curves
from ddae.trainer import fit
from ddae.training.optimizer import build_optimizer
from ddae.training.run import Run
from ddae.training.schedules import warmup_cosine
from ddae.training.tracker import run_id_of

TIMM = "timm:"  # begins the name of a teacher that timm has
SHOWN = 256  # images whose patches a picture is made of


def train_tokenizer(config: TokenizerConfig, stop: StopSignal | None = None) -> None:
    """Train to the end, or from the newest checkpoint on; then write tokenizer/, results and pictures.

    SystemExit with code 75 where the run is told to stop before. UserError where the teacher or the shards cannot be
    read, or do not fit the model.
    """
    stop = stop or StopSignal()
    teacher = FeatureTeacher(config.vq.teacher, config.model.image_size // config.model.patch_size)
    resolved = ds_config.resolve(ds_config.load(config.ds_config), config, world_size())
    run = Run(config, stop, resolved.json, resolved.micro_batch)
    size = config.model.image_size
    loader = Loader(config.data, size, config.train.seed, run.rank_batch, device())
    val = ExampleReader(held_out(config.data.train, config.val), "val", size, open_cache(config.data), labelled=False)
    if resolved.json.get("zero_optimization", {}).get("stage", 0) == 3:
        raise UserError("the DeepSpeed JSON has ZeRO stage 3, which a tokenizer is too small for: choose 0, 1 or 2")
    fit(Tokenizing(config, teacher, val, run.rank_batch.accumulation), run, loader)


class FeatureTeacher:
    """A frozen encoder, a run's or a file's or timm's, and the features of its patches."""

    def __init__(self, name: str, side: int):
        """side: patches a side that an image is to have. UserError where there is no such encoder."""
        if name.startswith(TIMM):
            self.model, self.size, self.width = _of_timm(name.removeprefix(TIMM), side)
            self.skip, settings = self.model.num_prefix_tokens, self.model.pretrained_cfg  # type: ignore[union-attr]
            self.mean_std = torch.tensor([settings[name] for name in ("mean", "std")], device=device())[..., None, None]  # type: ignore[index]
        else:
            encoder = load_encoder(name)
            self.size, self.width = side * encoder.shape.patch_size, encoder.shape.width
            if encoder.shape.image_size != self.size:
                encoder.resize(self.size)
            self.model, self.skip, self.mean_std = encoder, 1, None
        self.model = self.model.to(device()).eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> [B, N, F], patches row by row."""
        if images.shape[-1] != self.size:
            sized = F.interpolate(images.float(), self.size, mode="bicubic", antialias=True)
            images = sized.round().clamp(0, 255).to(torch.uint8)
        if self.mean_std is None:
            return self.model(normalise(images, self.model.normalisation, torch.float32))[:, 1:]  # type: ignore[arg-type]
        mean, std = self.mean_std
        return self.model.forward_features((images / 255 - mean) / std)[:, self.skip :]  # type: ignore[operator]


def _of_timm(name: str, side: int) -> tuple[nn.Module, int, int]:
    """timm's model, pixels a side for so many patches, and the width of its features."""
    try:
        patch = timm.create_model(name, num_classes=0).patch_embed.patch_size[0]  # type: ignore[union-attr, index]
        model = timm.create_model(name, pretrained=True, num_classes=0, img_size=side * patch)
        with torch.no_grad():
            tokens = model.eval().forward_features(torch.zeros(1, 3, side * patch, side * patch))  # type: ignore[operator]
        wanted = (1, int(model.num_prefix_tokens) + side**2, int(model.num_features))  # type: ignore[arg-type]
        if tokens.shape != wanted:
            raise ValueError(f"its features are {list(tokens.shape)}, not of {side}^2 patches")
    except Exception as error:  # an unknown name, a model without patches, or no way to its weights
        raise UserError(f"vq.teacher {TIMM}{name} cannot be had: {' '.join(str(error).split())[:200]}") from None
    return model, side * patch, model.num_features  # type: ignore[return-value]


class Tokenizing:
    """What fit() trains and measures."""

    schedule = staticmethod(warmup_cosine)
    engine: Engine
    optimizable: Engine
    description: str

    def __init__(self, config: TokenizerConfig, teacher: FeatureTeacher, val: ExampleReader, accumulation: int):
        self.config, self.teacher, self.val = config, teacher, val
        self._accumulation, self._micro, self._seed = accumulation, 0, 0
        self.evaluate_every, self.folder = config.vq.evaluate_every, Path(config.folder)
        self.parent = "" if config.vq.teacher.startswith(TIMM) else run_id_of(Path(config.vq.teacher))
        self._seen: tuple[Tensor, ...] | None = None  # images of the last evaluation, and their patches' codes
        self._evaluated = False

    def build(self, ds_json: dict[str, Any]) -> dict[str, Checkpointable]:
        vq = self.config.vq
        tokenizer = Tokenizer(self.config.model, vq.codes, vq.code_width)
        decoder = vq.decoder_depth, vq.decoder_width, vq.decoder_heads
        module = Quantizer(tokenizer, self.teacher.width, *decoder, vq.decay, vq.dead)
        initialise(module, torch.Generator().manual_seed(self.config.train.seed), self.config.model.init)
        self.engine = self.optimizable = Engine(module, build_optimizer(module, self.config.optim), ds_json)
        self.description = f"{self.config.engine.precision}, ZeRO {self.engine.stage}, {vq.codes} codes"
        self._codebook = Codebook(self.engine.module)
        return {
            "engine": self.engine,
            "codebook": self._codebook,
            "teacher": FrozenModule("teacher", self.teacher.model),
        }

    def loss(self, batch: Batch, seed: int) -> Tensor:
        with self.engine.autocast():
            features = self.teacher.features(batch.images)
            if not self._codebook.begun:
                self.engine.module.init_codebook(batch.images, features, seed)
                self._codebook.begun = True
        loss, vectors = self.engine(batch.images, features)
        self.engine.module.accumulate(vectors, features, first=self._micro % self._accumulation == 0)
        self._micro, self._seed = self._micro + 1, seed
        return loss

    def after_step(self, applied: Tensor) -> None:
        """Update the codebook with the weights; a skipped step changes neither."""
        self.engine.module.update_codebook(self._seed, applied)

    @torch.no_grad()
    def evaluate(self, poll: Callable[[], None]) -> dict[str, float]:
        """The cosine between told and real features without their centre, and how much of the codebook is used."""
        quantizer, sums = self.engine.module, torch.zeros(2, device=self.engine.device)
        counts = torch.zeros(self.config.vq.codes, device=self.engine.device)
        seen: tuple[Tensor, ...] | None = None
        quantizer.eval()
        micro = min(self.config.data.batch_size // world_size(), 128)
        for examples in batches_of_rank(self.val, micro, self.config.data.workers, self.engine.device):
            poll()
            counted = examples.images[examples.labels >= 0]
            if not len(counted):
                continue
            with self.engine.autocast():
                codes = quantizer.tokenizer.codes(counted)
                told = quantizer.decode_features(F.embedding(codes, quantizer.tokenizer.codebook))
                cosines = quantizer.cosine(told, self.teacher.features(counted))
            sums += torch.stack([cosines.sum(), torch.tensor(float(cosines.numel()), device=sums.device)])
            counts += codes.flatten().bincount(minlength=len(counts))
            if seen is None or len(seen[0]) < SHOWN:
                more = (counted.cpu(), codes.cpu())
                seen = more if seen is None else tuple(map(torch.cat, zip(seen, more, strict=True)))
        quantizer.train()
        self._seen, self._evaluated = seen, True
        total, number = sum_over_ranks(sums).tolist()
        used, perplexity = usage(sum_over_ranks(counts).cpu())
        return {"val/cosine": total / number, "codebook/used_percent": used, "codebook/perplexity": perplexity}

    def finish(self, run: Run, heartbeat: Callable[[], None]) -> list[Path]:
        weights = self.engine.weights(self.engine.module.tokenizer)
        if not self._evaluated:  # but by an earlier start
            self.evaluate(heartbeat)
        if not is_main():
            return []
        assert self._seen is not None
        tokenizer = self.engine.module.tokenizer
        weights |= {name: buffer.float().cpu() for name, buffer in tokenizer.named_buffers()}
        write_tokenizer({name: v.contiguous() for name, v in weights.items()}, tokenizer, self.folder / "tokenizer")
        rows = run.rows()
        last = [row for row in rows if "val/cosine" in row][-1]
        results = {"task": "tokenizer", "teacher": self.config.vq.teacher, "codes": self.config.vq.codes}
        results |= {name: last[name] for name in last if name.startswith(("val/", "codebook/"))}
        (self.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        if not self.config.train.report:
            return []
        groups = {"loss": ["loss/total"], "cosine on validation images": ["val/cosine"]}
        groups |= {"codes used, in %": ["codebook/used_percent"], "perplexity": ["codebook/perplexity"]}
        patch = self.config.model.patch_size
        drawn = {"curves": curves(rows, groups, ""), "codes": patches_by_code(self._seen[0], self._seen[1], patch)}
        return report.add_evaluation(self.folder, drawn)

    def summary(self) -> str:
        """The results in words, and where the tokenizer is."""
        found = json.loads((self.folder / "results.json").read_text())
        return (
            f"cosine {found['val/cosine']:.3f}, {found['codebook/used_percent']:.1f} % of {found['codes']} codes used, "
            f"perplexity {found['codebook/perplexity']:.0f}\ntokenizer:            {self.folder / 'tokenizer'}"
        )


class Codebook:
    """The moving averages of a quantizer, which a checkpoint holds beside the weights."""

    def __init__(self, quantizer: Quantizer):
        self.begun = False  # whether it has been filled
        self._buffers = {
            "codebook": quantizer.tokenizer.codebook,
            "share": quantizer.share,
            "centre": quantizer.centre,
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {name: buffer.detach().cpu().clone() for name, buffer in self._buffers.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, values in state.items():
            self._buffers[name].copy_(values)
        self.begun = True
