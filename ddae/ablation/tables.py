"""The paper's tables as experiments: each row is its table's base with a few fields changed, and the paper's number.

Tables 3, 6 and 7 are DDS-MAE on ViT-S, as their shared numbers show; 4 is DDAE on ViT-B; 2 compares methods. A scale
keeps what a row changes and makes the rest smaller: nano proves the machinery, micro and tiny are for machines that
are no cluster.
"""

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from ddae.config.base import OptimConfig, TrainConfig
from ddae.config.presets import beitv2, bootmae, ddae, dds_beitv2, mae
from ddae.config.presets import dds_mae as deep
from ddae.config.pretrain import PretrainConfig, PretrainEngineConfig, TeacherConfig
from ddae.errors import UserError

WARM = 0.1  # share of a small run over which the learning rate grows


class Row(NamedTuple):
    """One experiment of a table."""

    name: str
    config: PretrainConfig
    paper: float | None  # ImageNet accuracy after fine-tuning, in per cent; None where the paper has no such row


def pixels(config: PretrainConfig, **changes) -> PretrainConfig:
    return replace(config, pixel=replace(config.pixel, **changes))


def features(config: PretrainConfig, **changes) -> PretrainConfig:
    return replace(config, feature=replace(config.feature, **changes))


def exponents(config: PretrainConfig, **changes) -> PretrainConfig:
    return replace(config, dynamic=replace(config.dynamic, **changes))


def taps_of(count: int) -> dict[str, tuple]:
    """Taps evenly over 12 blocks, the last one's loss weighing 1 and the others' 0.75."""
    taps = tuple(12 * number // count for number in range(1, count + 1))
    return {"taps": taps, "tap_weights": (*[0.75] * (count - 1), 1.0)}


def table_2() -> list[Row]:
    """Other methods gain by it."""
    return [
        Row("MAE, 300 epochs", mae("b16", 300), 82.9),
        Row("DDS-MAE, 100 epochs", deep("b16", 100), 83.2),
        Row("BEiT-v2, 100 epochs", beitv2("b16", 100), 83.9),
        Row("DDS-BEiT-v2, 100 epochs", dds_beitv2("b16", 100), 84.1),
    ]


def table_3() -> list[Row]:
    """What deep supervision and what dynamic weights bring."""
    base = deep("s16", 100)
    return [
        Row("MAE", pixels(base, dynamic=False, **taps_of(1)), 78.7),
        Row("D-MAE", pixels(base, **taps_of(1)), 78.9),
        Row("DS-MAE", pixels(base, dynamic=False), 79.7),
        Row("DDS-MAE", base, 79.9),
    ]


def table_4() -> list[Row]:
    """Which branch is supervised deeply and dynamically."""
    base, plain = ddae("b16", 100), {"dynamic": False, **taps_of(1)}
    return [
        Row("neither", features(pixels(base, **plain), **plain), 83.0),
        Row("features", pixels(base, **plain), 83.2),
        Row("pixels", features(base, **plain), 83.3),
        Row("both (DDAE)", base, 83.5),
    ]


def table_6() -> list[Row]:
    """How many blocks are supervised."""
    base = deep("s16", 100)
    papers = {1: 78.9, 2: 79.5, 4: 79.9, 6: 79.9}
    return [Row(f"{count} taps", pixels(base, **taps_of(count)), paper) for count, paper in papers.items()]


def table_7() -> list[Row]:
    """Where the exponents begin, and whether they learn."""
    base = deep("s16", 100)
    return [
        Row("fixed, 0", pixels(base, dynamic=False), 79.7),
        Row("fixed, -0.5", exponents(base, learnable=False), 79.5),
        Row("learnable, 0", exponents(base, beta_init=(0.0,)), 79.6),
        Row("learnable, -0.1 to -0.7", exponents(base, beta_init=(-0.1, -0.3, -0.5, -0.7)), 79.5),
        Row("learnable, -0.7 to -0.1", exponents(base, beta_init=(-0.7, -0.5, -0.3, -0.1)), 79.7),
        Row("learnable, -0.5", base, 79.9),
    ]


GRADIENT_VARIANTS = {  # of Eq. 2's gradient and Eq. 6's norm, where the paper allows several (METHOD.md)
    "anchored": {},
    "literal": {"beta_l2": 0.0},
    "flatnorm256": {"beta_l2": 0.0, "norm_batch": 256.0},
    "detach": {"rescale_grad": "detach"},
}


def gradient_variants() -> list[Row]:
    """Not of the paper: what it leaves open about the betas' gradient, on DDAE."""
    base = ddae("s16", 100)
    return [Row(name, exponents(base, **changes), None) for name, changes in GRADIENT_VARIANTS.items()]


def own() -> list[Row]:
    """Not of the paper: what it leaves open and what others do, on DDAE."""
    base = ddae("s16", 100)

    def both(**changes) -> PretrainConfig:
        return pixels(features(base, **changes), **changes)

    return [
        Row("DDAE", base, None),
        Row("BEiT's blocks", replace(base, mask=replace(base.mask, kind="beit_block")), None),
        Row("random masks", replace(base, mask=replace(base.mask, kind="random")), None),
        Row("no ramp", features(base, warmup_fraction=0.0), None),
        Row("ramp over all of training", features(base, warmup_fraction=1.0), None),
        Row("a norm a tap", both(per_tap_norm=True), None),
        Row("a head a tap", both(per_tap_head=True), None),
        Row("cross-attention", both(cross_attention=True), None),
        Row("BootMAE", bootmae("s16", 100), None),
    ]


TABLES: dict[str, Callable[[], list[Row]]] = {
    "2": table_2,
    "3": table_3,
    "4": table_4,
    "6": table_6,
    "7": table_7,
    "gradient_variants": gradient_variants,
    "own": own,
}


def paper(config: PretrainConfig, steps: int | None = None) -> PretrainConfig:
    """As it stands."""
    return config


def nano(config: PretrainConfig, steps: int | None = None) -> PretrainConfig:
    """A minute for a whole table's row: digits of 32 pixels."""
    return _small(config, width=48, image_size=32, patch_size=8, steps=steps or 60, batch=32, lr=2e-3)


def micro(config: PretrainConfig, steps: int | None = None) -> PretrainConfig:
    """Minutes a row on two cores: photographs of 32 pixels."""
    return _small(config, width=64, image_size=32, patch_size=4, steps=steps or 800, batch=32, lr=1.5e-3)


def tiny(config: PretrainConfig, steps: int | None = None) -> PretrainConfig:
    """Minutes a row on one data-centre GPU: photographs of 64 pixels."""
    return _small(config, width=192, image_size=64, patch_size=8, steps=steps or 1500, batch=512, lr=1.5e-3)


CODES = 256  # of a small tokenizer
SCALES: dict[str, Callable[[PretrainConfig, int | None], PretrainConfig]] = {
    "nano": nano,
    "micro": micro,
    "tiny": tiny,
    "paper": paper,
}


def rows(table: str, scale: str, steps: int | None = None) -> list[Row]:
    """The experiments of a table at a scale, of so many steps instead of the scale's own; UserError with the nearest
    name where there is none."""
    for kind, name, known in (("table", table, TABLES), ("scale", scale, SCALES)):
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1, 0)[0]
            raise UserError(f"there is no {kind} {name!r}: the nearest is {nearest!r}, there are {', '.join(known)}")
    return [row._replace(config=SCALES[scale](row.config, steps)) for row in TABLES[table]()]


def _small(
    config: PretrainConfig, width: int, image_size: int, patch_size: int, steps: int, batch: int, lr: float
) -> PretrainConfig:
    """The experiment with a small model of 12 blocks, so that taps stay what they are, and a short run's schedules: a
    teacher whose half-life is an eighth of it, and exponents that move as far as they would in a long one."""
    heads = width // 24
    decoder = {"decoder_width": width, "decoder_heads": heads}
    decoder_depth = min(2, config.pixel.decoder_depth)
    momentum = 0.5 ** (8 / steps)
    return replace(
        pixels(features(config, **decoder, decoder_depth=1), **decoder, decoder_depth=decoder_depth, norm="none"),
        model=replace(config.model, width=width, depth=12, heads=heads, image_size=image_size, patch_size=patch_size),
        token=replace(config.token, codes=CODES),
        dynamic=replace(config.dynamic, lr_mult=4.0, beta_l2=config.dynamic.beta_l2 / 5),
        teacher=TeacherConfig(momentum=momentum),
        data=replace(config.data, batch_size=batch, workers=1, backend="pillow"),
        optim=OptimConfig(lr=lr, min_lr=1e-5, warmup_epochs=0.0, decay_mask_tokens=config.optim.decay_mask_tokens),
        train=TrainConfig(steps=steps, log_every=max(1, steps // 100), save_every=steps, keep=1, report=False),
        engine=PretrainEngineConfig(precision="fp32"),
    )
