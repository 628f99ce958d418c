"""Losses against the float64 transcription of Eqs. 3, 5 and 6; structure and initial weights against published code."""

import equations
import numpy as np
import pytest
import torch

from ddae.config.cli import parse
from ddae.config.presets import METHODS, names, preset
from ddae.config.pretrain import beta_names
from ddae.data.masking import sample_mask
from ddae.errors import UserError
from ddae.method.betas import Betas
from ddae.method.branches import Inputs
from ddae.method.distance import masked_distance, neighbour_weight
from ddae.method.model import build_model
from ddae.models.patches import NORMALISATIONS
from ddae.models.vit import Mlp
from ddae.training.optimizer import build_optimizer
from ddae.training.schedules import ramp

BETAS = (-3.0, -0.5, 0.0, 0.7)


def demo(*args):
    return parse(["--preset", "demo", "--pixel.norm", "per_channel", *args])


def step(config, dtype=torch.float64, images=3, feature_weight=1.0, first_beta=0):
    """Run a forward pass on random images; return the model, its inputs and its losses."""
    model = build_model(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    size = images, 3, *config.model.height_width
    pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    mask = sample_mask(config.mask.kind, torch.arange(images), config.grid, config.num_masked)
    distance = masked_distance(mask, config.grid).to(dtype)
    width, taps = config.model.width, len(config.feature.taps)
    teacher = torch.randn(taps, images, config.num_masked, width, generator=generator).to(dtype)
    names = beta_names(config)
    betas = torch.tensor([BETAS[(first_beta + i) % 4] for i in range(len(names))], dtype=dtype, requires_grad=True)
    weight = torch.tensor(feature_weight, dtype=dtype)
    losses = model(Inputs(pixels, mask, distance, betas, weight, 1.0, "reference", teacher))
    return model, pixels, mask, distance.numpy(), betas, teacher.numpy(), losses


def exact_terms(config, model, pixels, mask, distance, betas, teacher):
    """Return each branch's loss by the transcription, from the model's predictions."""
    tokens = model.encode(pixels, mask.visible)
    mean, std = NORMALISATIONS[config.data.normalisation]
    targets = {
        "pixel": equations.pixel_target(
            pixels.numpy(), mask.masked.numpy(), config.model.patch_size, mean, std, "per_channel", False, 1e-5
        ),
        "feature": equations.feature_target(teacher.astype(float), config.feature.target_norm),
    }
    terms = {}
    for name, branch in model.branches.items():
        pred = branch.predict(tokens, mask).detach().double().numpy()
        pred = equations.layer_norm(pred) if name == "feature" and config.feature.target_norm != "none" else pred
        beta = [betas.detach().double().numpy()[index] for index in branch.beta_indices] or np.zeros(len(branch.taps))
        terms[name] = equations.dynamic_loss(
            pred, targets[name], distance.astype(float), beta, np.array(branch.tap_weights)
        )
    return terms


LAST_TAP = [arg for b in ("pixel", "feature") for arg in (f"--{b}.taps", "8", f"--{b}.tap_weights", "1")]

NOT_SQUARE = ("--model.image_size", "64", "40")


@pytest.mark.parametrize("kind", ["bootmae_block", "random"])
@pytest.mark.parametrize("args", [(), LAST_TAP, ("--dynamic.no_shared",), ("--pixel.no_dynamic",), NOT_SQUARE])
@pytest.mark.parametrize("first_beta", range(4))
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_ddae_equals_eqs_3_5_and_6(kind, args, first_beta, dtype, tolerance):
    """Losses and beta's gradient, from the model's predictions; a(t) scales the feature branch."""
    config = demo("--mask.kind", kind, *args)
    model, pixels, mask, distance, betas, teacher, losses = step(config, dtype, 3, 0.25, first_beta)
    losses.total.backward()
    terms = exact_terms(config, model, pixels, mask, distance, betas, teacher)
    total = terms["pixel"][0] + 0.25 * terms["feature"][0]
    np.testing.assert_allclose(losses.total.item(), total, rtol=tolerance)
    gradient, size = np.zeros(len(betas)), np.zeros(len(betas))
    for name, factor in (("pixel", 1.0), ("feature", 0.25)):
        np.testing.assert_allclose(losses.branches[name].tap_loss, terms[name][1], rtol=tolerance)
        for index, part, terms_sum in zip(model.branches[name].beta_indices, *terms[name][3:5], strict=False):
            gradient[index] += factor * part
            size[index] += factor * terms_sum
    assert (np.abs(betas.grad.double().numpy() - gradient) <= tolerance * size).all()


def test_total_loss_of_eq_6():
    """Branch losses + 0.5 * norm of the weights of each beta + beta_l2, as a run logs them."""
    config = demo()
    model, pixels, mask, distance, betas, teacher, losses = step(config)
    trained_betas = Betas(beta_names(config), config.dynamic, (0.9, 0.95), torch.device("cpu"))
    with torch.no_grad():
        trained_betas.values.copy_(betas)
    trained_betas.accumulate_norm(torch.tensor(distance, dtype=torch.float32))
    trained_betas.step(0.0, applied=torch.zeros(()))
    terms = exact_terms(config, model, pixels, mask, distance, betas, teacher)
    values = betas.detach().numpy()
    norm = equations.weight_norm(distance, values).sum()
    expected = sum(term[0] for term in terms.values()) + 0.5 * norm + 0.005 * (values**2).sum()
    np.testing.assert_allclose(losses.total.item() + trained_betas.regulariser.item(), expected, rtol=1e-6)


def test_all_parameters_get_gradients_and_masked_pixels_are_unused():
    config = demo()
    model, pixels, mask, _, _, _, losses = step(config)
    losses.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    zeroed = pixels.clone()
    size = config.model.patch_size
    for image, positions in zip(zeroed, mask.masked, strict=True):
        for position in positions.tolist():
            top, left = position // config.grid[1] * size, position % config.grid[1] * size
            image[:, top : top + size, left : left + size] = 0
    tokens, tokens_of_zeroed = (model.encode(images, mask.visible) for images in (pixels, zeroed))
    assert all(torch.equal(tokens.normed[tap], tokens_of_zeroed.normed[tap]) for tap in model.used_blocks)


def test_presets_are_lists_of_branches():
    """Taps, dynamic weights and feature branch of each method; BEiT-v2's variants have the token branch only."""
    expected = {
        "mae": ((12,), False, False),
        "d_mae": ((12,), True, False),
        "ds_mae": ((3, 6, 9, 12), False, False),
        "dds_mae": ((3, 6, 9, 12), True, False),
        "ddae": ((3, 6, 9, 12), True, True),
        "bootmae": ((12,), False, True),
    }
    tokens = {"beitv2": ((12,), False), "dds_beitv2": ((3, 6, 9, 12), True)}
    assert expected.keys() | tokens.keys() == METHODS.keys()
    for method, taps_and_dynamic in tokens.items():
        config = preset(f"{method}_vit_b16_300e")
        assert config.branches.keys() == {"token"}
        assert (config.token.taps, config.token.dynamic) == taps_and_dynamic
        assert (config.num_masked, config.mask.kind, config.peak_lr) == (75, "beit_block", pytest.approx(1.5e-3))
    assert preset("bootmae_vit_b16_100e").pixel.cross_attention
    for method, (taps, dynamic, feature) in expected.items():
        config = preset(f"{method}_vit_b16_300e")
        assert (config.pixel.taps, config.pixel.dynamic, config.feature.enabled) == (taps, dynamic, feature)
    assert preset("ddae_vit_l16_800e").pixel.taps == (6, 12, 18, 24)
    assert preset("ddae_vit_s16_100e").feature.decoder_width == 384
    assert preset("ddae_vit_b16_800e").optim.warmup_epochs == 40


def test_presets_are_experiments_only():
    assert len(names()) == 98
    with pytest.raises(UserError, match="unknown preset 'ddae_vit_b16_100e_literal'; the nearest is"):
        preset("ddae_vit_b16_100e_literal")


def test_mae_has_the_published_structure():
    """Every tensor of the published ViT-B/16 MAE, and no other: encoder 85.80 M, with its decoder 111.91 M values."""
    config = preset("mae_vit_b16_800e")
    model = build_model(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    decoder = "branches.pixel.decoder"
    expected = {"encoder.cls_token": (1, 1, 768), "encoder.pos_embed": (1, 197, 768)}
    expected |= {"encoder.patch_embed.proj.weight": (768, 3, 16, 16), "encoder.patch_embed.proj.bias": (768,)}
    expected |= {f"{decoder}.mask_token": (1, 1, 512), f"{decoder}.pos_embed": (1, 197, 512)}
    expected |= {f"{decoder}.embed.weight": (512, 768), f"{decoder}.embed.bias": (512,)}
    expected |= {f"{decoder}.head.weight": (768, 512), f"{decoder}.head.bias": (768,)}
    for module, depth, width in (("encoder", 12, 768), (decoder, 8, 512)):
        expected |= {f"{module}.norm.weight": (width,), f"{module}.norm.bias": (width,)}
        for i in range(depth):
            block = f"{module}.blocks.{i}"
            expected |= {f"{block}.norm{n}.{p}": (width,) for n in (1, 2) for p in ("weight", "bias")}
            for layer, rows, columns in (
                ("attn.qkv", 3 * width, width),
                ("attn.proj", width, width),
                ("mlp.fc1", 4 * width, width),
                ("mlp.fc2", width, 4 * width),
            ):
                expected |= {f"{block}.{layer}.weight": (rows, columns), f"{block}.{layer}.bias": (rows,)}
    assert shapes == expected
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 111_907_840
    assert sum(tensor.numel() for tensor in model.encoder.state_dict().values()) == 85_798_656
    assert model.branches["pixel"].decoder.blocks[0].attn.num_heads == 16


def initial_weights(name, *args):
    """Return a preset's initial weights by name, and its config."""
    config = parse(["--preset", name, *args])
    return {name: each.detach() for name, each in build_model(config).named_parameters()}, config


def test_initial_weights_of_mae():
    """Xavier: standard deviation sqrt(2 / (in + out)). With qkv as one matrix sqrt(2 / (4 x 384)) = 0.0361 in ViT-S's
    encoder, sqrt(2 / (4 x 512)) = 0.0313 in its decoder; fc1 sqrt(2 / (5 x 384)) = 0.0323; tokens 0.02."""
    weights, _ = initial_weights("mae_vit_s16_100e")
    deviations = {
        "encoder.blocks.3.attn.qkv.weight": 0.03608,
        "branches.pixel.decoder.blocks.0.attn.qkv.weight": 0.03125,
        "encoder.blocks.3.mlp.fc1.weight": 0.03227,
        "encoder.patch_embed.proj.weight": (2 / (768 + 384)) ** 0.5,
    }
    for name, deviation in deviations.items():
        assert float(weights[name].std()) == pytest.approx(deviation, rel=0.01), name
    assert float(weights["encoder.cls_token"].std()) == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize("method", ["ddae", "bootmae"])
def test_initial_weights_of_bootmae(method):
    """Queries, keys and values are three matrices: sqrt(2 / (2 x 384)) = 0.0510; the cls token has 1e-6."""
    weights, _ = initial_weights(f"{method}_vit_s16_100e")
    for part in weights["encoder.blocks.3.attn.qkv.weight"].chunk(3):
        assert float(part.std()) == pytest.approx(0.05103, rel=0.01)
    assert float(weights["encoder.cls_token"].std()) == pytest.approx(1e-6, rel=0.15)
    assert float(weights["branches.pixel.decoder.mask_token"].std()) == pytest.approx(0.02, rel=0.15)


def test_initial_weights_of_beit():
    """A normal distribution with standard deviation 0.02, truncated there, has 0.5396 * 0.02 = 0.01079. The last layers
    of block l are divided by sqrt(2 l): 0.00763 in the first block, 0.00220 in the twelfth. The first cls block, after
    block 9, counts as the tenth."""
    weights, _ = initial_weights("beitv2_vit_s16_300e", "--token.tokenizer", "none")
    assert float(weights["branches.token.head.weight"].abs().max()) <= 0.02
    deviations = {
        "encoder.blocks.3.attn.qkv.weight": 0.01079,
        "branches.token.head.weight": 0.01079,
        "encoder.blocks.0.attn.proj.weight": 0.00763,
        "encoder.blocks.11.mlp.fc2.weight": 0.00220,
        "branches.cls.blocks.0.mlp.fc2.weight": 0.01079 / 20**0.5,
        "branches.cls.blocks.1.attn.proj.weight": 0.01079 / 22**0.5,
    }
    for name, deviation in deviations.items():
        assert float(weights[name].std()) == pytest.approx(deviation, rel=0.01), name


ONE_TAP = [arg for b in ("pixel", "feature") for arg in (f"--{b}.taps", "1", f"--{b}.tap_weights", "1")]


def test_bootmae_has_the_published_settings():
    """BootMAE's patch weights, weight decay groups and decoder positions; DDAE and MAE do not use them."""
    for name, published in {"bootmae": True, "ddae": False, "mae": False}.items():
        weights, config = initial_weights(f"{name}_vit_s16_100e", "--model.depth", "1", *ONE_TAP)
        assert config.mask.neighbour_weight is published
        assert {config.pixel.decoder_positions, config.feature.decoder_positions} == {"masked" if published else "all"}
        decayed, exempt = (group["params"] for group in build_optimizer(build_model(config), config.optim).param_groups)
        assert len(decayed) + len(exempt) == len(weights)
        mask_tokens = [name for name in weights if name.endswith("mask_token")]
        tokens = [sum(p.ndim == 3 for p in group) for group in (decayed, exempt)]
        assert tokens == ([len(mask_tokens), 1] if published else [0, len(mask_tokens) + 1])  # + 1: the cls token
        assert all(p.ndim > 1 for p in decayed)
    assert preset("bootmae_vit_b16_100e").feature.target_norm == "layer"
    assert preset("ddae_vit_b16_100e").feature.target_norm == "instance_layer"


def test_decoder_positions():
    """Exchanging the positions of visible patches changes the prediction with decoder_positions=all only."""
    for args, depends in (((), True), (("--pixel.decoder_positions", "masked"), False)):
        model, _, mask, *_ = step(demo(*args), torch.float64, 3, 1.0, 1)
        decoder = model.branches["pixel"].decoder
        tokens = torch.randn(3, 1 + mask.visible.shape[1], 96, dtype=torch.float64)
        before = decoder(tokens, *mask)
        swapped = mask._replace(visible=mask.visible.flip(1))
        assert torch.allclose(before, decoder(tokens, *swapped)) is not depends


def test_fixed_patch_weights():
    """Each branch's loss is the mean of patch weight * error; uniform weights of 1.8 multiply it by 1.8."""
    config = parse(["--preset", "bootmae_vit_s16_100e", *SMALL_BOOTMAE])
    model, pixels, mask, distance, betas, teacher, plain = step(config, torch.float64)
    weight = neighbour_weight(mask, config.grid).double()
    weights = torch.tensor(distance), betas, torch.tensor(1.0), 1.0
    arguments = pixels, mask, *weights, "reference", torch.tensor(teacher)
    weighted = model(Inputs(*arguments, patch_weight=weight))
    for name, result in weighted.branches.items():
        expected = (weight * plain.branches[name].token_error).mean()
        assert result.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    uniform = model(Inputs(*arguments, patch_weight=torch.full_like(weight, 1.8)))
    assert uniform.total.item() == pytest.approx(1.8 * plain.total.item(), rel=1e-6)


SMALL_BOOTMAE = "--model.width 32 --model.heads 2 --model.image_size 64 --model.patch_size 8".split() + [
    arg
    for branch in ("pixel", "feature")
    for arg in (f"--{branch}.decoder_width", "32", f"--{branch}.decoder_heads", "2")
]


def test_feature_weight_warms_up_over_a_quarter_of_training():
    assert preset("ddae_vit_b16_100e").feature.warmup_fraction == 0.25
    assert [ramp(step, 0.25 * 8) for step in range(3)] == [0.5, 1, 1]


OPTIONS = ["--{}.cross_attention", "--{}.per_tap_norm", "--{}.per_tap_head"]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("branch", ["pixel", "feature"])
def test_decoder_options_equal_eqs_3_and_5(branch, option):
    """The loss of the prediction is unchanged, and each parameter that the option adds has a gradient."""
    config = demo(option.format(branch))
    model, pixels, mask, distance, betas, teacher, losses = step(config, torch.float64, 3, 1.0, 1)
    terms = exact_terms(config, model, pixels, mask, distance, betas, teacher)
    np.testing.assert_allclose(losses.total.item(), terms["pixel"][0] + terms["feature"][0], rtol=1e-10)
    losses.total.backward()
    plain = {name for name, _ in build_model(demo()).named_parameters()}
    added = {name: p for name, p in model.named_parameters() if name not in plain}
    assert added
    for name, parameter in added.items():
        assert parameter.grad is not None, name
        assert "bias" in name or parameter.grad.abs().sum() > 0, name


def test_per_tap_head_changes_its_tap_only():
    model, _, mask, *_ = step(demo("--pixel.per_tap_head"), torch.float64, 3, 1.0, 1)
    decoder = model.branches["pixel"].decoder
    tokens = torch.randn(4 * 3, 1 + mask.visible.shape[1], 96, dtype=torch.float64)
    before = decoder(tokens, *mask, None, range(4))
    with torch.no_grad():
        decoder.heads[2].bias += 1
    changed = (decoder(tokens, *mask, None, range(4)) - before).unflatten(0, (4, 3)).abs().amax((1, 2, 3))
    torch.testing.assert_close(changed.detach(), torch.tensor([0.0, 0, 1, 0], dtype=torch.float64))


def test_cross_attention_context_is_raw_block_output():
    """The pixel decoder attends to the tokens after block 1, the feature decoder to the tap's, before any norm."""
    config = demo("--pixel.cross_attention", "--feature.cross_attention")
    model = build_model(config)
    assert model.branches["pixel"].raw_blocks == (1,)
    assert model.branches["feature"].raw_blocks == (2, 4, 6, 8)
    assert model.used_blocks == (1, 2, 4, 6, 8)
    mask = sample_mask("random", torch.arange(2), config.grid, config.num_masked)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    tokens = model.encode(pixels, mask.visible)
    contexts = []
    block = model.branches["feature"].decoder.blocks[0]
    block.cross.register_forward_pre_hook(lambda _, inputs: contexts.append(inputs[1]))
    model.branches["feature"].predict(tokens, mask)
    assert torch.equal(contexts[0], torch.cat([tokens.raw[tap] for tap in (2, 4, 6, 8)]))


@pytest.mark.parametrize(
    "args, in_encoder, in_decoders",
    [
        ("--engine.tap_execution batched", True, True),
        ("--engine.tap_execution sequential", False, False),
        ("--engine.tap_execution sequential --engine.activation_checkpointing", True, True),
        ("--engine.tap_execution sequential --engine.decoder_activation_checkpointing", False, True),
    ],
)
def test_gelu_output_is_saved_in_checkpointed_blocks(args, in_encoder, in_decoders):
    """The MLP's saved-tensor hooks would replace those of activation checkpointing."""
    model = build_model(parse(["--preset", "demo", *args.split()]))
    for module, saved in ((model.encoder, in_encoder), (model.branches, in_decoders)):
        assert {each.save_gelu_output for each in module.modules() if isinstance(each, Mlp)} == {saved}
