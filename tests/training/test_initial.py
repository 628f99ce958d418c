"""Pretraining from given weights: what is taken from them, and what is refused."""

from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

import ddae
from ddae.config.presets import preset
from ddae.config.pretrain import ModelConfig, PretrainConfig
from ddae.errors import UserError
from ddae.export.encoder import write_export
from ddae.method.model import build_model
from ddae.models.vit import Encoder, initialise
from ddae.training.initial import load_initial, start_from, with_initial, write_initial
from ddae.training.optimizer import build_optimizer

MODEL = ModelConfig(width=96, depth=4, heads=6, image_size=32, patch_size=8)
BRANCH = {"taps": (1, 2, 3, 4), "decoder_width": 24, "decoder_heads": 2, "decoder_depth": 1}


def config(init="", **model) -> PretrainConfig:
    demo = preset("demo")
    branches = {name: replace(getattr(demo, name), **BRANCH) for name in ("pixel", "feature")}
    return replace(demo, init=str(init), model=replace(MODEL, **model), **branches)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Return a file of a timm ViT with learned positions, and the model."""
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 6, "num_classes": 3}
    model = VisionTransformer(**shape).eval()
    torch.nn.init.normal_(model.pos_embed, std=0.5)
    file = tmp_path_factory.mktemp("timm") / "model.pth"
    torch.save({"state_dict": model.state_dict(), "heads": 6}, file)
    return file, model


def test_features_are_those_of_the_file(published, tmp_path):
    file, model = published
    start = with_initial(config(file), load_initial(str(file)))
    assert start.model.positions == "learned"
    assert start.data.normalisation == "imagenet"
    built = build_model(start)
    initial = start_from(start, built.encoder)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(built.encoder(images), model.forward_features(images), rtol=1e-5, atol=1e-5)
    write_initial(initial, start, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            ddae.load_encoder(tmp_path / "initial")(images), built.encoder(images), rtol=1e-6, atol=1e-6
        )


def test_learned_positions_are_trained_and_not_decayed(published):
    file, _ = published
    start = with_initial(config(file), load_initial(str(file)))
    model = build_model(start)
    assert "encoder.pos_embed" in dict(model.named_parameters())
    decayed, exempt = build_optimizer(model, start.optim).param_groups
    assert any(each is model.encoder.pos_embed for each in exempt["params"])
    assert not any(each is model.encoder.pos_embed for each in decayed["params"])


@pytest.mark.parametrize("positions", ["rowfirst", "colfirst"])
def test_sincos_positions_stay_fixed(positions, tmp_path):
    encoder = Encoder(replace(MODEL, positions=positions))
    initialise(encoder, torch.Generator().manual_seed(0))
    write_export(encoder, tmp_path / "encoder")
    start = with_initial(config(tmp_path / "encoder"), load_initial(str(tmp_path / "encoder")))
    assert start.model.positions == positions
    assert "encoder.pos_embed" not in dict(build_model(start).named_parameters())


@pytest.mark.parametrize("size", [16, 64])
def test_positions_are_resampled(size, published):
    file, _ = published
    start = with_initial(config(file, image_size=size), load_initial(str(file)))
    model = build_model(start)
    start_from(start, model.encoder)
    expected = ddae.load_encoder(file, image_size=size)
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(images), expected(images), rtol=1e-5, atol=1e-5)


def test_layer_scale_is_taken(tmp_path):
    encoder = Encoder(replace(MODEL, layer_scale=0.1))
    initialise(encoder, torch.Generator().manual_seed(0))
    write_export(encoder, tmp_path / "encoder")
    start = with_initial(config(tmp_path / "encoder"), load_initial(str(tmp_path / "encoder")))
    assert start.model.layer_scale > 0
    model = build_model(start)
    start_from(start, model.encoder)
    assert torch.equal(model.encoder.blocks[0].ls1.gamma, encoder.blocks[0].ls1.gamma)


@pytest.mark.parametrize("field, value", [("width", 48), ("depth", 5), ("heads", 3), ("patch_size", 16)])
def test_another_shape_is_refused(field, value, published):
    file, _ = published
    with pytest.raises(UserError, match=rf"has model\.{field} = \d+, not {value}\. Pass --model\.{field}"):
        with_initial(config(file, **{field: value}), load_initial(str(file)))


@pytest.mark.parametrize("options, part", [({"reg_tokens": 2}, "registers"), ({"qk_norm": True}, "norms of queries")])
def test_parts_that_pretraining_lacks_are_refused(options, part, tmp_path):
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 6, "num_classes": 0}
    save_file(VisionTransformer(**shape, **options).state_dict(), tmp_path / "model.safetensors")
    write_export(ddae.load_encoder(tmp_path / "model.safetensors", heads=6), tmp_path / "encoder")
    with pytest.raises(UserError, match=f"has {part}.*which pretraining does not support"):
        load_initial(str(tmp_path / "encoder"))


def test_models_of_timm(monkeypatch, published):
    _, model = published
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    monkeypatch.setattr(timm, "create_model", lambda name, **options: model)
    encoder = load_initial("timm:vit_of_this_test")
    assert (encoder.shape.heads, encoder.normalisation) == (6, "half")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), model.forward_features(images), rtol=1e-5, atol=1e-5)
    model.pretrained_cfg = {"mean": (0.1, 0.1, 0.1), "std": (0.5, 0.5, 0.5)}
    with pytest.raises(UserError, match="expects images normalised by"):
        load_initial("timm:vit_of_this_test")

    def fail(name, **options):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(UserError, match=r"--init timm:x cannot be loaded \(no network\)\. Pass a ViT of timm"):
        load_initial("timm:x")
