"""Scales: experiments with a small model, small images and a short schedule, for machines without a cluster.

nano    a functional test, a minute a run on CPU cores: digits
micro   minutes a run on a CPU core: photographs of 32 pixels
small   up to an hour a run on a CPU core: the same
tiny    minutes a run on a data-centre GPU: photographs of 64 pixels
paper   the experiment as it is
"""

from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar

from ddae.config.base import Experiment, OptimConfig, TrainConfig
from ddae.config.pretrain import BranchConfig, PretrainConfig, PretrainEngineConfig, TeacherConfig

T = TypeVar("T", bound=Experiment)
DEPTH = 12  # blocks of the experiments that are scaled
WARMUP_FRACTION = 0.1  # share of a small run's steps in which the learning rate is warmed up
SMALL_CODEBOOK = 256  # codes of a small scale's tokenizer


class Scale(NamedTuple):
    """What a small scale changes."""

    width: int  # of the encoder
    depth: int
    heads: int
    decoder_width: int  # of both decoders, which have a block each
    decoder_heads: int
    image_size: int  # pixels a side
    patch_size: int
    steps: int  # by default
    batch_size: int
    lr: float  # peak learning rate
    pixel_norm: Literal["joint", "none"]  # of a target patch, the same for all methods: see METHOD.md
    in_memory: bool = False  # keep the decoded images in memory


SCALES = {
    "nano": Scale(48, 12, 2, 48, 2, 32, 8, 60, 32, 2e-3, pixel_norm="none"),
    "micro": Scale(64, 8, 4, 64, 4, 32, 4, 2000, 64, 1e-3, pixel_norm="joint", in_memory=True),
    "small": Scale(112, 8, 7, 64, 4, 32, 4, 3500, 64, 5e-4, pixel_norm="joint", in_memory=True),
    "tiny": Scale(192, 12, 8, 192, 8, 64, 8, 1500, 512, 1.5e-3, pixel_norm="none"),
    "paper": None,
}


def change(config: T, *sections: str, **changes) -> T:
    """Return the config with the same changed fields in each of these sections."""
    changed: Any = {name: replace(getattr(config, name), **changes) for name in sections}
    return replace(config, **changed)


def at_scale(config: PretrainConfig, name: str, steps: int | None = None) -> PretrainConfig:
    """Return the experiment, of a model of 12 blocks, at a scale; unchanged at the scale paper.

    steps: of pretraining; None: the scale's. Taps move to the same relative depth. The teacher's half-life is an eighth
    of the run. The learning rate of the betas lets them move as far as in a long run.
    """
    if (scale := SCALES[name]) is None:
        return config
    steps = steps or scale.steps
    small = change(config, "pixel", "feature", decoder_width=scale.decoder_width, decoder_heads=scale.decoder_heads)
    small = change(change(small, "pixel", "feature", decoder_depth=1), "pixel", norm=scale.pixel_norm)
    for section in ("pixel", "feature", "token"):
        branch: BranchConfig = getattr(small, section)
        small = change(small, section, taps=tuple(round(tap * scale.depth / DEPTH) for tap in branch.taps))
    model = {"width": scale.width, "depth": scale.depth, "heads": scale.heads}
    small = change(small, "model", **model, image_size=scale.image_size, patch_size=scale.patch_size)
    cls_block = round(config.token.cls_block * scale.depth / DEPTH)
    small = change(small, "token", codes=SMALL_CODEBOOK, cls_block=cls_block)
    small = change(small, "dynamic", lr_mult=4.0, beta_l2=config.dynamic.beta_l2 / 5)
    data = {"batch_size": scale.batch_size, "in_memory": scale.in_memory}
    small = change(small, "data", **data, workers=0 if scale.in_memory else 1, backend="pillow")
    return replace(
        small,
        teacher=TeacherConfig(momentum=0.5 ** (8 / steps)),
        optim=OptimConfig(
            lr=scale.lr, min_lr=1e-5, warmup_epochs=0.0, decay_mask_tokens=config.optim.decay_mask_tokens
        ),
        train=TrainConfig(steps=steps, log_every=max(1, steps // 100), save_every=steps, keep=1, report=False),
        engine=PretrainEngineConfig(precision="fp32"),
    )
