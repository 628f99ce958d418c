"""The paper's tables: each row is the table's base config with a few fields changed, and the paper's number.

Tables 3, 6 and 7 have the base DDS-MAE ViT-S: the numbers of the rows that they share agree. Table 4 has DDAE ViT-B;
Table 2 compares methods. A scale (config/scales.py) changes model, data and length, and leaves what a row varies.
"""

import difflib
from collections.abc import Callable
from typing import NamedTuple

from ddae.config.presets import beitv2, bootmae, ddae, dds_beitv2, dds_mae, mae
from ddae.config.pretrain import PretrainConfig
from ddae.config.scales import SCALES, at_scale, change
from ddae.errors import UserError


class Row(NamedTuple):
    """One experiment of a table."""

    name: str
    config: PretrainConfig
    paper: float | None  # ImageNet top-1 accuracy after fine-tuning, in per cent; None if the paper has no such row


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
        Row("pixels", change(base, "feature", **plain), 83.3),
        Row("both (DDAE)", base, 83.5),
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


TABLES: dict[str, Callable[[], list[Row]]] = {
    "2": table_2,
    "3": table_3,
    "4": table_4,
    "6": table_6,
    "7": table_7,
    "gradient_variants": gradient_variants,
    "own": own,
}


def table_rows(table: str, scale: str, steps: int | None = None) -> list[Row]:
    """Return the experiments of a table at a scale.

    steps: of pretraining; None: the scale's. Raise UserError, with the nearest name, for an unknown table or scale.
    """
    for kind, name, known in (("table", table, TABLES), ("scale", scale, SCALES)):
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1, 0)[0]
            raise UserError(f"unknown {kind} {name!r}; the nearest is {nearest!r}. Choose from {', '.join(known)}.")
    return [row._replace(config=at_scale(row.config, scale, steps)) for row in TABLES[table]()]
