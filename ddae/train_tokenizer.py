"""Training of a tokenizer: a codebook from which a teacher's features are reconstructed (BEiT-v2's VQ-KD).

Shapes: B images, N patches, F width of the teacher's features, C codes.
"""

import json
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from ddae.config.base import ImageSize, canonical_size, height_width
from ddae.config.tokenizer import TokenizerConfig
from ddae.data.loader import Batch, Loader
from ddae.distributed.checkpoint_format import Checkpointable, FrozenModule
from ddae.distributed.comm import device, sum_over_ranks, world_size
from ddae.distributed.engine import Engine
from ddae.distributed.preemption import StopSignal
from ddae.errors import UserError, one_line
from ddae.eval.dataset import ExampleReader, batches_of_rank, validation_reader
from ddae.eval.figures import patches_by_code
from ddae.eval.task import SupervisedTask, deepspeed_run
from ddae.export.encoder import load_encoder, write_tokenizer
from ddae.models.patches import normalise
from ddae.models.tokenizer import Quantizer, Tokenizer, codebook_usage
from ddae.models.vit import initialise
from ddae.report.figures import curves
from ddae.trainer import fit
from ddae.training.optimizer import build_optimizer

TIMM = "timm:"  # prefix of the name of a timm teacher
NUM_SHOWN = 256  # validation images from which the figure of codes takes its patches


def train_tokenizer(config: TokenizerConfig, stop: StopSignal | None = None) -> None:
    """Train to the end, resuming from the newest checkpoint; then write tokenizer/, results and figures.

    Raise SystemExit with code 75 if a signal stops the run. Raise UserError if the teacher or the shards cannot be read
    or do not fit the model.
    """
    teacher = FeatureTeacher(config.vq.teacher, config.model.grid)
    run, size = deepspeed_run(config, stop), config.model.image_size
    loader = Loader(config.data, size, config.train.seed, run.rank_batch, device())
    val = validation_reader(config, size, labelled=False)
    if run.ds_json.get("zero_optimization", {}).get("stage", 0) == 3:
        raise UserError("the DeepSpeed JSON has ZeRO stage 3; expected 0, 1 or 2 for a tokenizer. Change its stage.")
    fit(TokenizerTask(config, teacher, val, run.rank_batch.grad_accum_steps), run, loader)


class FeatureTeacher:
    """A frozen encoder that gives patch features: a run, an export, a published file, or a timm model."""

    def __init__(self, name: str, grid: tuple[int, int]):
        """Load the encoder. grid: rows and columns of patches, as in the tokenizer.

        Raise UserError if it cannot be loaded.
        """
        if name.startswith(TIMM):
            self.model, self.size, self.width = _load_timm(name.removeprefix(TIMM), grid)
            self.num_prefix_tokens, settings = self.model.num_prefix_tokens, self.model.pretrained_cfg  # type: ignore[union-attr]
            mean_std = torch.tensor([settings["mean"], settings["std"]], device=device())  # type: ignore[index]
            self.mean_std: Tensor | None = mean_std[..., None, None]
        else:
            encoder = load_encoder(name)
            self.size, self.width = image_size_of(grid, encoder.shape.patch_size), encoder.shape.width
            if encoder.shape.image_size != self.size:
                encoder.set_image_size(self.size)
            self.model, self.num_prefix_tokens, self.mean_std = encoder, 1, None
        self.model = self.model.to(device()).eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return patch features [B, N, F] of uint8 [B, 3, H, W], resized to the teacher's image size if it differs."""
        if images.shape[-2:] != height_width(self.size):
            resized = F.interpolate(images.float(), height_width(self.size), mode="bicubic", antialias=True)
            images = resized.round().clamp(0, 255).to(torch.uint8)
        if self.mean_std is None:
            return self.model(normalise(images, self.model.normalisation, torch.float32))[:, 1:]  # type: ignore[arg-type]
        mean, std = self.mean_std
        return self.model.forward_features((images / 255 - mean) / std)[:, self.num_prefix_tokens :]  # type: ignore[operator]


def image_size_of(grid: tuple[int, int], patch: int) -> ImageSize:
    """Return the size in pixels of an image of so many rows and columns of patches."""
    return canonical_size((grid[0] * patch, grid[1] * patch))


def _load_timm(name: str, grid: tuple[int, int]) -> tuple[nn.Module, ImageSize, int]:
    """Return timm's model, its image size for this grid of patches, and the width of its features."""
    try:
        untrained: Any = timm.create_model(name, num_classes=0)
        size = image_size_of(grid, untrained.patch_embed.patch_size[0])
        model = timm.create_model(name, pretrained=True, num_classes=0, img_size=size)
        with torch.no_grad():
            tokens = model.eval().forward_features(torch.zeros(1, 3, *height_width(size)))  # type: ignore[operator]
        expected = (1, int(model.num_prefix_tokens) + grid[0] * grid[1], int(model.num_features))  # type: ignore[arg-type]
        if tokens.shape != expected:
            raise ValueError(f"its features have shape {list(tokens.shape)}, expected {list(expected)}")
    except Exception as error:  # unknown name, a model without patches, or weights that cannot be downloaded
        raise UserError(
            f"vq.teacher is {TIMM}{name}, which cannot be loaded ({one_line(error)}); expected a ViT of timm with "
            "pretrained weights. Choose another with --vq.teacher."
        ) from None
    return model, size, model.num_features  # type: ignore[return-value]


class TokenizerTask(SupervisedTask):
    """Task of fit(): vector quantisation of a teacher's features."""

    def __init__(self, config: TokenizerConfig, teacher: FeatureTeacher, val: ExampleReader, grad_accum_steps: int):
        encoder = "" if config.vq.teacher.startswith(TIMM) else config.vq.teacher
        super().__init__(config, val, config.vq.evaluate_every, encoder)
        self.teacher, self._grad_accum_steps, self._micro, self._seed = teacher, grad_accum_steps, 0, 0

    def build(self, ds_json: dict[str, Any]) -> dict[str, Checkpointable]:
        vq = self.config.vq
        tokenizer = Tokenizer(self.config.model, vq.codes, vq.code_width)
        module = Quantizer(tokenizer, self.teacher.width, vq)
        initialise(module, torch.Generator().manual_seed(self.config.train.seed), self.config.model.init)
        self.engine = self.optimizable = Engine(module, build_optimizer(module, self.config.optim), ds_json)
        self.description = f"{self.config.engine.precision}, ZeRO {self.engine.stage}, {vq.codes} codes"
        self._codebook = CodebookState(self.engine.module)
        teacher = FrozenModule("teacher", self.teacher.model)
        return {"engine": self.engine, "codebook": self._codebook, "teacher": teacher}

    def loss(self, batch: Batch, seed: int) -> Tensor:
        with self.engine.autocast():
            features = self.teacher.features(batch.images)
            if not self._codebook.initialised:
                self.engine.module.init_codebook(batch.images, features, seed)
                self._codebook.initialised = True
        loss, vectors = self.engine(batch.images, features)
        self.engine.module.accumulate(vectors, features, first=self._micro % self._grad_accum_steps == 0)
        self._micro, self._seed = self._micro + 1, seed
        return loss

    def after_step(self, applied: Tensor) -> None:
        """Update the codebook; a skipped step leaves it unchanged."""
        self.engine.module.update_codebook(self._seed, applied)

    @torch.no_grad()
    def evaluate(self, poll: Callable[[], None]) -> dict[str, float]:
        """Return the mean cosine of reconstructed and centred teacher features, and the usage of the codebook."""
        quantizer, sums = self.engine.module, torch.zeros(2, device=self.engine.device)  # of cosines, of patches
        counts = torch.zeros(self.config.vq.codes, device=self.engine.device)
        examples: list[tuple[Tensor, Tensor]] = []  # images and codes
        quantizer.eval()
        batch_size = min(self.config.data.batch_size // world_size(), 128)
        for batch in batches_of_rank(self.val, batch_size, self.config.data.workers, self.engine.device):
            poll()
            images = batch.images[batch.labels >= 0]  # without padding
            if not len(images):
                continue
            with self.engine.autocast():
                codes = quantizer.tokenizer.codes(images)
                predicted = quantizer.decode_features(F.embedding(codes, quantizer.tokenizer.codebook))
                cosines = quantizer.cosine(predicted, self.teacher.features(images))
            sums += torch.stack([cosines.sum(), sums.new_tensor(cosines.numel())])
            counts += codes.flatten().bincount(minlength=len(counts))
            if sum(len(shown) for shown, _ in examples) < NUM_SHOWN:
                examples.append((images.cpu(), codes.cpu()))
        quantizer.train()
        self.counts, self._examples, self.evaluated = sum_over_ranks(counts).cpu(), examples, True
        total, num_patches = sum_over_ranks(sums).tolist()
        used, perplexity = codebook_usage(self.counts)
        return {"val/cosine": total / num_patches, "codebook/used_percent": used, "codebook/perplexity": perplexity}

    def gather(self, heartbeat: Callable[[], None]) -> dict[str, Tensor]:
        return self.engine.weights(self.engine.module.tokenizer)

    def results(self, rows: list[dict[str, float]], gathered: dict[str, Tensor]) -> dict[str, Any]:
        """Write the tokenizer, and return the last evaluation."""
        tokenizer, vq = self.engine.module.tokenizer, self.config.vq
        buffers = {name: buffer.float().cpu().contiguous() for name, buffer in tokenizer.named_buffers()}
        write_tokenizer(gathered | buffers, tokenizer, self.folder / "tokenizer")
        last = [row for row in rows if "val/cosine" in row][-1]
        metrics = {name: value for name, value in last.items() if name.startswith(("val/", "codebook/"))}
        return {"task": "tokenizer", "teacher": vq.teacher, "codes": vq.codes, **metrics}

    def figures(self, rows: list[dict[str, float]], results: dict[str, Any]) -> dict[str, Figure]:
        groups = {"loss": ["loss/total"], "cosine on validation images": ["val/cosine"]}
        groups |= {"codes used, in %": ["codebook/used_percent"], "perplexity": ["codebook/perplexity"]}
        images, codes = map(torch.cat, zip(*self._examples, strict=True))
        return {"curves": curves(rows, groups), "codes": patches_by_code(images, codes, self.config.model.patch_size)}

    def summary(self) -> str:
        """Return the results as text, and the path of the tokenizer."""
        results = json.loads((self.folder / "results.json").read_text())
        cosine, used = results["val/cosine"], results["codebook/used_percent"]
        return (
            f"cosine {cosine:.3f}, {used:.1f} % of {results['codes']} codes used, "
            f"perplexity {results['codebook/perplexity']:.0f}\ntokenizer:            {self.folder / 'tokenizer'}"
        )


class CodebookState:
    """Moving averages of a quantizer, as a part of the checkpoint."""

    def __init__(self, quantizer: Quantizer):
        self.initialised = False  # from the first batch
        codebook = quantizer.tokenizer.codebook
        self._buffers = {"codebook": codebook, "share": quantizer.share, "centre": quantizer.centre}

    def state_dict(self) -> dict[str, Tensor]:
        return {name: buffer.detach().cpu().clone() for name, buffer in self._buffers.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, values in state.items():
            self._buffers[name].copy_(values)
        self.initialised = bool(self._buffers["share"].any())  # not if the run was stopped before its first step
