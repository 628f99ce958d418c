"""Conversion of published weights: equal features in both implementations, and errors for other files."""

import argparse
import errno
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
from ddae.config.presets import preset
from ddae.distributed.checkpoint_format import sha256
from ddae.errors import UserError
from ddae.export.encoder import export_encoder, write_export
from ddae.export.formats import write_beit, write_mae, write_onnx, write_timm, write_torch_export
from ddae.export.published_weights import convert, to_beit
from ddae.models.vit import Encoder, initialise

SHAPE = {"img_size": 64, "patch_size": 16, "embed_dim": 128, "depth": 3, "num_heads": 2, "num_classes": 0}


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def vit(**options):
    """Return timm's Vision Transformer of 2 heads with random weights, none of them zero or one."""
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", **SHAPE | options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def assert_same_features(encoder, model, images, tolerance=1e-5):
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), model.forward_features(images), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("container", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_load_mae_and_timm_files(container, prefix, images, tmp_path):
    model = vit()
    state = {f"{prefix}{name}": values for name, values in model.state_dict().items()}
    torch.save(state if container is None else {container: state, "args": argparse.Namespace(lr=1)}, tmp_path / "m.pth")
    encoder = ddae.load_encoder(tmp_path / "m.pth", heads=2)
    assert_same_features(encoder, model, images)
    assert encoder.normalisation == "imagenet"
    assert len(encoder.report["loaded"]) == len(state)
    assert encoder.report["left out"] == []


def test_decoder_and_head_are_left_out(images, tmp_path):
    model = vit()
    other = {
        "mask_token": torch.zeros(1, 1, 512),
        "decoder_embed.weight": torch.zeros(512, 128),
        "head.bias": torch.zeros(3),
    }
    save_file(model.state_dict() | other, tmp_path / "full.safetensors")
    encoder = ddae.load_encoder(tmp_path / "full.safetensors", normalisation="half", heads=2)
    assert_same_features(encoder, model, images)
    assert encoder.report["left out"] == sorted(other)
    assert encoder.normalisation == "half"


def test_fc_norm_becomes_final_norm(images, tmp_path):
    model = vit(global_pool="avg")
    torch.save(model.state_dict(), tmp_path / "avg.pth")
    encoder = ddae.load_encoder(tmp_path / "avg.pth", heads=2)
    with torch.no_grad():
        expected = model.fc_norm(model.forward_features(images))
    torch.testing.assert_close(encoder(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", ["timm", "beit"])
def test_layer_scale_is_loaded_and_folded_for_mae(names, images, tmp_path):
    model = vit(init_values=0.1)
    state = model.state_dict()
    if names == "beit":
        state = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for name, v in state.items()}
    converted = convert(state, "file", heads=2)
    encoder = Encoder(converted.model)
    encoder.load_state_dict(converted.weights)
    assert_same_features(encoder, model, images)
    assert torch.equal(encoder.blocks[1].ls1.gamma, model.blocks[1].ls1.gamma)
    write_mae(encoder, tmp_path / "folded.pth")
    folded = ddae.load_encoder(tmp_path / "folded.pth")
    assert folded.shape.layer_scale == 0
    assert_same_features(folded, model, images)


def beit(**options):
    """Return timm's BEiT with random weights."""
    torch.manual_seed(0)
    model = timm.create_model("beit_base_patch16_224", **SHAPE | {"global_pool": "token"} | options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


EACH = {"use_abs_pos_emb": False, "use_rel_pos_bias": True}
SHARED = {"use_abs_pos_emb": False, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}


@pytest.mark.parametrize("options", [EACH, SHARED, EACH | {"use_abs_pos_emb": True}, EACH | {"init_values": None}])
def test_beit_round_trip(options, images, tmp_path):
    model = beit(**options)
    torch.save({"model": model.state_dict()}, tmp_path / "beit.pth")
    encoder = ddae.load_encoder(tmp_path / "beit.pth")
    assert_same_features(encoder, model, images)
    assert all("index" in name for name in encoder.report["left out"])
    write_beit(encoder, tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth")["model"]
    for name, values in model.state_dict().items():
        assert torch.equal(again[name], values) or "k_bias" in name or "index" in name, name
    write_export(encoder, tmp_path / "export")
    assert_same_features(ddae.load_encoder(tmp_path / "export"), model, images)
    write_timm(encoder, tmp_path / "timm")
    back = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=0).eval()
    assert_same_features(encoder, back, images)
    with pytest.raises(UserError, match="relative positions, which MAE's form lacks"):
        write_mae(encoder, tmp_path / "mae.pth")


def test_relative_positions_are_resampled_as_in_timm(tmp_path):
    torch.save(beit(**EACH).state_dict(), tmp_path / "beit.pth")
    encoder, larger = ddae.load_encoder(tmp_path / "beit.pth", image_size=96), beit(**EACH, img_size=96)
    larger.load_state_dict(timm.models.beit.checkpoint_filter_fn(beit(**EACH).state_dict(), larger))
    assert_same_features(encoder, larger, torch.randn(1, 3, 96, 96))


def layout(kind, width=768, depth=12, patch=16):
    """Return tensors with the names and shapes of a published file (ViT-B at 224 pixels)."""
    block = {"norm1.weight": [width], "norm1.bias": [width], "norm2.weight": [width], "norm2.bias": [width]}
    block |= {"attn.qkv.weight": [3 * width, width], "attn.proj.weight": [width, width], "attn.proj.bias": [width]}
    block |= {"mlp.fc1.weight": [4 * width, width], "mlp.fc1.bias": [4 * width]}
    block |= {"mlp.fc2.weight": [width, 4 * width], "mlp.fc2.bias": [width]}
    names = {"cls_token": [1, 1, width], "patch_embed.proj.weight": [width, 3, patch, patch]}
    names |= {"patch_embed.proj.bias": [width], "norm.weight": [width], "norm.bias": [width]}
    if kind.startswith("mae"):
        block |= {"attn.qkv.bias": [3 * width]}
    else:
        block |= {"attn.q_bias": [width], "attn.v_bias": [width]}
    if kind == "beit":
        names |= {"rel_pos_bias.relative_position_bias_table": [732, 12]}
        names |= {"mask_token": [1, 1, width], "lm_head.weight": [8192, width], "lm_head.bias": [8192]}
        block |= {"gamma_1": [width], "gamma_2": [width]}
    elif kind == "beit_finetuned":
        del names["norm.weight"], names["norm.bias"]
        names |= {"fc_norm.weight": [width], "fc_norm.bias": [width], "head.weight": [10, width], "head.bias": [10]}
        block |= {"gamma_1": [width], "gamma_2": [width], "attn.relative_position_bias_table": [732, 12]}
        block |= {"attn.relative_position_index": [197, 197]}
    else:
        names |= {"pos_embed": [1, 197, width]}
    if kind == "mae_full":
        names |= {"mask_token": [1, 1, 512], "decoder_pos_embed": [1, 197, 512], "decoder_embed.weight": [512, width]}
        names |= {"decoder_blocks.0.norm1.weight": [512], "decoder_norm.weight": [512], "decoder_pred.bias": [768]}
    if kind == "bootmae":
        names |= {"mask_token": [1, 1, 512], "de_pos_embed": [1, 197, 512], "down.weight": [512, width]}
        names |= {
            "decode_blocks.0.norm1.weight": [512],
            "lm_head.weight": [512, 3, 16, 16],
            "mask_token_1": [1, 1, 512],
        }
    names |= {f"blocks.{n}.{part}": size for n in range(depth) for part, size in block.items()}
    return {name: torch.full(size, 0.01) for name, size in names.items()}


@pytest.mark.parametrize("kind", ["mae", "mae_full", "beit", "beit_finetuned", "bootmae"])
def test_each_published_layout_is_complete(kind):
    state = layout(kind)
    converted = convert(state, kind)
    shape, report = converted.model, converted.report
    Encoder(shape).load_state_dict(converted.weights)  # strict: no missing and no unexpected tensor
    assert (shape.width, shape.depth, shape.heads, shape.image_size) == (768, 12, 12, 224)
    assert set(report["loaded"]) | set(report["left out"]) == set(state)
    other = ("mask_token", "lm_head", "head", "de", "down", "index")
    assert all(any(part in name for part in other) for name in report["left out"])


def test_beit_form_drops_key_bias(images, tmp_path):
    model = vit()
    for block in model.blocks:  # softmax cancels a bias of the keys
        block.attn.qkv.bias.data[128:256] = 1.5
    state = to_beit(model.state_dict())
    assert "blocks.0.attn.qkv.bias" not in state
    assert state["blocks.0.attn.q_bias"].shape == (128,)
    torch.save({"module": state}, tmp_path / "beit.pth")
    encoder = ddae.load_encoder(tmp_path / "beit.pth", heads=2)
    assert_same_features(encoder, model, images)
    write_beit(encoder, tmp_path / "again.pth")
    again = ddae.load_encoder(tmp_path / "again.pth")
    for name, values in encoder.state_dict().items():
        assert torch.equal(values, again.state_dict()[name]), name


@pytest.mark.parametrize("form", ["mae", "timm"])
def test_export_round_trip_is_exact(form, images, tmp_path):
    encoder = Encoder(convert(vit().state_dict(), "file", heads=2).model)
    initialise(encoder, torch.Generator().manual_seed(0))
    if form == "timm":
        write_timm(encoder, tmp_path / "out")
        file = tmp_path / "out" / "model.safetensors"
    else:
        write_mae(encoder, file := tmp_path / "out.pth")
    back = ddae.load_encoder(file)
    for name, values in encoder.state_dict().items():
        assert torch.equal(values, back.state_dict()[name]), name


def test_timm_loads_the_export(images, tmp_path):
    encoder = Encoder(preset("ddae_vit_s16_100e").model)
    initialise(encoder, torch.Generator().manual_seed(0))
    write_timm(encoder.eval(), tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    large = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    assert_same_features(encoder, model, large)
    assert model.pretrained_cfg["mean"] == [0.5, 0.5, 0.5]
    without_config = timm.create_model(
        "vit_small_patch16_224", num_classes=0, checkpoint_path=str(tmp_path / "model.safetensors")
    )
    assert_same_features(encoder, without_config.eval(), large)


@pytest.mark.parametrize("options", [{}, EACH | {"init_values": 0.1}])
def test_exported_programs_give_equal_features(options, images, tmp_path):
    import onnxruntime

    torch.save((beit(**options) if options else vit()).state_dict(), tmp_path / "weights.pth")
    encoder = ddae.load_encoder(tmp_path / "weights.pth", heads=2)
    five = torch.cat([images, images, images[:1]])
    with torch.no_grad():
        expected = encoder(five)
    write_torch_export(encoder, tmp_path / "encoder.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "encoder.pt2").module()(five), expected)
    write_onnx(encoder, tmp_path / "encoder.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    (tokens,) = session.run(None, {"images": five.numpy()})
    torch.testing.assert_close(torch.from_numpy(tokens), expected, rtol=1e-4, atol=1e-5)


def test_positions_are_resampled(tmp_path):
    save_file(vit().state_dict(), tmp_path / "vit.safetensors")
    encoder = ddae.load_encoder(tmp_path / "vit.safetensors", image_size=96, heads=2)
    model, state = vit(img_size=96), vit().state_dict()
    square = state["pos_embed"][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    square = torch.nn.functional.interpolate(square, (6, 6), mode="bicubic", antialias=True)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], square.flatten(2).transpose(1, 2)], 1)
    model.load_state_dict(state)
    assert_same_features(encoder, model, torch.randn(1, 3, 96, 96))
    with pytest.raises(UserError, match="image_size is 100; expected a multiple of the patch size 16"):
        ddae.load_encoder(tmp_path / "vit.safetensors", image_size=100, heads=2)


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
        (
            lambda path: torch.save({"cls_token": torch.ones(1, 1, 64)}, path),
            "incomplete encoder: norm.bias is missing",
        ),
        (lambda path: torch.save({"model": Evil()}, path), "holds more than tensors"),
        (
            lambda path: torch.save({n: v for n, v in vit().state_dict().items() if n != "blocks.1.norm2.bias"}, path),
            "blocks.1.norm2.bias is missing, and 0 more",
        ),
    ],
)
def test_other_files_raise(content, message, tmp_path):
    path = tmp_path / "weights.pth"
    content(path)
    with pytest.raises(UserError, match=message) as raised:
        ddae.load_encoder(path)
    assert "\n" not in str(raised.value)
    assert not os.path.exists("/tmp/ddae_was_here")


@pytest.fixture
def export(monkeypatch):
    """Return a function that runs launch/export.py and returns its exit code."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, args)])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(ranks.ROOT / "launch" / "export.py"), run_name="__main__")
        return exit_info.value.code

    return run


@pytest.mark.parametrize("form, out", [("timm", "run"), ("ddae", "run"), ("timm", "run/config.json"), ("mae", "run")])
def test_export_never_deletes_what_it_did_not_write(form, out, run_folder, tmp_path, export, capsys):
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
    assert export("--encoder", run_folder, "--form", form, "--out", tmp_path / out) == 2
    message = capsys.readouterr().err
    assert ("which no export wrote. Pass a new folder." in message) == (form != "mae" and out == "run")
    assert ("exists. Pass a new path." in message) == (form == "mae" or out != "run")
    assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")} == before


def test_export_replaces_an_export(run_folder, tmp_path, export, capsys):
    new = tmp_path / "missing" / "parent" / "out"
    for form in ("timm", "ddae", "ddae"):
        assert export("--encoder", run_folder, "--form", form, "--out", new) == 0
    assert {path.name for path in new.iterdir()} == {"README.md", "config.json", "encoder.safetensors"}
    (new / "notes.txt").write_text("mine")
    assert export("--encoder", run_folder, "--form", "ddae", "--out", new) == 2
    assert "contains notes.txt, which no export wrote" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert export("--encoder", run_folder, "--out", tmp_path / "file" / "out") == 2
    assert "cannot be written (File exists)" in capsys.readouterr().err


def test_export_leaves_its_neighbours_alone(run_folder, tmp_path, export, capsys, monkeypatch):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "mine.txt").write_text("mine")
    assert export("--encoder", run_folder, "--form", "ddae", "--out", tmp_path / "out") == 0
    assert (tmp_path / "out.part" / "mine.txt").read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "out")
    assert export("--encoder", run_folder, "--form", "timm", "--out", tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.part", "link", "run"}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert export("--encoder", run_folder, "--form", "ddae", "--out", "~/at_home") == 0
    assert (tmp_path / "at_home" / "encoder.safetensors").exists()


def test_a_runs_own_export_is_not_replaced(run_folder, export, capsys):
    assert export("--encoder", run_folder, "--form", "ddae", "--out", run_folder / "encoder") == 0  # not a run's yet
    (run_folder / "environment.json").write_text("{}")
    assert export("--encoder", run_folder, "--form", "timm", "--out", run_folder / "encoder") == 2
    assert "is the export that the run" in capsys.readouterr().err
    assert not (run_folder / "encoder" / "model.safetensors").exists()


def test_files_without_permission_are_named(run_folder, export, capsys, monkeypatch):
    def deny(file):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr("ddae.distributed.checkpoint_format.sha256", deny)
    assert export("--encoder", run_folder, "--form", "ddae", "--out", run_folder.parent / "out") == 2
    assert "cannot be read: no permission to read rank_00000.safetensors" in capsys.readouterr().err
    monkeypatch.setattr("ddae.export.encoder.os.access", lambda *_: False)
    assert export("--encoder", run_folder, "--form", "ddae", "--out", run_folder.parent / "out") == 2
    assert "checkpoints cannot be read (Permission denied)" in capsys.readouterr().err


def test_export_command(tmp_path, export, capsys):
    config = preset("demo")
    encoder = Encoder(config.model)
    initialise(encoder, torch.Generator().manual_seed(0))
    export_encoder({name: v.detach() for name, v in encoder.named_parameters()}, config, tmp_path / "encoder")
    assert export("--encoder", tmp_path / "encoder", "--out", tmp_path / "timm") == 0
    assert "timm, images of 64 pixels, half" in capsys.readouterr().out
    weights = load_file(tmp_path / "timm" / "model.safetensors")
    assert torch.equal(weights["cls_token"], encoder.cls_token)
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["model_args"]["num_heads"] == 6
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=0).eval()
    assert_same_features(encoder, model, torch.randn(1, 3, 64, 64))
    assert export("--encoder", tmp_path / "nothing", "--out", tmp_path / "x") == 2
    assert capsys.readouterr().err.startswith("export: ")


@pytest.fixture
def run_folder(tmp_path):
    """Return a run folder with a checkpoint of two ranks; all student weights are 0.5, all teacher weights 0.25."""
    config, folder = preset("demo"), tmp_path / "run"
    checkpoint = folder / "checkpoints" / "step_00000008"
    checkpoint.mkdir(parents=True)
    config.write(folder / "config.json")
    for rank in (0, 1):
        shards, starts = {}, {}
        for name, parameter in Encoder(config.model).named_parameters():
            middle = parameter.numel() // 3
            size = middle if rank == 0 else parameter.numel() - middle
            for key, value in {f"weight/encoder.{name}": 0.5, f"teacher/{name}": 0.25}.items():
                shards[key], starts[key] = torch.full((size,), value), rank * middle
        save_file(shards, checkpoint / f"rank_{rank:05d}.safetensors", {"starts": json.dumps(starts)})
    files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in checkpoint.iterdir()}
    (checkpoint / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


def test_load_student_and_teacher_from_checkpoint(run_folder):
    for path in (run_folder, run_folder / "checkpoints" / "step_00000008"):
        for part, value in {"student": 0.5, "teacher": 0.25}.items():
            encoder = ddae.load_encoder(path, part=part)
            assert all(bool((parameter == value).all()) for parameter in encoder.parameters())
            assert encoder.normalisation == "half"
    file = run_folder / "checkpoints" / "step_00000008" / "rank_00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"step_00000008 is damaged: rank_00001\.safetensors has changed since it was"):
        ddae.load_encoder(run_folder, part="teacher")
    file.unlink()
    with pytest.raises(UserError, match=r"step_00000008 is damaged: rank_00001\.safetensors is missing"):
        ddae.load_encoder(run_folder)


def test_missing_teacher_and_other_versions_raise(run_folder, tmp_path):
    write_export(ddae.load_encoder(run_folder), tmp_path / "export")
    with pytest.raises(UserError, match="export has no teacher; only checkpoints have"):
        ddae.load_encoder(tmp_path / "export", part="teacher")
    config = json.loads((run_folder / "config.json").read_text())
    config["feature"]["enabled"] = False
    (run_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"has no teacher: feature\.enabled is false"):
        ddae.load_encoder(run_folder, part="teacher")
    (run_folder / "config.json").write_text(json.dumps(config | {"format": 7}))
    with pytest.raises(UserError, match="written by another version of ddae"):
        ddae.load_encoder(run_folder, part="teacher")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    (tmp_path / "export" / "config.json").write_text(json.dumps(config | {"format": 7}))
    with pytest.raises(UserError, match=r"its format is 7, not 1\. Export the encoder again"):
        ddae.load_encoder(tmp_path / "export")


def test_model_card(run_folder, tmp_path, monkeypatch):
    write_export(ddae.load_encoder(run_folder), run_folder / "encoder")
    (run_folder / "metrics.jsonl").write_text('{"step": 8, "epoch": 1.5}\n{"step": 8, "val/top1": 3}\n')
    (run_folder / "environment.json").write_text('{"commit": "abc", "dirty": true, "versions": {"torch": "2.14"}}')
    (run_folder / "knn").mkdir()
    baselines = {"untrained": 60.25, "raw_pixels": 40.0, "chance": 9.0, "gain": 11.25, "standard_error": 1.5}
    results = {"task": "knn", "best": "block 8 cls", "accuracy": 71.5} | baselines
    (run_folder / "knn" / "results.json").write_text(json.dumps(results))
    args = ["export.py", "--encoder", str(run_folder), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", args)
    with pytest.raises(SystemExit):
        runpy.run_path(str(ranks.ROOT / "launch" / "export.py"), run_name="__main__")
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in (
        "8 blocks of width 96, 6 heads",
        "half: mean (0.5, 0.5, 0.5)",
        "demo: pixel and feature branch, bootmae_block masks of 75%",
        "8 steps of 16 images, 1.5 epochs",
        "commit abc, with uncommitted changes",
        "| knn | block 8 cls, top-1 | 71.50 % (+11.2 ± 1.5) | 60.25 % | 40.00 % | 9.00 % |",
        'timm.create_model("local-dir:out"',
    ):
        assert fact in card
