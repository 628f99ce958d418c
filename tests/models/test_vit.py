"""Encoder, decoder and teacher: shapes, equivalence with timm, EMA accuracy."""

import math

import jaxtyping
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from ddae.config.presets import preset
from ddae.config.pretrain import ModelConfig
from ddae.data.masking import Mask
from ddae.distributed.checkpoint_format import TensorShard
from ddae.method.model import build_model
from ddae.method.teacher import Teacher
from ddae.models.decoder import Decoder
from ddae.models.patches import gather_tokens, patchify, sincos_positions, unpatchify
from ddae.models.vit import Encoder, Mlp, build_blocks, initialise


def build(**changes):
    shape = {"width": 24, "depth": 3, "heads": 2, "image_size": 32, "patch_size": 8, "positions": "rowfirst"} | changes
    encoder = Encoder(ModelConfig(**shape))
    initialise(encoder, torch.Generator().manual_seed(0))
    return encoder.eval()


def test_unpatchify_inverts_patchify():
    images = torch.rand(2, 3, 24, 40)
    patches = patchify(images, 8)
    assert patches.shape == (2, 15, 192)
    assert torch.equal(patches[1, 7].view(8, 8, 3), images[1, :, 8:16, 16:24].permute(1, 2, 0))
    assert torch.equal(unpatchify(patches, (3, 5), 8), images)


def test_sincos_positions_of_both_layouts():
    row, column = sincos_positions((3, 4), 16, "rowfirst"), sincos_positions((3, 4), 16, "colfirst")
    assert row.shape == (1, 13, 16)
    assert (row[0, 0] == 0).all()
    assert torch.equal(row[..., :8], column[..., 8:])
    last = row[0, 12]  # row 2, column 3, lowest frequency 1, next 10000 ** -1/4 = 0.1
    expected = [math.sin(2), math.sin(0.2), math.cos(2), math.cos(0.2), math.sin(3), math.sin(0.3)]
    torch.testing.assert_close(last[[0, 1, 4, 5, 8, 9]], torch.tensor(expected), rtol=0, atol=0.06)
    torch.testing.assert_close(last[[0, 4, 8]], torch.tensor([math.sin(2), math.cos(2), math.sin(3)]))


def test_every_parameter_is_initialised():
    method = build_model(preset("demo"))
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.fill_(torch.nan)
    initialise(method, torch.Generator().manual_seed(0))
    for name, parameter in method.named_parameters():
        assert parameter.isfinite().all(), name


def test_patch_projection_equals_convolution():
    encoder = build()
    images = torch.rand(2, 3, 32, 32)
    projection = encoder.patch_embed["proj"]
    convolved = torch.nn.functional.conv2d(images, projection.weight, projection.bias, stride=8)
    torch.testing.assert_close(projection(patchify(images, 8)), convolved.flatten(2).mT)


def test_encoder_of_visible_patches_ignores_masked_ones():
    """With all patches visible, in any order, the tokens equal those of the whole image."""
    encoder, images = build(), torch.rand(2, 3, 32, 32)
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    whole, shuffled = encoder(images), encoder(images, visible=order)
    torch.testing.assert_close(gather_tokens(whole[:, 1:], order), shuffled[:, 1:], rtol=1e-4, atol=1e-5)
    visible = order[:, :5]
    tokens = encoder(images, visible=visible)
    assert tokens.shape == (2, 6, 24)
    zeroed = patchify(images, 8).scatter(1, order[:, 5:, None].expand(-1, -1, 192), 0.0)
    torch.testing.assert_close(tokens, encoder(unpatchify(zeroed, (4, 4), 8), visible=visible))


def test_features_are_block_outputs_before_the_norm():
    encoder, images = build(), torch.rand(2, 3, 32, 32)
    first, last = encoder.features(images, [1, 3])
    torch.testing.assert_close(encoder.norm(last), encoder(images))
    assert not torch.equal(first, last)
    assert first.shape == (2, 17, 24)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 3, 40, 40), (3, 32, 32), (1, 1, 32, 32)])
def test_wrong_image_shape_raises(shape):
    with pytest.raises(ValueError, match="this encoder expects"):
        build()(torch.zeros(shape))


@pytest.mark.parametrize("layers", [[], [0], [4]])
def test_wrong_layers_raise(layers):
    with pytest.raises(ValueError, match="blocks from 1 to 3"):
        build().features(torch.zeros(1, 3, 32, 32), layers)


def test_encoder_equals_timm_vit():
    """Equal weights give equal tokens."""
    import timm

    ours = build(width=48, depth=2, heads=3)
    theirs = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0, global_pool=""
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(theirs.forward_features(images), ours(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"layer_scale": 0.1}, {"qk_norm": True}])
@pytest.mark.parametrize("with_bias", [False, True])
def test_direct_calls_equal_the_modules(options, with_bias):
    """Outputs and gradients to the bit, with layer scale, q/k norms and relative positions, too."""
    torch.manual_seed(0)
    (block,) = build_blocks(24, 1, 4, **options)
    tokens, bias = torch.randn(2, 5, 24, requires_grad=True), torch.randn(1, 4, 5, 5) if with_bias else None

    def run(direct):
        block.direct_calls = direct
        output = block(tokens, bias)
        return [output, *torch.autograd.grad(output.square().sum(), [tokens, *block.parameters()])]

    calls = []
    block.mlp.register_forward_hook(lambda *_: calls.append("mlp"))
    by_modules, directly = run(False), run(True)
    assert calls == ["mlp"]  # direct calls do not call the submodules
    assert all(torch.equal(a, b) for a, b in zip(by_modules, directly, strict=True))


def test_decoder_outputs_follow_the_order_of_masked_positions():
    """Reversing the masked positions reverses the outputs."""
    decoder = Decoder(24, 16, 2, 2, 12, grid=(4, 4), positions="rowfirst").eval()
    initialise(decoder, torch.Generator().manual_seed(0))
    tokens, visible = torch.rand(1, 5, 24), torch.tensor([[0, 3, 7, 9]])
    masked = torch.tensor([[i for i in range(16) if i not in (0, 3, 7, 9)]])
    out = decoder(tokens, visible, masked)
    assert out.shape == (1, 12, 12)
    torch.testing.assert_close(decoder(tokens, visible, masked.flip(1)), out.flip(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum, half_life", [(0.9, 7), (0.999, 693), (0.99999, 69315)])
def test_ema_in_fp32_is_as_accurate_as_float64(momentum, half_life):
    """1,000 updates towards weights 1 % away: error relative to the total change below 1e-3."""
    encoder = build()
    parameters = dict(encoder.named_parameters())
    shards = [TensorShard(name, 0, p.detach().clone().flatten()) for name, p in parameters.items()]
    teacher = Teacher(build(), shards, sharded=False)
    starts = [s.values.clone() for s in shards]
    for s in shards:
        s.values.mul_(1.01).add_(1e-4)
    exact = [start.double() for start in starts]
    for _ in range(1000):
        teacher.update(momentum)
        exact = [momentum * e + (1 - momentum) * s.values.double() for e, s in zip(exact, shards, strict=True)]
    error = torch.cat([(m.double() - e).abs() for m, e in zip(teacher.masters, exact, strict=True)]).sum()
    change = torch.cat([(e - start.double()).abs() for e, start in zip(exact, starts, strict=True)]).sum()
    assert change > 0
    assert error / change < 1e-3
    expected = 1 - 0.5 ** (1000 / half_life)
    distance = torch.cat([s.values - start for s, start in zip(shards, starts, strict=True)]).abs().sum()
    assert change / distance == pytest.approx(expected, rel=0.01)


def test_mlp_that_recomputes_gelu_has_equal_gradients(monkeypatch):
    mlp, tokens, saved = Mlp(8, 32), torch.randn(3, 5, 8), []

    def hooks(pack, unpack):
        def record(values):
            saved.append(pack(values))
            return saved[-1]

        return saved_tensors_hooks(record, unpack)

    monkeypatch.setattr("ddae.models.vit.saved_tensors_hooks", hooks)
    results = []
    for mlp.save_gelu_output in (True, False):
        mlp.zero_grad()
        inputs = tokens.clone().requires_grad_()
        output = mlp(inputs)
        output.square().sum().backward()
        results.append((output, inputs.grad, *(each.grad.clone() for each in mlp.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert sum(each.numel() for each in saved if isinstance(each, torch.Tensor)) == 8 * 32  # only fc2's weight


@pytest.mark.parametrize("chunk_size", [2**22, 1000])
def test_teacher_runs_its_master_weights_without_gradient(chunk_size, monkeypatch):
    monkeypatch.setattr("ddae.method.teacher.CHUNK_SIZE", chunk_size)
    encoder = build()
    shards = [TensorShard(name, 0, p.detach().flatten()) for name, p in encoder.named_parameters()]
    halves = []  # two shards per parameter
    for shard in shards:
        middle = shard.values.numel() // 2
        halves += [shard._replace(values=shard.values[:middle])]
        halves += [TensorShard(shard.name, middle, shard.values[middle:])]
    images, masked = torch.rand(2, 3, 32, 32), torch.tensor([[1, 5], [0, 15]])
    visible = torch.stack([torch.tensor([p for p in range(16) if p not in row]) for row in masked.tolist()])
    patches = gather_tokens(patchify(images, 8), torch.cat([visible, masked], 1))
    for pieces in (shards, halves):
        teacher = Teacher(Encoder(encoder.shape), pieces, sharded=False)
        targets = teacher.targets(patches, (1, 3), Mask(visible, masked))
        assert not targets.requires_grad
        expected = torch.stack([gather_tokens(t[:, 1:], masked) for t in encoder.features(images, (1, 3))])
        torch.testing.assert_close(targets, expected, rtol=1e-4, atol=1e-5)
        before = [p.clone() for p in teacher.module.parameters()]
        for piece in pieces:
            piece.values.add_(1)
        teacher.update(0.5)
        for parameter, old in zip(teacher.module.parameters(), before, strict=True):
            torch.testing.assert_close(parameter, old + 0.5)


def test_annotated_shapes_are_checked():
    """pyproject.toml turns the checks on."""
    images, visible = torch.rand(2, 3, 32, 32), torch.zeros(3, 4, dtype=torch.int64)  # of two and of three images
    with pytest.raises(jaxtyping.TypeCheckError):
        build()(images, visible=visible)
