"""Weights in other people's forms: the same features there and here, and a sentence for what is no encoder."""

import argparse
import json
import os
import runpy
import sys

import pytest
import ranks
import timm
import torch
from safetensors.torch import load_file, save_file

import ddae
from ddae.errors import UserError
from ddae.foreign import convert, to_beit
from ddae.method import build_encoder
from ddae.model.vit import initialise
from ddae.presets import preset
from ddae.weights import export_encoder, write_foreign, write_timm

SHAPE = {"img_size": 64, "patch_size": 16, "embed_dim": 128, "depth": 3, "num_heads": 2, "num_classes": 0}


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def vit(**options):
    """timm's Vision Transformer with random weights, none of them zero or one."""
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", **SHAPE | options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def same(encoder, model, images, tolerance=1e-5):
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), model.forward_features(images), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("container", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_maes_encoder_and_timms_file(container, prefix, images, tmp_path):
    model = vit()
    state = {f"{prefix}{name}": values for name, values in model.state_dict().items()}
    torch.save(state if container is None else {container: state, "args": argparse.Namespace(lr=1)}, tmp_path / "m.pth")
    encoder = ddae.load_encoder(tmp_path / "m.pth")
    same(encoder, model, images)
    assert encoder.normalisation == "imagenet"
    assert len(encoder.report["loaded"]) == len(state)
    assert encoder.report["left out"] == encoder.report["folded"] == []


def test_maes_full_file_and_heads_are_left_out_by_name(images, tmp_path):
    model = vit()
    more = {
        "mask_token": torch.zeros(1, 1, 512),
        "decoder_embed.weight": torch.zeros(512, 128),
        "head.bias": torch.zeros(3),
    }
    save_file(model.state_dict() | more, tmp_path / "full.safetensors")
    encoder = ddae.load_encoder(tmp_path / "full.safetensors", normalisation="half")
    same(encoder, model, images)
    assert encoder.report["left out"] == sorted(more)
    assert encoder.normalisation == "half"


def test_a_norm_after_the_mean_is_the_encoders(images, tmp_path):
    model = vit(global_pool="avg")
    torch.save(model.state_dict(), tmp_path / "avg.pth")
    encoder = ddae.load_encoder(tmp_path / "avg.pth")
    with torch.no_grad():
        wanted = model.fc_norm(model.forward_features(images))
    torch.testing.assert_close(encoder(images), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("named", ["timm", "beit"])
def test_layer_scale_is_folded(named, images):
    model = vit(init_values=0.1)
    state = model.state_dict()
    if named == "beit":
        state = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for name, v in state.items()}
    read = convert(state, "file")
    encoder = build_encoder(preset("demo").__class__(model=read.model))
    encoder.load_state_dict(read.weights)
    same(encoder, model, images)
    assert len(read.report["folded"]) == 6


def test_beits_form_and_back(images, tmp_path):
    model = vit()
    for block in model.blocks:  # a bias of the keys, which softmax cancels
        block.attn.qkv.bias.data[128:256] = 1.5
    state = to_beit(model.state_dict())
    assert "blocks.0.attn.qkv.bias" not in state
    assert state["blocks.0.attn.q_bias"].shape == (128,)
    torch.save({"module": state}, tmp_path / "beit.pth")
    encoder = ddae.load_encoder(tmp_path / "beit.pth")
    same(encoder, model, images)
    write_foreign(encoder, tmp_path / "again.pth", "beit")
    again = ddae.load_encoder(tmp_path / "again.pth")
    for name, values in encoder.state_dict().items():
        assert torch.equal(values, again.state_dict()[name]), name


@pytest.mark.parametrize("form", ["mae", "timm"])
def test_ours_there_and_back_bit_for_bit(form, images, tmp_path):
    encoder = build_encoder(preset("demo").__class__(model=convert(vit().state_dict(), "file").model))
    initialise(encoder, torch.Generator().manual_seed(0))
    if form == "timm":
        write_timm(encoder, tmp_path / "out")
        file = tmp_path / "out" / "model.safetensors"
    else:
        write_foreign(encoder, file := tmp_path / "out.pth", "mae")
    back = ddae.load_encoder(file)
    for name, values in encoder.state_dict().items():
        assert torch.equal(values, back.state_dict()[name]), name


def test_timm_loads_our_export_as_it_is(images, tmp_path):
    encoder = build_encoder(preset("ddae_vit_s16_100e"))
    initialise(encoder, torch.Generator().manual_seed(0))
    write_timm(encoder.eval(), tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    large = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    same(encoder, model, large)
    assert model.pretrained_cfg["mean"] == [0.5, 0.5, 0.5]
    bare = timm.create_model(
        "vit_small_patch16_224", num_classes=0, checkpoint_path=str(tmp_path / "model.safetensors")
    )
    same(encoder, bare.eval(), large)


def test_positions_are_resampled(tmp_path):
    save_file(vit().state_dict(), tmp_path / "vit.safetensors")
    encoder = ddae.load_encoder(tmp_path / "vit.safetensors", image_size=96)
    model, state = vit(img_size=96), vit().state_dict()
    square = state["pos_embed"][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    square = torch.nn.functional.interpolate(square, (6, 6), mode="bicubic", antialias=True)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], square.flatten(2).transpose(1, 2)], 1)
    model.load_state_dict(state)
    same(encoder, model, torch.randn(1, 3, 96, 96))
    with pytest.raises(UserError, match="image_size 100 is not divisible"):
        ddae.load_encoder(tmp_path / "vit.safetensors", image_size=100)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/ddae_was_here",)


@pytest.mark.parametrize(
    "content, message",
    [
        (lambda path: path.write_bytes(b"nonsense"), "cannot be read as weights|more than tensors"),
        (lambda path: path.write_bytes(b""), "cannot be read as weights"),
        (lambda path: torch.save({"model": {"conv.weight": torch.ones(1)}}, path), "it has no cls_token"),
        (lambda path: torch.save([1, 2], path), "it has no cls_token"),
        (lambda path: torch.save({"cls_token": torch.ones(1, 1, 64)}, path), "no whole encoder: norm.bias is missing"),
        (lambda path: torch.save({"model": Evil()}, path), "holds more than tensors"),
        (
            lambda path: torch.save(
                vit().state_dict() | {"rel_pos_bias.relative_position_bias_table": torch.ones(1)}, path
            ),
            "relative positions",
        ),
        (
            lambda path: torch.save({n: v for n, v in vit().state_dict().items() if n != "blocks.1.norm2.bias"}, path),
            "blocks.1.norm2.bias is missing, and 0 more",
        ),
    ],
)
def test_what_is_no_encoder_is_told(content, message, tmp_path):
    path = tmp_path / "weights.pth"
    content(path)
    with pytest.raises(UserError, match=message) as caught:
        ddae.load_encoder(path)
    assert "\n" not in str(caught.value)
    assert not os.path.exists("/tmp/ddae_was_here")


def test_the_command(tmp_path, monkeypatch, capsys):
    config = preset("demo")
    encoder = build_encoder(config)
    initialise(encoder, torch.Generator().manual_seed(0))
    export_encoder({name: v.detach() for name, v in encoder.named_parameters()}, config, tmp_path / "encoder")

    def export(*words):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ranks.ROOT / "launch" / "export.py"), run_name="__main__")
        return ended.value.code

    assert export("--encoder", tmp_path / "encoder", "--out", tmp_path / "timm") == 0
    assert "timm, images of 64 pixels, half" in capsys.readouterr().out
    weights = load_file(tmp_path / "timm" / "model.safetensors")
    assert torch.equal(weights["cls_token"], encoder.cls_token)
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["model_args"]["num_heads"] == 3
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=0).eval()
    same(encoder, model, torch.randn(1, 3, 64, 64))
    assert export("--encoder", tmp_path / "nothing", "--out", tmp_path / "x") == 2
    assert capsys.readouterr().err.startswith("export: ")
