"""Images and grids of patches that are not square: settings, crops, training, evaluations, exports."""

import io
import json

import numpy as np
import onnxruntime
import pytest
import ranks
import timm
import torch
from conftest import make_shards
from PIL import Image
from transformers import AutoModel

import ddae
from ddae.config.base import canonical_size, height_width
from ddae.config.cli import parse
from ddae.config.pretrain import EncoderShape, ModelConfig, PretrainConfig
from ddae.data.preview import preview_images
from ddae.data.sampling import ASPECT_RANGE, aspect_of, central_crops, clamped_crops, random_crops
from ddae.errors import UserError
from ddae.eval.baselines import pixel_features
from ddae.eval.dataset import ExampleReader
from ddae.eval.without_labels import evaluate
from ddae.export.encoder import encoder_hash, write_export
from ddae.export.formats import WRITERS
from ddae.export.hugging_face import load_mae_decoder
from ddae.models.vit import Encoder, initialise
from ddae.training.tracker import read_metrics

SIZE = (32, 16)  # height and width
SHAPE = ModelConfig(width=32, depth=2, heads=2, image_size=SIZE, patch_size=8)
REPORT = "--train.report"
SIDES = torch.tensor([[640, 480], [480, 640], [100, 900], [7, 9]])  # width and height of images


def encoder_of(shape: ModelConfig) -> Encoder:
    encoder = Encoder(shape)
    initialise(encoder, torch.Generator().manual_seed(0))
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return encoder.eval().requires_grad_(False)


def test_equal_sides_are_one_number():
    assert canonical_size((224, 224)) == 224
    assert height_width(224) == (224, 224)
    square = parse(["--preset", "demo", "--model.image_size", "64"])
    assert parse(["--preset", "demo", "--model.image_size", "64", "64"]) == square
    assert square.to_dict()["model"]["image_size"] == 64
    assert EncoderShape(image_size=[48, 48]).image_size == 48  # type: ignore[arg-type] - JSON has lists


def test_settings_survive_json(tmp_path):
    config = parse(["--preset", "demo", "--model.image_size", "64", "32"])
    assert config.grid == (8, 4)
    assert config.num_masked == 24
    config.write(tmp_path / "config.json")
    assert PretrainConfig.read(tmp_path / "config.json") == config
    assert hash(config.model) == hash(PretrainConfig.read(tmp_path / "config.json").model)


def test_a_size_that_is_no_multiple_of_the_patch_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model.image_size is 66 35; expected a multiple .* 8. Pass .* 64 32, or"):
        parse(["--preset", "demo", "--model.image_size", "66", "35"])
    write_export(encoder_of(SHAPE), tmp_path / "encoder")
    with pytest.raises(UserError, match="image_size is 32 15; expected a multiple of the patch size 8"):
        ddae.load_encoder(tmp_path / "encoder", image_size=(32, 15))


@pytest.mark.parametrize("size", [(224, 160), (16, 64), (32, 32)])
def test_crops_have_the_aspect_of_the_images(size):
    rows, columns = aspect = aspect_of(size)
    count = 500
    width, height = (SIDES[:, i].repeat_interleave(count) for i in (0, 1))
    seeds = torch.arange(len(width)) * 104729
    for crops in (random_crops, clamped_crops, central_crops):
        boxes, _ = crops(seeds, width, height, (0.2, 1.0), aspect)
        left, top, wide, tall = boxes.unbind(1)
        assert (left >= 0).all()
        assert (top >= 0).all()
        assert (left + wide <= width).all()
        assert (top + tall <= height).all()
        assert (boxes[:, 2:] >= 1).all()
    boxes, _ = random_crops(seeds, width, height, (0.2, 1.0), aspect)
    large = (boxes[:, 2:].amin(1) > 50) & (width < 900) & (height < 900)
    ratio = boxes[large, 2] / boxes[large, 3] * rows / columns
    assert len(ratio) > 100
    assert ASPECT_RANGE[0] * 0.95 < float(ratio.min()) < 0.85
    assert 1.15 < float(ratio.max()) < ASPECT_RANGE[1] * 1.05
    boxes, _ = central_crops(seeds, width, height, (1.0, 1.0), aspect)
    exact = torch.minimum(width / columns, height / rows) * 0.875
    assert ((boxes[:, 2] - (exact * columns).clamp(min=1)).abs() <= 0.5).all()
    assert ((boxes[:, 3] - (exact * rows).clamp(min=1)).abs() <= 0.5).all()


def test_square_crops_are_those_without_an_aspect():
    width, height = SIDES[:, 0], SIDES[:, 1]
    for crops in (random_crops, clamped_crops, central_crops):
        for one, other in zip(
            crops(torch.arange(4), width, height, (0.2, 1.0)),
            crops(torch.arange(4), width, height, (0.2, 1.0), aspect_of(224)),
            strict=True,
        ):
            assert torch.equal(one, other)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), (12, 8))


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """Return the folder of a run of two steps, resumed after one."""
    folder = tmp_path_factory.mktemp("run") / "run"
    args = ranks.arguments(shards, folder, 0, "--model.image_size", *map(str, SIZE), "--engine.precision", "fp32")
    ranks.run_all(1, [[*args, "--train.steps", "1"], [*args, "--train.steps", "2", "--train.allow_longer", REPORT]])
    return folder


def test_training_resumes_and_reports(run):
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(np.isfinite(row["loss/total"]) for row in rows)
    with Image.open(run / "figures" / "reconstructions.png") as figure:
        assert figure.height > 100
    assert json.loads((run / "encoder" / "config.json").read_text())["model"]["image_size"] == list(SIZE)
    assert ddae.load_encoder(run).shape.image_size == SIZE
    assert ddae.load_encoder(run / "encoder").grid == (4, 2)
    assert load_mae_decoder(run) is None


def test_one_crop_in_all_evaluations(run, shards):
    """ExampleReader, encoder.transform and the pictures of a report have the encoder's size."""
    encoder = ddae.load_encoder(run)
    reader = ExampleReader(str(shards), "train", SIZE, labelled=False)
    image, _ = reader[0]
    assert image.shape == (3, *SIZE)
    encoded = bytes(reader.shards.read(0))
    with Image.open(io.BytesIO(encoded)) as photo:
        transformed = encoder.transform(photo)
    assert torch.equal(transformed, torch.from_numpy(image).float() / 127.5 - 1)
    preview = preview_images(parse(["--data.train", str(shards)]).data, SIZE, 3)
    assert preview.images.shape == (3, 3, *SIZE)
    assert pixel_features(torch.from_numpy(image)[None]).shape == (1, 3 * 32 * 16)
    assert encoder(transformed[None]).shape == (1, 1 + 8, 32)
    with pytest.raises(ValueError, match=r"expects \[B, 3, 32, 16\]"):
        encoder(torch.zeros(1, 3, 16, 32))


def test_embeddings_and_report_without_labels(run, shards, tmp_path):
    pictures = tmp_path / "photos"
    pictures.mkdir()
    for number in range(3):
        Image.effect_noise((60 + 20 * number, 50), 60).convert("RGB").save(pictures / f"{number}.png")
    assert ddae.embed(run, sorted(pictures.iterdir())).shape == (3, 32)
    results = evaluate(str(run), str(shards), tmp_path / "report", 16)
    assert all(0 <= each["two_crop_retrieval"] <= 100 for each in results["features"].values())
    with Image.open(next((tmp_path / "report").glob("**/similar.png"))) as figure:
        assert figure.width > 100


@pytest.mark.parametrize("shape", [(16, 36), (36, 16)])
def test_positions_are_resampled_between_grids_of_as_many_patches(shape):
    """Grids of 4 x 9, 9 x 4 and 6 x 6 patches: the tables have equal shapes and different values."""
    encoder = encoder_of(ModelConfig(width=32, depth=1, heads=2, image_size=24, patch_size=4))
    before = encoder.pos_embed.clone()
    encoder.set_image_size(shape)
    assert encoder.grid == (shape[0] // 4, shape[1] // 4)
    assert encoder.pos_embed.shape == before.shape
    assert not torch.allclose(encoder.pos_embed, before)
    assert encoder(torch.zeros(1, 3, *shape)).shape == (1, 37, 32)


@pytest.mark.parametrize("form", ["ddae", "timm", "transformers", "mae", "beit"])
@pytest.mark.parametrize("size", [SIZE, (16, 36)])
def test_exports_are_read_with_their_grid(form, size, tmp_path):
    """4 x 2 patches, which are no square, and 4 x 9, which are as many as those of a square of 6 x 6."""
    encoder = encoder_of(ModelConfig(width=32, depth=2, heads=2, image_size=size, patch_size=8 if size == SIZE else 4))
    WRITERS[form](encoder, tmp_path / "out")
    back = ddae.load_encoder(tmp_path / "out", heads=2)
    assert back.shape.image_size == size
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(back(images), encoder(images), rtol=1e-5, atol=1e-5)
    if form == "ddae":
        assert encoder_hash(back) == encoder_hash(encoder)
    if form == "timm":
        model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0).eval()
        torch.testing.assert_close(model.forward_features(images), encoder(images), rtol=1e-5, atol=1e-5)
        assert timm.data.resolve_model_data_config(model)["input_size"] == [3, *size]
    if form == "transformers":
        model = AutoModel.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(model(images).last_hidden_state, encoder(images), rtol=1e-5, atol=1e-5)


def test_programs_take_the_size(tmp_path):
    encoder, images = encoder_of(SHAPE), torch.randn(3, 3, *SIZE)
    WRITERS["onnx"](encoder, tmp_path / "encoder.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "encoder.onnx"))
    (tokens,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(tokens), encoder(images), rtol=1e-4, atol=1e-5)
    WRITERS["torch"](encoder, tmp_path / "encoder.pt2")
    program = torch.export.load(str(tmp_path / "encoder.pt2")).module()
    torch.testing.assert_close(program(images), encoder(images), rtol=1e-5, atol=1e-5)


def test_relative_positions(tmp_path):
    shape = ModelConfig(32, 2, 2, SIZE, 8, positions="none", relative_positions="shared", layer_scale=0.1)
    encoder = encoder_of(shape)
    WRITERS["beit"](encoder, tmp_path / "beit.pth")
    back = ddae.load_encoder(tmp_path / "beit.pth")
    assert back.grid == (4, 2)
    images = torch.randn(2, 3, *SIZE)
    torch.testing.assert_close(back(images), encoder(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="not square, which timm does not read"):
        WRITERS["timm"](encoder, tmp_path / "timm")
