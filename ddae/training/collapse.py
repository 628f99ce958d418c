"""Collapse monitor: label-free statistics of student, teacher and targets at log steps of a run with a teacher.

    collapse/student/patch_rank/tap_03    effective rank (participation ratio) over patches of images
    collapse/student/patch_std/tap_03     standard deviation over them, 1 for isotropic features
    collapse/student/image_rank/tap_03    the same over images, each the mean of its patches
    collapse/student/image_std/tap_03
    collapse/teacher/...                  of the teacher's tokens, before any norm
    collapse/target/constant/tap_03       share of the normalised targets that a constant explains,
    collapse/target/position/tap_03       the position of a patch,
    collapse/target/image/tap_03          the image's mean
    collapse/warning                      1 if one of the two conditions below holds

The student's tokens are those of the visible patches, the teacher's those of the masked ones. A teacher has collapsed
when its features no longer depend on what is in the image: the student then predicts them from little, and learns
nothing. Two conditions give a warning (METHOD.md has the runs that the numbers come from):

    the position or the image's mean explains more than MAX_TRIVIAL_SHARE of a tap's targets;
    the feature branch has its full weight and the learning rate has reached its peak, but the pixel branch explains
    less than MIN_PIXEL_SHARE of its normalised targets: nothing holds the features to the image.
"""

import logging

import torch
from ddae_kernels.dynamic import LAYER_NORM_EPS
from ddae_kernels.reference import feature_target
from torch import Tensor

from ddae.config.pretrain import PretrainConfig, tap_name
from ddae.data.masking import Mask
from ddae.distributed.comm import is_main, mean_over_ranks
from ddae.method.feature_statistics import TARGET_IMAGES, explained_shares, token_statistics

MAX_TRIVIAL_SHARE = 0.85  # of the feature targets' mean square
SHORT_RUN = 10_000  # steps: runs of up to 4,000 collapsed here; BootMAE's published ones have 31,000 or more
MIN_PIXEL_SHARE = 0.05  # of the pixel targets' mean square, which is 1 if they are normalised
logger = logging.getLogger(__name__)


def collapse_risks(config: PretrainConfig, num_steps: int) -> list[str]:
    """Return a warning for each setting with which runs as short as this one collapsed (METHOD.md)."""
    if not config.feature.enabled or num_steps >= SHORT_RUN:
        return []
    risks = []
    if config.feature.target_norm != "instance_layer":
        risks.append(
            f"feature.target_norm is {config.feature.target_norm}: the targets of a run of {num_steps:,} steps are "
            "nearly the same for all patches, and the encoder learns little. Use instance_layer."
        )
    if config.pixel.enabled and config.pixel.norm == "per_channel":
        risks.append(
            f"pixel.norm is per_channel: in a run of {num_steps:,} steps the pixel branch learns little of such "
            "targets, and the encoder less. Use joint."
        )
    return risks


class CollapseMonitor:
    """Measures a micro-batch on the device; read() synchronises and belongs to log steps."""

    def __init__(self, config: PretrainConfig):
        self.target_norm = config.feature.target_norm
        self.pixel_norm = config.pixel.norm
        self.num_positions = config.grid[0] * config.grid[1]
        self.names: list[str] = []
        self._values: Tensor | None = None
        self._warned: set[str] = set()  # kinds of warnings that were logged

    @torch.no_grad()
    def measure(self, tokens: dict[int, Tensor], teacher_tokens: Tensor, mask: Mask) -> None:
        """Measure a micro-batch.

        tokens: of the student by block, [B, 1 + V, D]; teacher_tokens: of the masked patches after the same blocks,
        [K, B, M, D].
        """
        student = torch.stack([each[:, 1:] for each in tokens.values()])
        target = feature_target(teacher_tokens[:, :TARGET_IMAGES], self.target_norm, LAYER_NORM_EPS, torch.float32)
        groups = {
            "student": token_statistics(student),
            "teacher": token_statistics(teacher_tokens),
            "target": explained_shares(target, mask.masked[:TARGET_IMAGES], self.num_positions),
        }
        by_name = {f"collapse/{group}/{name}": values for group, of in groups.items() for name, values in of.items()}
        self.names = [f"{name}/{tap_name(tap)}" for name in by_name for tap in tokens]
        self._values = torch.cat(list(by_name.values()))

    def read(self, losses: dict[str, float], warmed_up: bool) -> dict[str, float]:
        """Return the metrics of the micro-batch that was measured last, as means over the ranks. All ranks call it.

        losses: metrics of the same step, with error/pixel/... by tap. warmed_up: whether learning rate and weight of
        the feature branch have been warmed up. Log each kind of warning when it first holds.
        """
        assert self._values is not None
        row = dict(zip(self.names, mean_over_ranks(self._values).tolist(), strict=True))
        pixel_errors = [value for name, value in losses.items() if name.startswith("error/pixel/")]
        if self.pixel_norm == "none" or not warmed_up:
            pixel_errors = []
        warnings = {"targets": _trivial_targets(row, self.target_norm), "pixels": _idle_pixels(pixel_errors)}
        for kind, text in warnings.items():
            if text and is_main() and kind not in self._warned:
                logger.warning("%s", text)
                self._warned.add(kind)
        return row | {"collapse/warning": float(any(warnings.values()))}


def _trivial_targets(row: dict[str, float], target_norm: str) -> str:
    """Return a warning if a trivial predictor explains the targets; otherwise an empty string."""
    names = [n for n in row if n.startswith(("collapse/target/position/", "collapse/target/image/"))]
    explained = {name: row[name] for name in names if row[name] > MAX_TRIVIAL_SHARE}  # NaN is not
    if not explained:
        return ""
    name, share = max(explained.items(), key=lambda item: item[1])
    _, _, predictor, tap = name.split("/")
    predictor = {"position": "position of a patch", "image": "mean of the image"}[predictor]
    fix = "" if target_norm == "instance_layer" else " Use feature.target_norm instance_layer."
    return (
        f"{tap}: {share:.0%} of the teacher's targets follow from the {predictor} alone; expected at most "
        f"{MAX_TRIVIAL_SHARE:.0%}. The features are collapsing.{fix}"
    )


def _idle_pixels(errors: list[float]) -> str:
    """Return a warning if the pixel branch explains too little; otherwise an empty string. errors: of its taps."""
    if not errors or not min(errors) > 1 - MIN_PIXEL_SHARE:
        return ""
    return (
        f"the pixel branch explains {max(0.0, 1 - min(errors)):.1%} of its targets; expected at least "
        f"{MIN_PIXEL_SHARE:.0%} after the warm-up of learning rate and feature branch. The features are collapsing. "
        "Use pixel.norm joint, or a longer run."
    )
