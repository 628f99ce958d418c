"""Settings of a tokenizer's training that can change a result, and the recipes by name.

docs/evaluation.md gives the source of each number.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from ddae.config.base import (
    ANY,
    RANGES,
    TINY,
    EngineConfig,
    Experiment,
    ExperimentType,
    OptimConfig,
    ShardsConfig,
    TrainConfig,
    check_image_size,
    check_ranges,
)
from ddae.config.evaluation import named
from ddae.config.pretrain import ModelConfig
from ddae.errors import UserError


@dataclass(frozen=True)
class QuantizerConfig:
    teacher: str = ""  # encoder whose features are reconstructed: a run, an export, a published file, or timm:NAME
    codes: int = 8192  # size of the codebook
    code_width: int = 32  # dimensions of a code
    decay: float = 0.99  # of the codebook's moving averages, a step
    dead: float = 0.01  # a code is reset if its share of patches is below this over the number of codes
    decoder_depth: int = 3  # blocks of the decoder
    decoder_width: int = 768  # width of the decoder
    decoder_heads: int = 12  # attention heads of the decoder
    evaluate_every: float = 5.0  # epochs between evaluations


@dataclass(frozen=True)
class TokenizerConfig(Experiment):
    """The settings of a tokenizer's training."""

    preset: str = "paper"  # recipe: paper or demo
    model: ModelConfig = field(default_factory=ModelConfig)
    vq: QuantizerConfig = field(default_factory=QuantizerConfig)
    val: str = ""  # validation shards; empty: split val of the folder data.train

    FREE_ON_RESUME = Experiment.FREE_ON_RESUME | {"val", "vq.teacher"}
    UNUSED: ClassVar[frozenset[str]] = frozenset({"engine.loss_backend", "engine.activation_checkpointing"})

    @property
    def folder(self) -> str:
        return self.run_dir or "runs/tokenizer"


def paper() -> TokenizerConfig:
    """BEiT-v2's tokenizer: ViT-B, 8,192 codes of 32 dimensions, 100 epochs."""
    return TokenizerConfig(
        data=ShardsConfig(batch_size=1024, remainder="drop", crop_scale=(0.08, 1.0)),
        optim=OptimConfig(
            lr=4e-4, min_lr=1e-5, warmup_epochs=10, weight_decay=1e-4, adam_betas=(0.9, 0.99), clip_grad=0.0
        ),
        train=TrainConfig(epochs=100),
        engine=EngineConfig(precision="autocast"),
    )


def demo() -> TokenizerConfig:
    """The encoder of `make demo`: minutes on two cores."""
    config = paper()
    return replace(
        config,
        model=ModelConfig(width=96, depth=4, heads=3, image_size=64, patch_size=8),
        vq=QuantizerConfig(
            codes=256, code_width=16, decoder_depth=1, decoder_width=96, decoder_heads=3, evaluate_every=1.0
        ),
        data=replace(config.data, train="data/demo", batch_size=32, workers=1),
        optim=replace(config.optim, lr=1e-3, warmup_epochs=0.5),
        train=replace(config.train, epochs=3, log_every=5),
        engine=EngineConfig(precision="fp32"),
    )


RECIPES = {"paper": paper, "demo": demo}


def tokenizer_recipe(name: str) -> TokenizerConfig:
    """Return the recipe of that name. Raise UserError with the nearest name if there is none."""
    return named(name, RECIPES)


TOKENIZER_RANGES = {
    **RANGES,
    **dict.fromkeys((f"model.{n}" for n in ("width", "depth", "heads", "image_size", "patch_size")), (1, ANY)),
    **dict.fromkeys((f"vq.{n}" for n in ("codes", "code_width", "decoder_depth", "decoder_width")), (1, ANY)),
    "vq.decoder_heads": (1, ANY),
    "vq.decay": (0, 1 - TINY),
    "vq.dead": (0, 1),
    "vq.evaluate_every": (TINY, ANY),
}


def check_tokenizer(config: TokenizerConfig) -> None:
    """Raise UserError if a field is out of range or fields contradict each other."""
    check_ranges(config, TOKENIZER_RANGES)
    model = config.model
    check_image_size("model.image_size", model.image_size, model.patch_size)
    sizes = {"model.": (model.width, model.heads), "vq.decoder_": (config.vq.decoder_width, config.vq.decoder_heads)}
    for name, (width, heads) in sizes.items():
        if width % heads or width % 4:
            raise UserError(f"{name}width is {width}; expected a multiple of 4 and of {name}heads {heads}.")
    if model.relative_positions != "none" or model.positions == "none":
        raise UserError(
            "a tokenizer has sin-cos positions. Leave model.positions and model.relative_positions at their defaults."
        )
    if not config.vq.teacher:
        raise UserError("vq.teacher is empty. Pass --vq.teacher with a run, an export, a published file, or timm:NAME.")
    if config.engine.precision == "bf16":
        raise UserError(
            "engine.precision is bf16, too coarse for the codebook's moving averages. Use autocast or fp32."
        )
    if config.data.backend == "synthetic":
        raise UserError("data.backend is synthetic, which is noise. Name shards with --data.train.")


TOKENIZING = ExperimentType(TokenizerConfig, tokenizer_recipe, check_tokenizer)
