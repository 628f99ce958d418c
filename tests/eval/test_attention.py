"""Attention maps against an explicit softmax, their statistics against hand-computed values, the paper's figures."""

import json
import shutil

import pytest
import ranks
import torch

from ddae.config.pretrain import ModelConfig
from ddae.errors import UserError
from ddae.eval.attention_metrics import (
    attention_distance,
    attention_maps,
    cls_attention,
    foreground_iou,
    head_diversity,
    measure_locality,
    patch_distances,
)
from ddae.eval.paper_figures import FigureSettings, draw_paper_figures
from ddae.models.vit import Encoder, initialise


def encoder_of(**changes):
    encoder = Encoder(ModelConfig(**{"width": 64, "depth": 4, "heads": 2, "image_size": 32, "patch_size": 8} | changes))
    initialise(encoder, torch.Generator().manual_seed(0))
    return encoder.eval().requires_grad_(False)


@pytest.mark.parametrize("relative", ["none", "each", "shared"])
def test_maps_equal_explicit_softmax(relative):
    encoder, pixels = encoder_of(relative_positions=relative), torch.randn(3, 3, 32, 32)
    for name, parameter in encoder.named_parameters():
        if name.endswith("relative_position_bias_table"):
            parameter.normal_()
    maps = attention_maps(encoder, pixels, [1, 3])
    assert list(maps) == [1, 3]
    tokens = encoder.features(pixels, [2])[0]
    block = encoder.blocks[2]
    width, heads = 64, 2
    projected = block.norm1(tokens) @ block.attn.qkv.weight.T + block.attn.qkv.bias
    query, key = (projected[..., part * width : (part + 1) * width].unflatten(-1, (heads, -1)) for part in (0, 1))
    logits = torch.einsum("bihd,bjhd->bhij", query, key) / (width / heads) ** 0.5
    if relative != "none":
        bias = block.attn.rel_pos_bias if relative == "each" else encoder.rel_pos_bias
        logits = logits + bias.get_bias()
    torch.testing.assert_close(maps[3], logits.exp() / logits.exp().sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(encoder(pixels), encoder(pixels))
    assert all(each.attn.fused_attn for each in encoder.blocks)
    with pytest.raises(ValueError, match=r"blocks are \[5\]; expected one or more numbers from 1 to 4"):
        attention_maps(encoder, pixels, [5])


def test_attention_distance_of_known_maps():
    uniform = torch.full((1, 2, 197, 197), 1 / 197)
    assert attention_distance(uniform, (14, 14)).tolist() == [[pytest.approx(7.28, abs=2e-3)] * 2]
    assert 16 * float(attention_distance(uniform, (14, 14))[0, 0]) == pytest.approx(116.5, abs=0.05)
    assert attention_distance(torch.eye(197).expand(1, 2, -1, -1), (14, 14)).tolist() == [[0, 0]]
    assert float(patch_distances((14, 14)).max()) == pytest.approx(18.38, abs=0.01)
    shifted = torch.zeros(1, 1, 10, 10)  # a 3 x 3 grid; a patch attends to its right neighbour, the last to the first
    for patch in range(9):
        shifted[0, 0, 1 + patch, 1 + (patch + 1 if patch % 3 < 2 else patch - 2)] = 0.25
    shifted[..., 0] = 0.75  # attention to the cls token is ignored
    assert attention_distance(shifted, (3, 3)).tolist() == [[pytest.approx((6 * 1 + 3 * 2) / 9)]]


def test_diversity_of_equal_and_disjoint_heads():
    eye, other = torch.eye(5), torch.roll(torch.eye(5), 1, 1)
    other[:, 0] = 0
    other[1:, 1:] = torch.roll(torch.eye(4), 1, 1)
    assert head_diversity(torch.stack([eye, eye])[None]).tolist() == [pytest.approx(0)]
    assert head_diversity(torch.stack([eye, other])[None]).tolist() == [pytest.approx(1)]
    assert head_diversity(torch.stack([eye, eye, other])[None]).tolist() == [pytest.approx(2 / 3)]
    assert head_diversity(eye[None, None]).tolist() == [0]


def test_locality_is_averaged_over_images():
    encoder = encoder_of()
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    whole, parts = measure_locality(encoder, [images]), measure_locality(encoder, [images[:2], images[2:]])
    assert whole.distance.shape == (4, 2)
    torch.testing.assert_close(whole.distance, parts.distance)
    torch.testing.assert_close(whole.diversity, parts.diversity)
    distance, diversity = whole.deep_half
    assert distance == pytest.approx(float(whole.distance[2:].mean()))
    assert 0 < diversity < 1


def test_foreground_iou():
    maps = torch.tensor([[[0.4, 0.3], [0.2, 0.1]], [[0.7, 0.1], [0.1, 0.1]], [[1.0, 0], [0, 0]]])
    foreground = torch.tensor([[[1, 1], [0, 0]], [[0, 1], [0, 1]], [[0, 0], [0, 0]]]).bool()
    iou = foreground_iou(maps, foreground)
    assert iou[:2].tolist() == [1, 0]
    assert iou[2].isnan()
    attention = torch.rand(2, 3, 5, 5)
    torch.testing.assert_close(cls_attention(attention, (2, 2))[1, 1, 0], attention[1, :, 0, 3].mean())


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery") / "run"
    options = ("--train.steps", "6", "--train.save_every", "3", "--engine.precision", "fp32")
    ranks.run_all(1, [ranks.arguments(digits, folder, 1, *options)])
    return folder


def settings(kinds=(), block=2, masks="", svg=False):
    return FigureSettings(kinds, block, 20, 3, svg, masks, 0)


def test_figures_of_a_run_and_an_encoder(run, encoder_folder, digits, tmp_path):
    named = [str(run), f"plain={encoder_folder}"]
    results = draw_paper_figures(named, "", tmp_path / "out", settings(svg=True))
    assert results["locality"].keys() == {"run", "plain"}
    for statistics in results["locality"].values():
        assert 0 < statistics["distance_px"] < 32
        assert 0 <= statistics["diversity"] <= 1
    names = {"distance", "attention", "locality", "betas", "reconstructions_run"}
    assert {file.stem for file in (tmp_path / "out" / "figures").glob("*.png")} == names
    assert {file.stem for file in (tmp_path / "out").glob("*.svg")} == names
    page = (tmp_path / "out" / "report.html").read_text()
    for name in names:
        assert f'<img alt="{name}"' in page
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results


def test_the_encoder_of_a_run_of_version_0_1_is_drawn(run, digits, tmp_path):
    """Its export is readable; figures that need its checkpoints or settings are left out."""
    shutil.copytree(run, old := tmp_path / "old", ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "format"}))
    draw_paper_figures([str(old)], str(digits), tmp_path / "out", settings(("locality", "attention")))
    drawn = {file.stem for file in (tmp_path / "out" / "figures").glob("*.png")}
    assert drawn == {"locality", "attention"}


def test_user_errors(run, encoder_folder, digits, tmp_path):
    def error(named, data="", **changes):
        with pytest.raises(UserError) as caught:
            draw_paper_figures(named, data, tmp_path / "none", settings(**changes))
        assert not (tmp_path / "none").exists()
        return str(caught.value)

    plain = str(encoder_folder)
    assert error([plain], str(digits), kinds=["betas"]).endswith(
        "logged no betas; expected a run folder of a dynamic method."
    )
    assert "has no checkpoint of a pixel branch" in error([plain], str(digits), kinds=["reconstructions"])
    assert "--what contains 'beta'; expected some of distance, attention" in error([plain], str(digits), kinds=["beta"])
    assert error([str(run)], block=3) == "--block is 3; expected 1 to 2, the blocks of run."
    assert error([str(run)], block=0) == "--block is 0; expected 1 to 2, the blocks of run."
    assert error([str(run), str(run)]).startswith("two encoders have the same name")
    assert error([plain]) == "no images are given. Pass --data with a folder of shards."
    assert "These shards have no masks" in error([str(run)], masks=str(digits))
