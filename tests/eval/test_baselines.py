"""What accuracies are compared with."""

import numpy as np
import pytest
import torch

from ddae.config.pretrain import ModelConfig
from ddae.eval import baselines
from ddae.eval.baselines import Measured, chance, compare, grey, paired_error, untrained_encoder, verdict
from ddae.models.vit import Encoder

SAME = "no difference from untrained weights"
SMALL = ModelConfig(width=32, depth=2, heads=2, image_size=16, patch_size=8)


def test_chance_is_the_most_frequent_class():
    assert chance(torch.tensor([0, 1, 1, 2]), torch.tensor([1, 1, 0, 2, 1])) == pytest.approx(60)
    assert chance(torch.arange(10), torch.arange(10)) == pytest.approx(10)


def test_the_error_is_that_of_a_paired_difference():
    """Of 1000 images 300 are right in both, 120 in the first alone, 80 in the second alone: differences of mean 0.04
    and variance 0.2 - 0.0016, so 1.409 points for their mean; unpaired it would be 2.2."""
    first = torch.tensor([True] * 420 + [False] * 580)
    second = torch.tensor([True] * 300 + [False] * 120 + [True] * 80 + [False] * 500)
    assert paired_error(first, second) == pytest.approx(100 * ((0.2 - 0.0016) / 1000) ** 0.5, rel=0.03)
    draws = np.random.default_rng(1).integers(0, 1000, (2000, 1000))  # images, one by one
    by_image = (first.numpy()[draws].mean(1) - second.numpy()[draws].mean(1)).std()
    assert paired_error(first, second) == pytest.approx(100 * by_image, rel=0.06)
    assert paired_error(first, first) == pytest.approx(100 * (2 / 1002 / 1000) ** 0.5, rel=0.05)
    few = torch.ones(3, dtype=torch.bool)
    assert paired_error(few, ~few) > 30  # three images that agree are no proof


@pytest.mark.parametrize(
    "extra, words",
    [
        (0, f"{SAME}: k-NN 40.0 %, untrained weights 40.0 % (difference +0.0 ± 0.1 points)"),
        (20, f"{SAME}: k-NN 42.0 %, untrained weights 40.0 % (difference +2.0 ± "),
        (150, "k-NN 55.0 %, 15.0 ± "),
        (-150, "k-NN 25.0 %, 15.0 ± "),
    ],
)
def test_the_first_line_says_whether_there_is_a_gain(extra, words):
    """20 of 1000 images more, of 400 that change either way, lie within two standard errors; 150 more do not."""
    untrained = torch.tensor([True] * 400 + [False] * 600)
    right = untrained.clone()
    if extra == 20:
        right[:190], right[400:610] = False, True
    elif extra > 0:
        right[400 : 400 + extra] = True
    else:
        right[:-extra] = False
    line = compare(right, untrained, raw_pixels=30.0, chance=10.0).results("k-NN")["verdict"]
    assert line.startswith(words)
    assert line.endswith("raw pixels 30.0 %, chance 10.0 %")
    assert ("points above" in line) == (extra == 150)
    assert ("points BELOW" in line) == (extra == -150)


def test_without_an_untrained_encoder_the_line_says_so():
    compared = compare(torch.tensor([True, False]), None, raw_pixels=30.0, chance=10.0)
    assert (
        verdict(compared, "top-1") == "top-1 50.0 %; untrained weights not measured, raw pixels 30.0 %, chance 10.0 %"
    )


def test_untrained_weights_have_the_architecture_and_a_seed():
    like = Encoder(SMALL)
    like.normalisation = "imagenet"
    one, same, other = (untrained_encoder(like, seed) for seed in (0, 0, 1))
    assert one.shape == SMALL
    assert one.normalisation == "imagenet"
    weights = [each.blocks[0].mlp.fc1.weight for each in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_grey_leaves_neither_colour_nor_contrast():
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[1] = images[0] // 4 + 100  # the same, dark and pale
    images[2] = 77  # of one colour
    found = grey(images)
    assert found.dtype == torch.uint8
    assert torch.equal(found[:, 0], found[:, 1])
    assert (found[0].int() - found[1].int()).abs().float().mean() < 4
    assert found[0].float().mean() == pytest.approx(128, abs=1.5)
    assert (found[2] == 128).all()


def test_a_tenth_of_train_chooses_features():
    held = baselines.selection_part(1000)
    assert held.sum() == 100
    assert torch.equal(held, baselines.selection_part(1000))
    assert baselines.selection_part(1_000_000).sum() == 10_000
    assert not baselines.selection_part(5).any()
    assert len(set((held.nonzero()[:, 0] % 10).tolist())) == 10  # not every tenth one


def test_an_untrained_result_is_remembered_by_architecture_and_protocol(tmp_path, capsys):
    encoder = untrained_encoder(Encoder(SMALL))
    measured = Measured("block 2 cls", 50.0, torch.tensor([True, False]))
    protocol = {"task": "knn", "k": 20, "data": ["a", "b"]}
    assert baselines.recall(tmp_path, encoder, protocol) is None
    baselines.remember(tmp_path, encoder, protocol, measured)
    found = baselines.recall(tmp_path, encoder, protocol)
    assert (found.feature, found.accuracy, found.right.tolist()) == ("block 2 cls", 50.0, [True, False])
    assert baselines.recall(tmp_path, encoder, protocol | {"k": 10}) is None
    assert baselines.recall(tmp_path, untrained_encoder(encoder, 1), protocol) is None
    (file,) = (tmp_path / "baselines").iterdir()
    file.write_text("{")
    assert baselines.recall(tmp_path, encoder, protocol) is None
    (tmp_path / "file").touch()
    baselines.remember(tmp_path / "file", encoder, protocol, measured)
    assert "measured again next time" in capsys.readouterr().out
