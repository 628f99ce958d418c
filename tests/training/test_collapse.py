"""The collapse monitor: what it measures of a micro-batch."""

import math
from dataclasses import replace

import pytest
import ranks
import torch

from ddae.config.presets import preset
from ddae.data.masking import sample_mask
from ddae.distributed.logs import configure_logging
from ddae.method.feature_statistics import feature_std, participation_ratio
from ddae.training.collapse import CollapseMonitor, collapse_risks

CONFIG = preset("demo")  # 8 x 8 patches, taps 2, 4, 6 and 8
MASK = sample_mask("random", torch.arange(40), (8, 8), 48)
GENERATOR = torch.Generator().manual_seed(0)
TOKENS = {tap: torch.randn(40, 17, 24, generator=GENERATOR) for tap in CONFIG.feature.taps}
TEACHER = torch.randn(4, 40, 48, 24, generator=GENERATOR)


def measure(config=CONFIG, tokens=TOKENS, teacher=TEACHER):
    monitor = CollapseMonitor(config)
    monitor.measure(tokens, teacher, MASK)
    return monitor.read({}, True)


def test_student_and_teacher_are_measured_after_each_tap():
    row = measure()
    for number, tap in enumerate(CONFIG.feature.taps):
        for name, tokens in (("student", TOKENS[tap][:, 1:]), ("teacher", TEACHER[number])):  # without the cls token
            images = tokens.mean(1)
            expected = {"image_rank": participation_ratio(images), "image_std": feature_std(images)}
            for statistic, value in expected.items():
                assert row[f"collapse/{name}/{statistic}/tap_{tap:02d}"] == pytest.approx(float(value), rel=1e-4)


@pytest.mark.parametrize("norm", ["layer", "instance_layer", "batch_layer", "none"])
def test_targets_that_are_the_images_mean_are_explained_by_it(norm):
    """Where the normalisation does not remove it."""
    teacher = TEACHER[:, :, :1].expand_as(TEACHER) + 0.01 * TEACHER
    row = measure(replace(CONFIG, feature=replace(CONFIG.feature, target_norm=norm)), teacher=teacher)
    for tap in CONFIG.feature.taps:
        share = row[f"collapse/target/image/tap_{tap:02d}"]
        assert share < 0.05 if norm == "instance_layer" else share > 0.95


def test_targets_that_depend_on_the_position_alone_give_one_warning(capsys):
    configure_logging()
    by_position = torch.randn(4, 64, 24, generator=GENERATOR)
    teacher = by_position[:, MASK.masked] + 0.05 * TEACHER
    monitor = CollapseMonitor(CONFIG)
    for _ in range(2):
        monitor.measure(TOKENS, teacher, MASK)
        assert monitor.read({}, True)["collapse/warning"] == 1
    assert capsys.readouterr().out.count("of the teacher's targets follow from the position of a patch alone") == 1
    assert measure()["collapse/warning"] == 0


@pytest.mark.parametrize(
    "norm, warmed_up, errors, warned",
    [
        ("per_channel", True, (0.97, 0.98), True),
        ("per_channel", False, (0.97, 0.98), False),
        ("per_channel", True, (0.98, 0.9), False),
        ("none", True, (0.97, 0.98), False),  # the variance of plain pixels is not 1
        ("joint", True, (math.nan, math.nan), False),
        ("joint", True, (), False),  # without a pixel branch
    ],
)
def test_a_pixel_branch_that_has_not_learnt_gives_one_warning(norm, warmed_up, errors, warned, capsys):
    configure_logging()
    monitor = CollapseMonitor(replace(CONFIG, pixel=replace(CONFIG.pixel, norm=norm)))
    losses = {f"error/pixel/tap_{number:02d}": error for number, error in enumerate(errors)}
    for _ in range(2):
        monitor.measure(TOKENS, TEACHER, MASK)
        assert monitor.read(losses, warmed_up)["collapse/warning"] == warned
    assert capsys.readouterr().out.count("the pixel branch explains 3.0% of its targets") == warned


@pytest.mark.parametrize(
    "name, changes, num_steps, named",
    [
        ("ddae_vit_b16_100e", {}, 31_250, []),
        ("ddae_vit_b16_100e", {}, 1000, ["pixel.norm is per_channel"]),
        ("ddae_vit_b16_100e", {"norm": "joint"}, 1000, []),
        ("bootmae_vit_b16_100e", {}, 31_250, []),
        ("bootmae_vit_b16_100e", {}, 1000, ["feature.target_norm is layer", "pixel.norm is per_channel"]),
        ("dds_mae_vit_s16_100e", {"norm": "per_channel"}, 1000, []),  # without a teacher
        ("demo", {}, 1423, []),
    ],
)
def test_settings_that_collapse_in_short_runs_are_named(name, changes, num_steps, named):
    config = preset(name)
    risks = collapse_risks(replace(config, pixel=replace(config.pixel, **changes)), num_steps)
    assert [risk.partition(":")[0] for risk in risks] == named


def test_non_finite_tokens_are_reported_as_nan():
    row = measure(teacher=torch.full_like(TEACHER, torch.nan))
    assert math.isnan(row["collapse/teacher/image_std/tap_02"])
    assert math.isfinite(row["collapse/student/image_std/tap_02"])
    assert row["collapse/warning"] == 0
    assert all(math.isnan(value) for name, value in row.items() if name.startswith("collapse/target/"))


def test_a_run_warns_at_its_start(shards, tmp_path):
    options = "--engine.precision fp32 --feature.target_norm layer --train.steps 2".split()
    code, output = ranks.run_command("launch/pretrain.py", *ranks.arguments(shards, tmp_path / "run", 0, *options))
    assert code == 0, output
    assert output.count("feature.target_norm is layer: the targets of a run of 2 steps are nearly the same") == 1
