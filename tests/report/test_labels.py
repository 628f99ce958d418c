"""Names in the figures of a run."""

import pytest

from ddae.report.figures import label


@pytest.mark.parametrize(
    "metric, expected",
    [
        ("error/pixel/tap_02", "block 2"),
        ("loss/feature/tap_12", "block 12"),
        ("beta/tap_03", "block 3"),
        ("tap_03", "block 3"),
        ("beta/pixel/tap_03", "pixel, block 3"),
        ("feature/tap_03", "feature, block 3"),
        ("knn/tap_04/cls", "block 4, cls"),
        ("collapse/teacher/image_rank/tap_08", "block 8"),
        ("features/effective_rank/tap_08", "block 8"),
        ("knn/raw_pixels", "raw pixels"),
        ("val/top1", "top1"),
    ],
)
def test_label(metric, expected):
    assert label(metric) == expected
