"""The paper's tables: each row is the table's base config with a few fields changed, and the paper's number.

Tables 3, 6 and 7 have the base DDS-MAE ViT-S: the numbers of the rows that they share agree. Table 4 has DDAE ViT-B;
Table 2 compares methods. A scale changes model, data and length, and leaves what a row varies: nano is a functional
test, micro and tiny are for single machines.
"""

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from ddae.config.base import OptimConfig, TrainConfig
from ddae.config.presets import beitv2, bootmae, ddae, dds_beitv2, dds_mae, mae
from ddae.config.pretrain import PretrainConfig, PretrainEngineConfig, TeacherConfig
from ddae.errors import UserError

WARMUP_FRACTION = 0.1  # share of a small run's steps in which the learning rate is warmed up
SMALL_CODEBOOK = 256  # codes of a small scale's tokenizer


class Row(NamedTuple):
    """One experiment of a table."""

    name: str
    config: PretrainConfig
    paper: float | None  # ImageNet top-1 accuracy after fine-tuning, in per cent; None if the paper has no such row


def with_pixel(config: PretrainConfig, **changes) -> PretrainConfig:
    """Return the config with changed fields of its pixel branch."""
    return replace(config, pixel=replace(config.pixel, **changes))


def with_feature(config: PretrainConfig, **changes) -> PretrainConfig:
    """Return the config with changed fields of its feature branch."""
    return replace(config, feature=replace(config.feature, **changes))


def with_dynamic(config: PretrainConfig, **changes) -> PretrainConfig:
    """Return the config with changed fields of its dynamic loss."""
    return replace(config, dynamic=replace(config.dynamic, **changes))


def evenly_spaced_taps(count: int) -> dict[str, tuple]:
    """Return `count` taps spread evenly over 12 blocks; the loss at the last one weighs 1, the others 0.75."""
    taps = tuple(12 * number // count for number in range(1, count + 1))
    return {"taps": taps, "tap_weights": (*[0.75] * (count - 1), 1.0)}


def table_2() -> list[Row]:
    """Deep dynamic supervision added to other methods."""
    return [
        Row("MAE, 300 epochs", mae("b16", 300), 82.9),
        Row("DDS-MAE, 100 epochs", dds_mae("b16", 100), 83.2),
        Row("BEiT-v2, 100 epochs", beitv2("b16", 100), 83.9),
        Row("DDS-BEiT-v2, 100 epochs", dds_beitv2("b16", 100), 84.1),
    ]


def table_3() -> list[Row]:
    """Deep supervision and dynamic loss, each alone and together."""
    base = dds_mae("s16", 100)
    return [
        Row("MAE", with_pixel(base, dynamic=False, **evenly_spaced_taps(1)), 78.7),
        Row("D-MAE", with_pixel(base, **evenly_spaced_taps(1)), 78.9),
        Row("DS-MAE", with_pixel(base, dynamic=False), 79.7),
        Row("DDS-MAE", base, 79.9),
    ]


def table_4() -> list[Row]:
    """Deep supervision and dynamic loss in one branch or both."""
    base, plain = ddae("b16", 100), {"dynamic": False, **evenly_spaced_taps(1)}
    return [
        Row("neither", with_feature(with_pixel(base, **plain), **plain), 83.0),
        Row("features", with_pixel(base, **plain), 83.2),
        Row("pixels", with_feature(base, **plain), 83.3),
        Row("both (DDAE)", base, 83.5),
    ]


def table_6() -> list[Row]:
    """Number of supervised blocks."""
    base = dds_mae("s16", 100)
    papers = {1: 78.9, 2: 79.5, 4: 79.9, 6: 79.9}
    return [
        Row(f"{count} taps", with_pixel(base, **evenly_spaced_taps(count)), paper) for count, paper in papers.items()
    ]


def table_7() -> list[Row]:
    """Initial values of the betas, learned or fixed."""
    base = dds_mae("s16", 100)
    return [
        Row("fixed, 0", with_pixel(base, dynamic=False), 79.7),
        Row("fixed, -0.5", with_dynamic(base, learnable=False), 79.5),
        Row("learnable, 0", with_dynamic(base, beta_init=(0.0,)), 79.6),
        Row("learnable, -0.1 to -0.7", with_dynamic(base, beta_init=(-0.1, -0.3, -0.5, -0.7)), 79.5),
        Row("learnable, -0.7 to -0.1", with_dynamic(base, beta_init=(-0.7, -0.5, -0.3, -0.1)), 79.7),
        Row("learnable, -0.5", base, 79.9),
    ]


GRADIENT_VARIANTS = {  # interpretations of Eq. 2's gradient and Eq. 6's norm, which the paper leaves open (METHOD.md)
    "anchored": {},
    "literal": {"beta_l2": 0.0},
    "flatnorm256": {"beta_l2": 0.0, "norm_batch": 256.0},
    "detach": {"rescale_grad": "detach"},
}


def gradient_variants() -> list[Row]:
    """Not in the paper: the gradient variants of the betas, on DDAE."""
    base = ddae("s16", 100)
    return [Row(name, with_dynamic(base, **changes), None) for name, changes in GRADIENT_VARIANTS.items()]


def own() -> list[Row]:
    """Not in the paper: its open choices and those of other methods, on DDAE."""
    base = ddae("s16", 100)

    def both(**changes) -> PretrainConfig:
        return with_pixel(with_feature(base, **changes), **changes)

    return [
        Row("DDAE", base, None),
        Row("BEiT block masks", replace(base, mask=replace(base.mask, kind="beit_block")), None),
        Row("random masks", replace(base, mask=replace(base.mask, kind="random")), None),
        Row("no feature warm-up", with_feature(base, warmup_fraction=0.0), None),
        Row("feature warm-up over all steps", with_feature(base, warmup_fraction=1.0), None),
        Row("norm per tap", both(per_tap_norm=True), None),
        Row("head per tap", both(per_tap_head=True), None),
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
    """Return the config unchanged."""
    return config


def nano(config: PretrainConfig, steps: int | None = None) -> PretrainConfig:
    """A minute a row on CPU cores: digits of 32 pixels."""
    return _small(config, width=48, image_size=32, patch_size=8, steps=steps or 60, batch=32, lr=2e-3)


def micro(config: PretrainConfig, steps: int | None = None) -> PretrainConfig:
    """Minutes a row on two CPU cores: photographs of 32 pixels."""
    return _small(config, width=64, image_size=32, patch_size=4, steps=steps or 800, batch=32, lr=1.5e-3)


def tiny(config: PretrainConfig, steps: int | None = None) -> PretrainConfig:
    """Minutes a row on one data-centre GPU: photographs of 64 pixels."""
    return _small(config, width=192, image_size=64, patch_size=8, steps=steps or 1500, batch=512, lr=1.5e-3)


SCALES: dict[str, Callable[[PretrainConfig, int | None], PretrainConfig]] = {
    "nano": nano,
    "micro": micro,
    "tiny": tiny,
    "paper": paper,
}


def table_rows(table: str, scale: str, steps: int | None = None) -> list[Row]:
    """Return the experiments of a table at a scale.

    steps: of pretraining; None: the scale's. Raise UserError, with the nearest name, for an unknown table or scale.
    """
    for kind, name, known in (("table", table, TABLES), ("scale", scale, SCALES)):
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1, 0)[0]
            raise UserError(f"unknown {kind} {name!r}; the nearest is {nearest!r}. Choose from {', '.join(known)}.")
    return [row._replace(config=SCALES[scale](row.config, steps)) for row in TABLES[table]()]


def _small(
    config: PretrainConfig, width: int, image_size: int, patch_size: int, steps: int, batch: int, lr: float
) -> PretrainConfig:
    """Return the experiment with a small model and the schedules of a short run.

    The model has 12 blocks, so that taps need no change. The teacher's half-life is an eighth of the run. The learning
    rate of the betas lets them move as far as in a long run.
    """
    heads = width // 24
    decoder = {"decoder_width": width, "decoder_heads": heads}
    decoder_depth = min(2, config.pixel.decoder_depth)
    return replace(
        with_pixel(
            with_feature(config, **decoder, decoder_depth=1), **decoder, decoder_depth=decoder_depth, norm="none"
        ),
        model=replace(config.model, width=width, depth=12, heads=heads, image_size=image_size, patch_size=patch_size),
        token=replace(config.token, codes=SMALL_CODEBOOK),
        dynamic=replace(config.dynamic, lr_mult=4.0, beta_l2=config.dynamic.beta_l2 / 5),
        teacher=TeacherConfig(momentum=0.5 ** (8 / steps)),
        data=replace(config.data, batch_size=batch, workers=1, backend="pillow"),
        optim=OptimConfig(lr=lr, min_lr=1e-5, warmup_epochs=0.0, decay_mask_tokens=config.optim.decay_mask_tokens),
        train=TrainConfig(steps=steps, log_every=max(1, steps // 100), save_every=steps, keep=1, report=False),
        engine=PretrainEngineConfig(precision="fp32"),
    )
