"""Random taps and masked patches: uniform draws, and losses and gradients whose mean over all draws is the whole."""

import sys
from dataclasses import replace
from itertools import combinations
from math import comb

import pytest
import torch

from ddae.config.cli import parse
from ddae.config.presets import preset
from ddae.config.pretrain import beta_names, check
from ddae.data.masking import sample_mask
from ddae.data.rng import fold
from ddae.errors import UserError
from ddae.method import branches
from ddae.method.branches import Inputs
from ddae.method.distance import masked_distance
from ddae.method.model import build_model
from ddae.method.partial_supervision import draw_subset, draw_taps, spread_over_taps
from ddae.training.flops import count_flops


def test_taps_are_drawn_uniformly():
    counts = dict.fromkeys(combinations(range(4), 2), 0)
    for step in range(6000):
        counts[draw_taps(4, 2, int(fold(0, step)))] += 1
    assert all(abs(count - 1000) < 120 for count in counts.values())  # four standard deviations
    assert draw_taps(4, 0, 7) == draw_taps(4, 4, 7) == draw_taps(4, 9, 7) == (0, 1, 2, 3)


def test_patches_are_drawn_uniformly_by_seed():
    seeds = fold(0, torch.arange(4000))
    subset = draw_subset(seeds, 12, 5)
    assert subset.shape == (4000, 5)
    assert (subset.diff(dim=1) > 0).all()
    counts = torch.bincount(subset.flatten(), minlength=12)
    assert (counts - 4000 * 5 / 12).abs().max() < 130  # four standard deviations
    assert torch.equal(draw_subset(seeds[7:9], 12, 5), subset[7:9])
    assert draw_subset(seeds, 12, 12) is None


def test_unsupervised_taps_are_nan():
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(spread_over_taps(values, (0, 1), 2), values)
    spread = spread_over_taps(values, (0, 2), 3)
    assert spread[[0, 2]].tolist() == [1, 2]
    assert torch.isnan(spread[1])


def losses_of(config, taps=None, subset=None, images=2):
    """Return the loss, its gradients and the components of the taps, in float64; taps: indices that are drawn."""
    model = build_model(config).double()
    generator = torch.Generator().manual_seed(1)
    size = images, 3, *config.model.height_width
    pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    mask = sample_mask(config.mask.kind, torch.arange(images), config.grid, config.num_masked)
    teacher = torch.randn(4, images, config.num_masked, config.model.width, generator=generator).double()
    betas = torch.linspace(-1, 0.3, len(beta_names(config))).double().requires_grad_()
    inputs = Inputs(
        images=pixels,
        mask=mask,
        distance=masked_distance(mask, config.grid).double(),
        betas=betas,
        feature_weight=torch.tensor(0.5).double(),
        share=1.0,
        loss_backend="reference",
        teacher_tokens=teacher if taps is None else teacher[list(taps)],
        subset=subset,
    )
    losses = model(inputs)
    losses.total.backward()
    return [losses.total.detach(), betas.grad, *(each.grad for each in model.parameters())], losses


@pytest.mark.parametrize("execution", ["batched", "sequential"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_mean_over_all_taps_is_the_full_loss(count, execution, monkeypatch):
    """Of the model's loss and of the gradient of every parameter, to the rounding of the tap weights in fp32."""
    config = parse(["--preset", "demo", "--engine.tap_execution", execution, "--taps_per_step", str(count)])
    expected, _ = losses_of(replace(config, taps_per_step=0))
    sums = [torch.zeros_like(each) for each in expected]
    for taps in combinations(range(4), count):
        monkeypatch.setattr(branches, "draw_taps", lambda *_, taps=taps: taps)
        gradients, losses = losses_of(config, taps)
        assert torch.isfinite(losses.branches["pixel"].tap_loss).nonzero().flatten().tolist() == list(taps)
        for total, each in zip(sums, gradients, strict=True):
            total += each / comb(4, count)
    for actual, whole in zip(sums, expected, strict=True):
        torch.testing.assert_close(actual, whole, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("args", [(), ("--feature.cross_attention", "--pixel.cross_attention")])
def test_sequential_equals_batched_with_parts_of_the_supervision(args):
    config = parse(["--preset", "demo", "--taps_per_step", "2", "--decode_fraction", "0.4", *args])
    subset = draw_subset(torch.tensor([3, 4]), config.num_masked, config.num_decoded)
    results = []
    for execution in ("batched", "sequential"):
        engine = replace(config.engine, tap_execution=execution)
        taps = draw_taps(4, 2, 0)
        results.append(losses_of(replace(config, engine=engine), taps, subset))
    (batched, losses), (sequential, _) = results
    assert losses.branches["pixel"].token_error.shape == (4, 2, round(0.4 * config.num_masked))
    for one, other in zip(batched, sequential, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_decoded_patches_are_those_of_the_subset(monkeypatch):
    """Without attention in the decoders, a patch's prediction does not depend on which others are decoded."""
    config = parse(["--preset", "demo", "--decode_fraction", "0.5"])
    subset = draw_subset(torch.tensor([3, 4]), config.num_masked, config.num_decoded)
    model = build_model(config).double()
    for branch in model.branches.values():
        torch.nn.init.zeros_(branch.decoder.blocks[0].attn.proj.weight)
    monkeypatch.setattr(sys.modules[__name__], "build_model", lambda _: model)
    _, full = losses_of(config)
    _, part = losses_of(config, subset=subset)
    for name in ("pixel", "feature"):
        expected = full.branches[name].token_error.gather(2, subset.expand(4, -1, -1))
        torch.testing.assert_close(part.branches[name].token_error, expected, rtol=1e-9, atol=1e-12)


def test_flops_of_parts_of_the_supervision():
    """Decoders run on half of the taps; the teacher ends at the last of them, on average."""
    full = preset("ddae_vit_b16_100e")
    half = replace(full, taps_per_step=2)
    one, two = count_flops(full), count_flops(half)
    assert two.encoder == one.encoder
    assert two.pixel == pytest.approx(one.pixel / 2, rel=1e-6)
    assert two.feature == pytest.approx(one.feature / 2, rel=1e-6)
    assert 0.8 < two.teacher / one.teacher < 0.87  # the mean of the last of two of four taps is block 10
    fewer = count_flops(replace(half, decode_fraction=0.25))
    assert 0.35 < fewer.pixel / two.pixel < 0.5
    assert fewer.total < 1.5 * count_flops(preset("mae_vit_b16_100e")).total


@pytest.mark.parametrize(
    "args, message",
    [
        (("--taps_per_step", "2", "--pixel.per_tap_norm"), "taps_per_step is 2, but pixel has a norm"),
        (("--taps_per_step", "2", "--feature.per_tap_head"), "taps_per_step is 2, but feature has a norm"),
        (("--decode_fraction", "0"), "decode_fraction is 0.0; expected a value from"),
        (("--taps_per_step", "-1"), "taps_per_step is -1; expected a value >= 0"),
    ],
)
def test_settings_that_contradict_each_other(args, message):
    with pytest.raises(UserError, match=message):
        parse(["--preset", "demo", *args])


def test_token_branches_have_no_decoder():
    with pytest.raises(UserError, match="taps_per_step and decode_fraction are for branches with a decoder"):
        check(replace(preset("dds_beitv2_vit_b16_100e"), decode_fraction=0.5))
