"""The preset own: what follows from the number and size of the images."""

import pytest

from ddae.config.cli import normalise, parse
from ddae.config.own import FEW_STEPS, Images, describe, own
from ddae.config.pretrain import check


@pytest.mark.parametrize("count", [1, 100, 2_000, 20_001, 200_001, 14_000_000])
@pytest.mark.parametrize("side", [0, 40, 64, 500])
@pytest.mark.parametrize("has_gpu", [False, True])
def test_settings_are_valid(count, side, has_gpu):
    config = own(Images(count, side), has_gpu)
    check(config)
    assert config.engine.precision == ("bf16" if has_gpu else "fp32")
    assert config.num_steps(count) >= 2000
    half_life = config.num_steps(count) / 8
    assert config.teacher.momentum**half_life == pytest.approx(0.5, rel=0.05)


def test_more_images_are_trained_longer_and_on_a_gpu_with_a_larger_model():
    few, many = (own(Images(count, 500), has_gpu=False) for count in (2_000, 100_000))
    assert few.num_steps(2_000) == 2000
    assert many.num_steps(100_000) == 62_500
    widths = [own(Images(count, 500), has_gpu=True).model.width for count in (2_000, 100_000, 1_000_000)]
    assert widths == [192, 384, 768]


def test_small_images_are_not_enlarged():
    assert own(Images(2_000, 32), has_gpu=False).model.image_size == 32
    assert own(Images(2_000, 64), has_gpu=False).model.image_size == 64


def test_short_training_is_reported():
    images = Images(2_000, 500)
    config = parse(["--preset", "own", "--train.steps", str(FEW_STEPS - 1)], start=own(images, has_gpu=False))
    assert "warning: fewer than 1,000 steps" in describe(config, images, has_gpu=False)
    assert "2,000 steps of 16 images" in describe(own(images, has_gpu=False), images, has_gpu=False)


def test_short_flags():
    assert normalise(["--out", "x", "--labels=none", "--val-share", "0.1"]) == [
        *("--run_dir", "x", "--data.labels=none", "--data.val_share", "0.1")
    ]
