"""Baselines: chance, untrained weights, raw pixels; the verdict, and the cache of results."""

import numpy as np
import pytest
import torch

from ddae.config.pretrain import ModelConfig
from ddae.distributed.logs import configure_logging
from ddae.eval import baselines
from ddae.eval.baselines import (
    FeatureAccuracy,
    chance,
    compare,
    paired_standard_error,
    to_grey,
    untrained_encoder,
    verdict,
)
from ddae.models.vit import Encoder

SAME = "no difference from untrained weights"
SMALL = ModelConfig(width=32, depth=2, heads=2, image_size=16, patch_size=8)


def test_chance_is_the_most_frequent_training_class():
    assert chance(torch.tensor([0, 1, 1, 2]), torch.tensor([1, 1, 0, 2, 1])) == pytest.approx(60)
    assert chance(torch.arange(10), torch.arange(10)) == pytest.approx(10)


def test_paired_standard_error():
    """Of 1000 images 300 are correct in both, 120 in the first alone, 80 in the second alone: differences of mean 0.04
    and variance 0.2 - 0.0016, so a standard error of 1.409 points; unpaired it would be 2.2."""
    first = torch.tensor([True] * 420 + [False] * 580)
    second = torch.tensor([True] * 300 + [False] * 120 + [True] * 80 + [False] * 500)
    assert paired_standard_error(first, second) == pytest.approx(100 * ((0.2 - 0.0016) / 1000) ** 0.5, rel=0.03)
    draws = np.random.default_rng(1).integers(0, 1000, (2000, 1000))  # bootstrap over single images
    by_image = (first.numpy()[draws].mean(1) - second.numpy()[draws].mean(1)).std()
    assert paired_standard_error(first, second) == pytest.approx(100 * by_image, rel=0.06)
    assert paired_standard_error(first, first) == pytest.approx(100 * (2 / 1002 / 1000) ** 0.5, rel=0.05)
    three = torch.ones(3, dtype=torch.bool)
    assert paired_standard_error(three, ~three) > 30  # three images that agree are not significant


@pytest.mark.parametrize(
    "extra, expected",
    [
        (0, f"{SAME}: k-NN 40.0 %, untrained weights 40.0 % (difference +0.0 ± 0.1 points)"),
        (20, f"{SAME}: k-NN 42.0 %, untrained weights 40.0 % (difference +2.0 ± "),
        (150, "k-NN 55.0 %, 15.0 ± "),
        (-150, "k-NN 25.0 %, 15.0 ± "),
    ],
)
def test_verdict_reports_significant_gains_only(extra, expected):
    """20 of 1000 images more, with 400 that change either way, are within two standard errors; 150 more are not."""
    untrained = torch.tensor([True] * 400 + [False] * 600)
    correct = untrained.clone()
    if extra == 20:
        correct[:190], correct[400:610] = False, True
    elif extra > 0:
        correct[400 : 400 + extra] = True
    else:
        correct[:-extra] = False
    line = compare(correct, untrained, raw_pixels=30.0, chance=10.0).results("k-NN")["verdict"]
    assert line.startswith(expected)
    assert line.endswith("raw pixels 30.0 %, chance 10.0 %")
    assert ("points above" in line) == (extra == 150)
    assert ("points BELOW" in line) == (extra == -150)


def test_verdict_without_untrained_encoder():
    comparison = compare(torch.tensor([True, False]), None, raw_pixels=30.0, chance=10.0)
    expected = "top-1 50.0 %; untrained weights not measured, raw pixels 30.0 %, chance 10.0 %"
    assert verdict(comparison, "top-1") == expected


def test_untrained_encoder_has_the_architecture_and_a_seed():
    like = Encoder(SMALL)
    like.normalisation = "imagenet"
    one, same, other = (untrained_encoder(like, seed) for seed in (0, 0, 1))
    assert one.shape == like.shape
    assert one.normalisation == "imagenet"
    weights = [each.blocks[0].mlp.fc1.weight for each in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_to_grey_removes_colour_brightness_and_contrast():
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[1] = images[0] // 4 + 100  # the same image with less contrast
    images[2] = 77  # constant
    grey = to_grey(images)
    assert grey.dtype == torch.uint8
    assert torch.equal(grey[:, 0], grey[:, 1])
    assert (grey[0].int() - grey[1].int()).abs().float().mean() < 4
    assert grey[0].float().mean() == pytest.approx(128, abs=1.5)
    assert (grey[2] == 128).all()


def test_selection_mask_is_a_tenth_of_train():
    mask = baselines.selection_mask(1000)
    assert mask.sum() == 100
    assert torch.equal(mask, baselines.selection_mask(1000))
    assert baselines.selection_mask(1_000_000).sum() == 10_000
    assert not baselines.selection_mask(5).any()
    assert len(set((mask.nonzero()[:, 0] % 10).tolist())) == 10  # not every tenth image


def test_cache_is_keyed_by_architecture_weights_and_protocol(tmp_path, capsys):
    encoder = untrained_encoder(Encoder(SMALL))
    result = FeatureAccuracy("block 2 cls", 50.0, torch.tensor([True, False]))
    protocol = {"task": "knn", "k": 20, "data": ["a", "b"]}
    assert baselines.load_cached(tmp_path, encoder, protocol) is None
    baselines.store_cached(tmp_path, encoder, protocol, result)
    cached = baselines.load_cached(tmp_path, encoder, protocol)
    assert (cached.feature, cached.accuracy, cached.correct.tolist()) == ("block 2 cls", 50.0, [True, False])
    assert baselines.load_cached(tmp_path, encoder, protocol | {"k": 10}) is None
    assert baselines.load_cached(tmp_path, untrained_encoder(encoder, 1), protocol) is None
    (file,) = (tmp_path / "baselines").iterdir()
    file.write_text("{")
    assert baselines.load_cached(tmp_path, encoder, protocol) is None
    configure_logging()
    (tmp_path / "file").touch()
    baselines.store_cached(tmp_path / "file", encoder, protocol, result)
    assert "will be evaluated again next time" in capsys.readouterr().out
