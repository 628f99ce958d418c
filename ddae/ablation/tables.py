"""The paper's tables: each row is the table's base config with a few fields changed, and the paper's number.

Tables 3, 6 and 7 have the base DDS-MAE ViT-S: the numbers of the rows that they share agree. Table 4 has DDAE ViT-B;
Table 2 compares methods. A scale (config/scales.py) changes model, data and length, and leaves what a row varies.
"""

import difflib
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from ddae.config.presets import beitv2, bootmae, ddae, dds_beitv2, dds_mae, mae
from ddae.config.pretrain import PretrainConfig
from ddae.config.scales import SCALES, at_scale, change
from ddae.errors import UserError
from ddae.training.flops import count_flops


class Row(NamedTuple):
    """One experiment of a table."""

    name: str
    config: PretrainConfig
    paper: float | None  # ImageNet top-1 accuracy after fine-tuning, in per cent; None if the paper has no such row
    adjust: Callable[[PretrainConfig], PretrainConfig] = lambda config: config  # applied after the scale
    lr_factor: float = 1.0  # of the scale's learning rate, at TUNED_SCALES


# Factors of the scale's learning rate: those that the table tuning found to be better than it by more than a standard
# error on a part of train (docs/results.md).
TUNED = {"pixels": 3.0, "DDAE": 3.0}
TUNED_SCALES = ("micro", "small")


def evenly_spaced_taps(count: int) -> dict[str, tuple]:
    """Return `count` taps spread evenly over 12 blocks; the loss at the last one weighs 1, the others 0.75."""
    taps = tuple(12 * number // count for number in range(1, count + 1))
    return {"taps": taps, "tap_weights": (*[0.75] * (count - 1), 1.0)}


def learning_rate(factor: float) -> Callable[[PretrainConfig], PretrainConfig]:
    """Return the adjustment to so many times the learning rate."""
    return lambda config: change(config, "optim", lr=factor * config.peak_lr)


def table_1() -> list[Row]:
    """DDAE and its nearest relative."""
    return [
        Row("BootMAE", bootmae("b16", 100), 83.0),
        Row("DDAE", ddae("b16", 100), 83.5, lr_factor=TUNED["DDAE"]),
    ]


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
        Row("MAE", change(base, "pixel", dynamic=False, **evenly_spaced_taps(1)), 78.7),
        Row("D-MAE", change(base, "pixel", **evenly_spaced_taps(1)), 78.9),
        Row("DS-MAE", change(base, "pixel", dynamic=False), 79.7),
        Row("DDS-MAE", base, 79.9),
    ]


def table_4() -> list[Row]:
    """Deep supervision and dynamic loss in one branch or both."""
    base, plain = ddae("b16", 100), {"dynamic": False, **evenly_spaced_taps(1)}
    return [
        Row("neither", change(base, "pixel", "feature", **plain), 83.0),
        Row("features", change(base, "pixel", **plain), 83.2),
        Row("pixels", change(base, "feature", **plain), 83.3, lr_factor=TUNED["pixels"]),
        Row("both (DDAE)", base, 83.5, lr_factor=TUNED["DDAE"]),
    ]


def table_6() -> list[Row]:
    """Number of supervised blocks."""
    base = dds_mae("s16", 100)
    papers = {1: 78.9, 2: 79.5, 4: 79.9, 6: 79.9}
    return [Row(f"{n} taps", change(base, "pixel", **evenly_spaced_taps(n)), paper) for n, paper in papers.items()]


def table_7() -> list[Row]:
    """Initial values of the betas, learned or fixed."""
    base = dds_mae("s16", 100)
    return [
        Row("fixed, 0", change(base, "pixel", dynamic=False), 79.7),
        Row("fixed, -0.5", change(base, "dynamic", learnable=False), 79.5),
        Row("learnable, 0", change(base, "dynamic", beta_init=(0.0,)), 79.6),
        Row("learnable, -0.1 to -0.7", change(base, "dynamic", beta_init=(-0.1, -0.3, -0.5, -0.7)), 79.5),
        Row("learnable, -0.7 to -0.1", change(base, "dynamic", beta_init=(-0.7, -0.5, -0.3, -0.1)), 79.7),
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
    return [Row(name, change(base, "dynamic", **changes), None) for name, changes in GRADIENT_VARIANTS.items()]


def own() -> list[Row]:
    """Not in the paper: its open choices and those of other methods, on DDAE."""
    base = ddae("s16", 100)
    return [
        Row("DDAE", base, None),
        Row("BEiT block masks", change(base, "mask", kind="beit_block"), None),
        Row("random masks", change(base, "mask", kind="random"), None),
        Row("no feature warm-up", change(base, "feature", warmup_fraction=0.0), None),
        Row("feature warm-up over all steps", change(base, "feature", warmup_fraction=1.0), None),
        Row("norm per tap", change(base, "pixel", "feature", per_tap_norm=True), None),
        Row("head per tap", change(base, "pixel", "feature", per_tap_head=True), None),
        Row("cross-attention", change(base, "pixel", "feature", cross_attention=True), None),
        Row("BootMAE", bootmae("s16", 100), None),
    ]


def tuning() -> list[Row]:
    """Not in the paper: the methods of Tables 1, 3 and 4 with other learning rates."""
    methods = {row.name: row.config for table in (table_3, table_4, table_1) for row in table()}
    methods.pop("DDAE")  # the same as "both (DDAE)"
    factors = {"/ 3": 1 / 3, "x 1": 1.0, "x 3": 3.0}
    return [
        Row(f"{name}, learning rate {text}", config, None, learning_rate(factor))
        for name, config in methods.items()
        for text, factor in factors.items()
    ]


def silences() -> list[Row]:
    """Not in the paper: what it leaves open about the betas, each choice combined with each other, on DDAE."""
    rows = []
    for norm, gradient, l2 in product(("none", "max"), ("full", "detach"), (0.0, 0.05)):
        name = f"distance norm {norm}, gradient {gradient}, L2 {l2:g}"
        options = {"distance_norm": norm, "rescale_grad": gradient, "beta_l2": l2}
        rows.append(Row(name, change(ddae("s16", 100), "dynamic", **options), None, lr_factor=TUNED["DDAE"]))
    return rows


def factors() -> list[Row]:
    """Not in the paper: DDAE with one setting changed, to find what makes its features collapse."""
    base = ddae("s16", 100)

    def taps(count: int) -> PretrainConfig:
        return change(base, "pixel", "feature", **evenly_spaced_taps(count))

    def half_life(share: float) -> Callable[[PretrainConfig], PretrainConfig]:
        """Return the adjustment to a teacher whose half-life is this share of the run."""
        return lambda config: change(config, "teacher", momentum=0.5 ** (1 / (share * (config.train.steps or 1))))

    def batch(factor: int) -> Callable[[PretrainConfig], PretrainConfig]:
        """Return the adjustment to a smaller batch, with as many images."""
        return lambda config: change(
            change(config, "data", batch_size=config.data.batch_size // factor),
            "train",
            steps=(config.train.steps or 1) * factor,
        )

    def pixel_norm(norm: str) -> Callable[[PretrainConfig], PretrainConfig]:
        return lambda config: change(config, "pixel", norm=norm)

    def feature_weight(factor: float) -> PretrainConfig:
        return change(base, "feature", tap_weights=tuple(factor * weight for weight in base.feature.tap_weights))

    return [
        Row("DDAE", base, None),
        Row("target norm layer", change(base, "feature", target_norm="layer"), None),
        Row("target norm batch_layer", change(base, "feature", target_norm="batch_layer"), None),
        Row("target norm none", change(base, "feature", target_norm="none"), None),
        Row("target norm layer, half-life 1/80", change(base, "feature", target_norm="layer"), None, half_life(1 / 80)),
        Row("target norm layer, half-life 1/2", change(base, "feature", target_norm="layer"), None, half_life(1 / 2)),
        Row("half-life 1/80", base, None, half_life(1 / 80)),
        Row("half-life 1/2", base, None, half_life(1 / 2)),
        Row("no feature warm-up", change(base, "feature", warmup_fraction=0.0), None),
        Row("feature warm-up over all steps", change(base, "feature", warmup_fraction=1.0), None),
        Row("feature weight 1/4", feature_weight(0.25), None),
        Row("feature weight 4", feature_weight(4.0), None),
        Row("decoders of 2 blocks", base, None, lambda config: change(config, "pixel", "feature", decoder_depth=2)),
        Row("norm per tap", change(base, "pixel", "feature", per_tap_norm=True), None),
        Row("1 tap", taps(1), None),
        Row("2 taps", taps(2), None),
        Row("random masks", change(base, "mask", kind="random"), None),
        Row("batch / 4", base, None, batch(4)),
        Row("learning rate / 3", base, None, learning_rate(1 / 3)),
        Row("learning rate x 3", base, None, learning_rate(3.0)),
        Row("pixel norm per_channel", base, None, pixel_norm("per_channel")),
        Row("plain pixels", base, None, pixel_norm("none")),
        Row("no feature branch", change(base, "feature", enabled=False), None),
        Row("MAE", mae("s16", 100), None),
        Row("MAE, pixel norm per_channel", mae("s16", 100), None, pixel_norm("per_channel")),
        Row("MAE, plain pixels", mae("s16", 100), None, pixel_norm("none")),
        Row("MAE, learning rate / 3", mae("s16", 100), None, learning_rate(1 / 3)),
        Row("MAE, learning rate x 3", mae("s16", 100), None, learning_rate(3.0)),
    ]


CHEAPER = {"2 taps a step, half of the patches": (2, 0.5), "1 tap a step, half of the patches": (1, 0.5)}


def compute() -> list[Row]:
    """Not in the paper: methods after as many floating-point operations as DDAE. At the scale paper: equal epochs."""
    base = ddae("s16", 100)
    cheaper = {name: replace(base, taps_per_step=k, decode_fraction=share) for name, (k, share) in CHEAPER.items()}
    methods = {"MAE": mae("s16", 100), "DDS-MAE": dds_mae("s16", 100), "BootMAE": bootmae("s16", 100), **cheaper}

    def lengthen(config: PretrainConfig) -> PretrainConfig:
        """Return the config with so many steps that it takes as many operations as DDAE at its scale."""
        if config.train.steps is None:
            return config
        scaled = {name: getattr(config, name) for name in ("model", "data", "engine")}
        decoder = {name: getattr(config.pixel, name) for name in ("decoder_width", "decoder_heads", "decoder_depth")}
        taps = tuple(round(tap * config.model.depth / base.model.depth) for tap in base.pixel.taps)
        reference = change(replace(base, **scaled), "pixel", "feature", taps=taps, **decoder)
        ratio = count_flops(reference).total / count_flops(config).total
        return change(config, "train", steps=round(ratio * config.train.steps))

    factors = dict.fromkeys(cheaper, TUNED["DDAE"])
    return [
        Row("DDAE", base, None, lr_factor=TUNED["DDAE"]),
        *(Row(name, config, None, lengthen, factors.get(name, 1.0)) for name, config in methods.items()),
    ]


TABLES: dict[str, Callable[[], list[Row]]] = {
    "1": table_1,
    "2": table_2,
    "3": table_3,
    "4": table_4,
    "6": table_6,
    "7": table_7,
    "gradient_variants": gradient_variants,
    "own": own,
    "silences": silences,
    "tuning": tuning,
    "factors": factors,
    "compute": compute,
}


def table_rows(table: str, scale: str, steps: int | None = None) -> list[Row]:
    """Return the experiments of a table at a scale.

    steps: of pretraining; None: the scale's. Raise UserError, with the nearest name, for an unknown table or scale.
    """
    for kind, name, known in (("table", table, TABLES), ("scale", scale, SCALES)):
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1, 0)[0]
            raise UserError(f"unknown {kind} {name!r}; the nearest is {nearest!r}. Choose from {', '.join(known)}.")

    def prepare(row: Row) -> Row:
        config = at_scale(row.config, scale, steps)
        if scale in TUNED_SCALES:
            config = learning_rate(row.lr_factor)(config)
        return row._replace(config=row.adjust(config))

    return [prepare(row) for row in TABLES[table]()]
