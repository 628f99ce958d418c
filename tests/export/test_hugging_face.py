"""Exports that transformers reads: equal features, and of MAE runs equal reconstructions."""

import io
import json
import runpy
import sys
from dataclasses import replace

import numpy as np
import pytest
import ranks
import torch
from image_archives import photo
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel, ViTMAEForPreTraining, ViTModel

import ddae
from ddae.config.presets import preset
from ddae.config.pretrain import EncoderShape, ModelConfig
from ddae.config.scales import at_scale
from ddae.data.masking import Mask
from ddae.distributed.checkpoint_format import sha256
from ddae.errors import UserError
from ddae.export.encoder import write_export
from ddae.export.hugging_face import write_transformers
from ddae.method.branches import PixelBranch
from ddae.method.model import build_model
from ddae.models.patches import normalise
from ddae.models.vit import Encoder, initialise

SHAPE = ModelConfig(width=24, depth=3, heads=2, image_size=32, patch_size=8)


def encoder_of(shape: ModelConfig) -> Encoder:
    encoder = Encoder(shape)
    initialise(encoder, torch.Generator().manual_seed(0))
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return encoder.eval().requires_grad_(False)


@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
@pytest.mark.parametrize("normalisation", ["half", "imagenet"])
def test_features_are_equal(layer_scale, normalisation, tmp_path):
    encoder = encoder_of(replace(SHAPE, layer_scale=layer_scale))
    encoder.normalisation = normalisation
    write_transformers(encoder, tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert isinstance(model, ViTModel)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(images).last_hidden_state, encoder(images), rtol=1e-5, atol=1e-5)
    back = ddae.load_encoder(tmp_path / "out")
    torch.testing.assert_close(back(images), encoder(images), rtol=1e-5, atol=1e-5)
    assert back.normalisation == normalisation


def test_the_processor_crops_and_normalises_as_evaluations(tmp_path):
    encoder = encoder_of(replace(SHAPE, image_size=224, patch_size=16, depth=1))
    write_transformers(encoder, tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    with Image.open(io.BytesIO(photo(3, quality=95))) as image:
        image = image.resize((600, 400))
        theirs = processor(image, return_tensors="pt")["pixel_values"][0]
        ours = encoder.transform(image)
    assert theirs.shape == ours.shape
    assert float((theirs - ours).abs().mean()) < 0.02  # another order of resizing and cropping


@pytest.fixture(scope="module")
def mae_run(tmp_path_factory):
    """Return a run folder of MAE at the scale nano with a checkpoint, and its model."""
    folder = tmp_path_factory.mktemp("mae") / "run"
    config = at_scale(preset("mae_vit_s16_100e"), "nano")
    config = replace(config, pixel=replace(config.pixel, norm="joint"))
    model = build_model(config)
    checkpoint = folder / "checkpoints" / "step_00000008"
    checkpoint.mkdir(parents=True)
    config.write(folder / "config.json")
    tensors = {f"weight/{name}": each.detach().flatten() for name, each in model.named_parameters()}
    save_file(tensors, checkpoint / "rank_00000.safetensors", {"starts": json.dumps(dict.fromkeys(tensors, 0))})
    files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in checkpoint.iterdir()}
    (checkpoint / "manifest.json").write_text(json.dumps({"files": files}))
    return folder, config, model.eval()


def export(monkeypatch, *args) -> int:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ranks.ROOT / "launch" / "export.py"), run_name="__main__")
    return end.value.code


def test_mae_with_its_decoder(mae_run, tmp_path, monkeypatch):
    folder, config, model = mae_run
    assert export(monkeypatch, "--encoder", folder, "--form", "transformers", "--out", tmp_path / "out") == 0
    theirs = ViTMAEForPreTraining.from_pretrained(tmp_path / "out").eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = normalise(images, config.data.normalisation, torch.float32)
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    order = noise.argsort(1)
    mask = Mask(order[:, :4], order[:, 4:])
    branch = model.branches["pixel"]
    assert isinstance(branch, PixelBranch)
    with torch.no_grad():
        output = theirs(pixels, noise=noise)
        ours = branch.predict(model.encode(images, mask.visible), mask)[0]
    found = output.logits.gather(1, mask.masked[:, :, None].expand(-1, -1, ours.shape[-1]))
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-5)
    as_encoder = AutoModel.from_pretrained(tmp_path / "out", mask_ratio=0.0).eval()
    with torch.no_grad():
        tokens = as_encoder(pixels, noise=torch.arange(16).expand(2, -1) / 16).last_hidden_state
        torch.testing.assert_close(tokens, model.encoder(pixels), rtol=1e-4, atol=1e-5)
    assert "AutoModel.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    assert export(monkeypatch, "--encoder", folder, "--form", "transformers", "--out", tmp_path / "out") == 0  # again


def test_encoders_that_transformers_lacks_are_refused(tmp_path):
    relative = encoder_of(replace(SHAPE, positions="none", relative_positions="shared"))
    registers = encoder_of(EncoderShape(width=24, depth=1, heads=2, image_size=16, patch_size=8, registers=2))
    for encoder, message in ((relative, "relative positions"), (registers, "reg_token")):
        with pytest.raises(UserError, match=message):
            write_transformers(encoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_real_models_of_transformers_are_read(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTMAEConfig, ViTMAEModel

    sizes = shape | {"image_size": 32, "patch_size": 8}
    mae = ViTMAEConfig(**sizes, mask_ratio=0.0)
    dino = Dinov2Config(**{k: v for k, v in sizes.items() if k != "intermediate_size"}, mlp_ratio=4)
    images = torch.randn(2, 3, 32, 32)
    for kind, config in ((ViTModel, ViTConfig(**sizes)), (ViTMAEModel, mae), (Dinov2Model, dino)):
        model = kind(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path / kind.__name__)
        options = {"noise": torch.arange(16).expand(2, -1) / 16} if kind is ViTMAEModel else {}
        with torch.no_grad():
            expected = model(images, **options).last_hidden_state
        found = ddae.load_encoder(tmp_path / kind.__name__)(images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_export_of_a_folder_needs_no_transformers(tmp_path, monkeypatch):
    write_export(encoder_of(SHAPE), tmp_path / "encoder")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert (
        export(monkeypatch, "--encoder", tmp_path / "encoder", "--form", "transformers", "--out", tmp_path / "x") == 0
    )
    assert np.isin(["config.json", "model.safetensors"], [path.name for path in (tmp_path / "x").iterdir()]).all()
