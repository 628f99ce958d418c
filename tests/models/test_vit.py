"""Encoder, decoder and teacher."""

import math

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
from ddae.models.vit import Encoder, Mlp, initialise


def build(**changes):
    shape = {"width": 24, "depth": 3, "heads": 2, "image_size": 32, "patch_size": 8, "positions": "rowfirst"} | changes
    encoder = Encoder(ModelConfig(**shape))
    initialise(encoder, torch.Generator().manual_seed(0))
    return encoder.eval()


def test_patchify_and_back():
    images = torch.rand(2, 3, 24, 40)
    patches = patchify(images, 8)
    assert patches.shape == (2, 15, 192)
    assert torch.equal(patches[1, 7].view(8, 8, 3), images[1, :, 8:16, 16:24].permute(1, 2, 0))
    assert torch.equal(unpatchify(patches, (3, 5), 8), images)


def test_positions_follow_their_layout():
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


def test_patch_projection_is_a_convolution():
    encoder = build()
    images = torch.rand(2, 3, 32, 32)
    projection = encoder.patch_embed["proj"]
    convolved = torch.nn.functional.conv2d(images, projection.weight, projection.bias, stride=8)
    torch.testing.assert_close(projection(patchify(images, 8)), convolved.flatten(2).mT)


def test_visible_patches_are_the_whole_image_without_the_rest():
    """All patches named visible, in any order, are the whole image; hidden ones have no influence."""
    encoder, images = build(), torch.rand(2, 3, 32, 32)
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    whole, shuffled = encoder(images), encoder(images, visible=order)
    torch.testing.assert_close(gather_tokens(whole[:, 1:], order), shuffled[:, 1:], rtol=1e-4, atol=1e-5)
    visible = order[:, :5]
    seen = encoder(images, visible=visible)
    assert seen.shape == (2, 6, 24)
    changed = images.clone()
    hidden = patchify(changed, 8).scatter(1, order[:, 5:, None].expand(-1, -1, 192), 0.0)
    torch.testing.assert_close(seen, encoder(unpatchify(hidden, (4, 4), 8), visible=visible))


def test_features_are_the_named_blocks_before_any_norm():
    encoder, images = build(), torch.rand(2, 3, 32, 32)
    first, last = encoder.features(images, [1, 3])
    torch.testing.assert_close(encoder.norm(last), encoder(images))
    assert not torch.equal(first, last)
    assert first.shape == (2, 17, 24)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 3, 40, 40), (3, 32, 32), (1, 1, 32, 32)])
def test_other_images_are_refused(shape):
    with pytest.raises(ValueError, match="this encoder reads"):
        build()(torch.zeros(shape))


@pytest.mark.parametrize("layers", [[], [0], [4]])
def test_other_layers_are_refused(layers):
    with pytest.raises(ValueError, match="blocks from 1 to 3"):
        build().features(torch.zeros(1, 3, 32, 32), layers)


def test_timm_reads_the_encoder():
    """The same weights in timm's own ViT give the same tokens."""
    import timm

    ours = build(width=48, depth=2, heads=3)
    theirs = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0, global_pool=""
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(theirs.forward_features(images), ours(images), rtol=1e-4, atol=1e-5)


def test_decoder_output_stands_at_the_masked_positions():
    """Exchanging two masked positions exchanges their outputs, whatever the order they are named in."""
    decoder = Decoder(24, 16, 2, 2, 12, (4, 4), "rowfirst").eval()
    initialise(decoder, torch.Generator().manual_seed(0))
    tokens, visible = torch.rand(1, 5, 24), torch.tensor([[0, 3, 7, 9]])
    masked = torch.tensor([[i for i in range(16) if i not in (0, 3, 7, 9)]])
    out = decoder(tokens, visible, masked)
    assert out.shape == (1, 12, 12)
    torch.testing.assert_close(decoder(tokens, visible, masked.flip(1)), out.flip(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum, half_life", [(0.9, 7), (0.999, 693), (0.99999, 69315)])
def test_teacher_follows_as_float64_does(momentum, half_life):
    """1,000 steps towards weights 1 % away; error over the distance travelled."""
    encoder = build()
    parameters = dict(encoder.named_parameters())
    fragments = [TensorShard(name, 0, p.detach().clone().flatten()) for name, p in parameters.items()]
    teacher = Teacher(build(), fragments, sharded=False)
    starts = [f.values.clone() for f in fragments]
    for f in fragments:
        f.values.mul_(1.01).add_(1e-4)
    exact = [start.double() for start in starts]
    for _ in range(1000):
        teacher.update(momentum)
        exact = [momentum * e + (1 - momentum) * f.values.double() for e, f in zip(exact, fragments, strict=True)]
    wrong = torch.cat([(m.double() - e).abs() for m, e in zip(teacher.masters, exact, strict=True)]).sum()
    travelled = torch.cat([(e - start.double()).abs() for e, start in zip(exact, starts, strict=True)]).sum()
    assert travelled > 0
    assert wrong / travelled < 1e-3
    expected = 1 - 0.5 ** (1000 / half_life)
    step = torch.cat([f.values - start for f, start in zip(fragments, starts, strict=True)]).abs().sum()
    assert travelled / step == pytest.approx(expected, rel=0.01)


def test_an_mlp_that_keeps_no_gelu_has_the_same_gradients(monkeypatch):
    mlp, tokens, kept = Mlp(8, 32), torch.randn(3, 5, 8), []

    def hooks(pack, unpack):
        def note(values):
            kept.append(pack(values))
            return kept[-1]

        return saved_tensors_hooks(note, unpack)

    monkeypatch.setattr("ddae.models.vit.saved_tensors_hooks", hooks)
    seen = []
    for mlp.keeps_gelu in (True, False):
        mlp.zero_grad()
        entering = tokens.clone().requires_grad_()
        output = mlp(entering)
        output.square().sum().backward()
        seen.append((output, entering.grad, *(each.grad.clone() for each in mlp.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))
    assert sum(each.numel() for each in kept if isinstance(each, torch.Tensor)) == 8 * 32  # the last matrix alone


@pytest.mark.parametrize("part", [2**22, 1000])
def test_teacher_runs_its_masters_and_takes_no_gradient(part, monkeypatch):
    monkeypatch.setattr("ddae.method.teacher.PART", part)
    encoder = build()
    fragments = [TensorShard(name, 0, p.detach().flatten()) for name, p in encoder.named_parameters()]
    halves = []  # the same in two pieces a parameter, as ranks would hold them
    for fragment in fragments:
        middle = fragment.values.numel() // 2
        halves += [fragment._replace(values=fragment.values[:middle])]
        halves += [TensorShard(fragment.name, middle, fragment.values[middle:])]
    images, masked = torch.rand(2, 3, 32, 32), torch.tensor([[1, 5], [0, 15]])
    visible = torch.stack([torch.tensor([p for p in range(16) if p not in row]) for row in masked.tolist()])
    patches = gather_tokens(patchify(images, 8), torch.cat([visible, masked], 1))
    for pieces in (fragments, halves):
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
