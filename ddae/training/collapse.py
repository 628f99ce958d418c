"""Collapse monitor: label-free statistics of student, teacher and targets at log steps of a run with a teacher.

    collapse/student/patch_rank/tap_03    effective rank (participation ratio) over patches of images
    collapse/student/patch_std/tap_03     standard deviation over them, 1 for isotropic features
    collapse/student/image_rank/tap_03    the same over images, each the mean of its patches
    collapse/student/image_std/tap_03
    collapse/teacher/...                  of the teacher's tokens, before any norm
    collapse/target/constant/tap_03       share of the normalised targets that a constant explains,
    collapse/target/position/tap_03       the position of a patch,
    collapse/target/image/tap_03          the image's mean

The student's tokens are those of the visible patches, the teacher's those of the masked ones.
"""

import torch
from ddae_kernels.dynamic import LAYER_NORM_EPS
from ddae_kernels.reference import feature_target
from torch import Tensor

from ddae.config.pretrain import PretrainConfig, tap_name
from ddae.data.masking import Mask
from ddae.distributed.comm import mean_over_ranks
from ddae.method.feature_statistics import PATCH_IMAGES, explained_shares, token_statistics


class CollapseMonitor:
    """Measures a micro-batch on the device; read() synchronises and belongs to log steps."""

    def __init__(self, config: PretrainConfig):
        self.target_norm = config.feature.target_norm
        self.num_positions = config.grid[0] * config.grid[1]
        self.names: list[str] = []
        self._values: Tensor | None = None

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
        """Return the metrics of the micro-batch that was measured last, as means over the ranks. All ranks call it."""
        assert self._values is not None
        return dict(zip(self.names, mean_over_ranks(self._values).tolist(), strict=True))
