"""Collapse monitor: label-free statistics of student, teacher and targets at log steps of a run with a teacher.

    collapse/student/patch_rank/tap_03    effective rank (participation ratio) over patches of images
    collapse/student/patch_std/tap_03     standard deviation over them, 1 for isotropic features
    collapse/student/image_rank/tap_03    the same over images, each the mean of its patches
    collapse/student/image_std/tap_03
    collapse/teacher/...                  of the teacher's tokens, before any norm
    collapse/target/constant/tap_03       share of the normalised targets that a constant explains,
    collapse/target/position/tap_03       the position of a patch,
    collapse/target/image/tap_03          the image's mean
    collapse/warning                      1 if the position explains more than MAX_POSITION_SHARE of a tap's targets

The student's tokens are those of the visible patches, the teacher's those of the masked ones. A teacher has collapsed
when its features no longer depend on what is in the image: the student then predicts them from the position, with an
error near 0, and learns nothing.
"""

import logging

import torch
from ddae_kernels.dynamic import LAYER_NORM_EPS
from ddae_kernels.reference import feature_target
from torch import Tensor

from ddae.config.pretrain import PretrainConfig, tap_name
from ddae.data.masking import Mask
from ddae.distributed.comm import is_main, mean_over_ranks
from ddae.method.feature_statistics import PATCH_IMAGES, explained_shares, token_statistics

# Of the targets' mean square. An untrained encoder of 1.2 M parameters has 0.7 with target_norm layer, 0.4 by default.
MAX_POSITION_SHARE = 0.85
logger = logging.getLogger(__name__)


class CollapseMonitor:
    """Measures a micro-batch on the device; read() synchronises and belongs to log steps."""

    def __init__(self, config: PretrainConfig):
        self.target_norm = config.feature.target_norm
        self.num_positions = config.grid[0] * config.grid[1]
        self.names: list[str] = []
        self._values: Tensor | None = None
        self._has_warned = False

    @torch.no_grad()
    def measure(self, tokens: dict[int, Tensor], teacher_tokens: Tensor, mask: Mask) -> None:
        """Measure a micro-batch.

        tokens: of the student by block, [B, 1 + V, D]; teacher_tokens: of the masked patches after the same blocks,
        [K, B, M, D].
        """
        student = torch.stack([each[:, 1:] for each in tokens.values()])
        target = feature_target(teacher_tokens[:, :PATCH_IMAGES], self.target_norm, LAYER_NORM_EPS, torch.float32)
        groups = {
            "student": token_statistics(student),
            "teacher": token_statistics(teacher_tokens),
            "target": explained_shares(target, mask.masked[:PATCH_IMAGES], self.num_positions),
        }
        by_name = {f"collapse/{group}/{name}": values for group, of in groups.items() for name, values in of.items()}
        self.names = [f"{name}/{tap_name(tap)}" for name in by_name for tap in tokens]
        self._values = torch.cat(list(by_name.values()))

    def read(self) -> dict[str, float]:
        """Return the metrics of the micro-batch that was measured last, as means over the ranks. All ranks call it.

        Log a warning when the targets first depend on the position alone.
        """
        assert self._values is not None
        row = dict(zip(self.names, mean_over_ranks(self._values).tolist(), strict=True))
        shares = {name: value for name, value in row.items() if name.startswith("collapse/target/position/")}
        collapsed = {name: value for name, value in shares.items() if value > MAX_POSITION_SHARE}  # NaN is not
        if collapsed and is_main() and not self._has_warned:
            name, share = max(collapsed.items(), key=lambda item: item[1])
            logger.warning(
                "%s: %.0f %% of the teacher's targets follow from the position of a patch alone; expected at most "
                "%.0f %%. The features are collapsing. Use feature.target_norm instance_layer, or a teacher that "
                "follows more slowly.",
                *(name.rpartition("/")[2], 100 * share, 100 * MAX_POSITION_SHARE),
            )
            self._has_warned = True
        return row | {"collapse/warning": float(bool(collapsed))}
