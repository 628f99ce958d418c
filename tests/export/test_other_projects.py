"""Weights of other projects: equal features whatever their names, prefixes and containers; a refusal where not."""

import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

import ddae
from ddae.errors import UserError
from ddae.export.encoder import encoder_hash
from ddae.export.formats import write_beit, write_mae, write_timm
from ddae.export.published_weights import HEADS, convert
from ddae.export.weight_files import read_encoder_file
from ddae.models.patches import NORMALISATIONS

SHAPE = {"img_size": 64, "patch_size": 16, "embed_dim": 96, "depth": 2, "num_heads": 3, "num_classes": 0}
PAIR = ("weight", "bias")
REGISTERS = {"reg_tokens": 4, "no_embed_class": True}
DINOV2 = REGISTERS | {"init_values": 0.1}
HUGGING_FACE = (  # (pattern of timm's name, transformers' name)
    (r"^(cls_token|mask_token)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"^dist_token$", "embeddings.distillation_token"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma", r".layer_scale\1.lambda1"),
)
HUGGING_FACE_VIT = ((".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense."))
HUGGING_FACE_VIT += ((".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."))
HUGGING_FACE_5 = (("encoder.layer.", "layers."), ("attention.output.dense.", "attention.o_proj."))
HUGGING_FACE_5 += tuple(
    (f"attention.attention.{part}.", f"attention.{part[0]}_proj.") for part in ("query", "key", "value")
)


def model_of(build=VisionTransformer, **options):
    torch.manual_seed(0)
    model = build(**SHAPE | options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def expected(model, images):
    """Return the tokens without registers."""
    with torch.no_grad():
        tokens = model.forward_features(images)
    return torch.cat([tokens[:, :1], tokens[:, model.num_prefix_tokens :]], 1)


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def check(path, model, images, **options):
    encoder = ddae.load_encoder(path, **{"heads": 3} | options)
    torch.testing.assert_close(encoder(images), expected(model, images), rtol=1e-5, atol=1e-5)
    return encoder


def hugging_face(state, renames=()):
    """Return a state dict under transformers' names."""
    renamed = {}
    for name, values in state.items():
        for pattern, other in HUGGING_FACE:
            name = re.sub(pattern, other, name)
        for ours, theirs in renames:
            name = name.replace(ours, theirs)
        if ".attn.qkv." in name:
            for part, of_part in zip(("query", "key", "value"), values.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.attention.{part}")] = of_part.clone()
        else:
            renamed[name] = values
    return renamed


@pytest.mark.parametrize(
    "build, options",
    [
        (VisionTransformer, REGISTERS),
        (VisionTransformer, {"reg_tokens": 4}),
        (VisionTransformer, {"no_embed_class": True, "init_values": 0.1}),  # DeiT-III
        (VisionTransformerDistilled, {}),
        (VisionTransformer, {"qk_norm": True}),
    ],
    ids=["registers", "registers with positions", "cls token without position", "distilled", "qk norm"],
)
def test_other_parts(build, options, images, tmp_path):
    model = model_of(build, **options)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    encoder = check(tmp_path / "model.safetensors", model, images)
    assert [name for name in encoder.report["left out"] if "head" not in name] == []
    layers = encoder.features(images, [1, 2])
    assert [tuple(tokens.shape) for tokens in layers] == [(2, 17, 96)] * 2
    write_timm(encoder, tmp_path / "timm")
    check(tmp_path / "timm", model, images, heads=None)
    back = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(expected(back, images), expected(model, images), rtol=1e-5, atol=1e-5)
    if encoder.shape.registers or encoder.shape.qk_norm:
        for write in (write_mae, write_beit):
            with pytest.raises(UserError, match=r"the encoder has .*(reg_token|q_norm).*form lacks"):
                write(encoder, tmp_path / "out.pth")


@pytest.mark.parametrize("prefix", ["", "vit.", "deit.", "module.vit."])
def test_names_of_transformers(prefix, images, tmp_path):
    model = model_of()
    state = {f"{prefix}{name}": v for name, v in hugging_face(model.state_dict(), HUGGING_FACE_VIT).items()}
    state |= {"decoder.mask_token": torch.zeros(1, 1, 8), "classifier.weight": torch.zeros(3, 96)}
    save_file(state, tmp_path / "model.safetensors")
    check(tmp_path / "model.safetensors", model, images)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "num_attention_heads": 3}))
    check(tmp_path, model, images, heads=None)
    check(tmp_path / "model.safetensors", model, images, heads=None)


def test_names_of_transformers_5(images, tmp_path):
    model = model_of()
    state = hugging_face(model.state_dict(), HUGGING_FACE_VIT[2:])
    for theirs, new in HUGGING_FACE_5:
        state = {name.replace(theirs, new): values for name, values in state.items()}
    torch.save(state, tmp_path / "m.pth")
    check(tmp_path / "m.pth", model, images)
    torch.save(
        {name: values for name, values in state.items() if "1.attention.v_proj.b" not in name}, tmp_path / "m.pth"
    )
    with pytest.raises(UserError, match=r"incomplete encoder: blocks\.1\.attn\.value\.bias is missing"):
        ddae.load_encoder(tmp_path / "m.pth", heads=3)


@pytest.mark.parametrize("names", ["transformers", "original"])
def test_dinov2(names, images, tmp_path):
    model = model_of(**DINOV2)
    state = {"mask_token": torch.zeros(1, 96), **model.state_dict()}
    state["pos_embed"] = torch.cat([torch.ones(1, 1, 96), state["pos_embed"]], 1)  # of the cls token, too
    state["cls_token"] = state["cls_token"] - 1
    if names == "transformers":
        state = hugging_face(state)
    else:
        state["register_tokens"] = state.pop("reg_token")
    torch.save({"teacher": {f"backbone.{name}": values for name, values in state.items()}}, tmp_path / "dino.pth")
    encoder = check(tmp_path / "dino.pth", model, images)
    assert encoder.shape.registers == 4


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "_orig_mod.module.backbone.", "model.", "teacher.backbone."])
@pytest.mark.parametrize("container", ["state_dict", None])
def test_prefixes_in_any_order(prefix, container, images, tmp_path):
    model = model_of()
    state = {f"{prefix}{name}": values for name, values in model.state_dict().items()}
    torch.save(state if container is None else {container: state, "epoch": 3}, tmp_path / "m.pth")
    check(tmp_path / "m.pth", model, images)


def test_the_state_dict_that_was_taken_is_named_and_can_be_chosen(images, tmp_path):
    first, second = model_of(), model_of(init_values=0.1)
    content = {
        "model": first.state_dict(),
        "model_ema": second.state_dict(),
        "optimizer": {"state": {0: torch.ones(1)}},
    }
    torch.save(content, tmp_path / "two.pth")
    assert check(tmp_path / "two.pth", first, images).report["taken"] == ["model, not model_ema (--key selects)"]
    encoder = check(tmp_path / "two.pth", second, images, key="model_ema")
    assert encoder.report["taken"] == ["model_ema, not model (--key selects)"]
    with pytest.raises(UserError, match=r"two\.pth has no 'ema' \(--key\); it has model, model_ema"):
        ddae.load_encoder(tmp_path / "two.pth", heads=3, key="ema")


def test_several_encoders_in_one_state_dict(images, tmp_path):
    teacher, student = model_of(), model_of(init_values=0.1)
    state = {f"teacher.backbone.{name}": values for name, values in teacher.state_dict().items()}
    state |= {f"student.backbone.{name}": values for name, values in student.state_dict().items()}
    torch.save(state, tmp_path / "both.pth")
    with pytest.raises(
        UserError, match=r"several encoders: student\.backbone, teacher\.backbone\. Pass one of them as"
    ):
        ddae.load_encoder(tmp_path / "both.pth", heads=3)
    check(tmp_path / "both.pth", student, images, key="student.backbone")
    check(tmp_path / "both.pth", teacher, images, key="teacher")


@pytest.mark.parametrize("layout", ["moco", "huge", "unknown"])
def test_heads_of_known_families(layout, tmp_path):
    width, depth, heads = {"moco": (384, 12, 12), "huge": (1280, 32, 16), "unknown": (96, 2, None)}[layout]
    names = model_of().state_dict()
    block = {name.removeprefix("blocks.0."): values.shape for name, values in names.items() if "blocks.0." in name}
    sizes = {name: values.shape for name, values in names.items() if "blocks" not in name}
    sizes |= {f"blocks.{n}.{name}": shape for n in range(depth) for name, shape in block.items()}
    zero = torch.zeros(1)  # expanded: no memory
    state = {name: zero.expand([n * width // 96 if n % 96 == 0 else n for n in sizes[name]]) for name in sizes}
    if layout == "moco":
        of_base = {f"module.base_encoder.{name}": values for name, values in state.items()}
        of_momentum = {f"module.momentum_encoder.{name}": values for name, values in state.items()}
        torch.save({"state_dict": of_base | of_momentum, "arch": "vit_small"}, tmp_path / "moco.pth")
        assert ddae.load_encoder(tmp_path / "moco.pth").shape.heads == heads
    elif layout == "huge":
        assert convert(state, "huge").model.heads == heads == HEADS[width, depth]
    else:
        with pytest.raises(UserError, match=r"does not tell its number of attention heads \(width 96, depth 2\). Pass"):
            convert(state, "unknown")
        with pytest.raises(UserError, match="width 96, no multiple of 7 attention heads"):
            convert(state, "unknown", heads=7)


def test_own_files_tell_their_heads(images, tmp_path):
    model = model_of()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    encoder = ddae.load_encoder(tmp_path / "model.safetensors", heads=3)
    write_mae(encoder, tmp_path / "mae.pth")
    write_beit(encoder, tmp_path / "beit.pth")
    for name in ("mae.pth", "beit.pth"):
        assert ddae.load_encoder(tmp_path / name).shape.heads == 3


def test_timm_snapshot_without_model_args(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}}))
    large = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(ddae.load_encoder(tmp_path)(large), expected(model, large), rtol=1e-5, atol=1e-5)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet50"}))
    with pytest.raises(UserError, match="resnet50, which timm does not build as a Vision Transformer"):
        ddae.load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_act": "quick_gelu"}))
    with pytest.raises(UserError, match="the activation 'quick_gelu'; expected 'gelu'"):
        ddae.load_encoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match=r"has none of model\.safetensors, pytorch_model\.bin"):
        ddae.load_encoder(tmp_path)


def test_numbers_of_numpy_are_read(images, tmp_path):
    model = model_of()
    extra = {"epoch": np.float64(3.5), "step": np.int64(7), "best": np.float32(1)}
    torch.save({"model": model.state_dict(), **extra}, tmp_path / "m.pth")
    check(tmp_path / "m.pth", model, images)


@pytest.mark.parametrize(
    "name, size, message",
    [
        ("norm_pre.weight", [96], "norm_pre.weight, which would change the features"),
        ("blocks.1.attn.norm.weight", [96], "blocks.1.attn.norm.weight, which would change"),
        ("blocks.0.mlp.w12.weight", [96], "blocks.0.mlp.w12.weight, which would change"),
        ("blocks.0.ls1.scale", [96], "blocks.0.ls1.scale, which would change"),
        ("rope.freqs", [96], "rope.freqs, which would change"),
        ("patch_embed.proj.weight", [96, 1, 16, 16], "takes 1 channels in patches of 16 x 16; expected RGB"),
        ("patch_embed.proj.weight", [96, 4, 16, 16], "takes 4 channels in patches of 16 x 16; expected RGB"),
        ("blocks.0.mlp.fc1.weight", [288, 96], "MLPs of width 288; expected 4 x 96"),
        ("pos_embed", [1, 20, 96], "has 20 positions, not a square grid"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name, size, message, tmp_path):
    save_file(model_of().state_dict() | {name: torch.zeros(size)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=re.escape(message)):
        ddae.load_encoder(tmp_path / "m.safetensors", heads=3)


def snapshot(folder, model, config):
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "vit", "num_attention_heads": "six"}, "has a config.json with 'six' attention heads"),
        ({"architecture": "vit_base_patch16_224", "model_args": "x"}, "has model_args = 'x'; expected an object"),
        ({"architecture": "x", "model_args": {"act_layer": "relu"}}, "is an encoder with act_layer = 'relu'"),
        ({"architecture": "x", "model_args": {"norm_eps": 0.01, "num_heads": 3}}, "with an epsilon of 0.01"),
        ({"model_type": "vit", "num_attention_heads": 3, "layer_norm_eps": 0.1}, "with an epsilon of 0.1"),
        ({"model_type": "vit", "num_attention_heads": 6}, "states 6 attention heads, but --heads is 3"),
        (
            {
                "architecture": "x",
                "model_args": {"num_heads": 3},
                "pretrained_cfg": {"mean": [0.1] * 3, "std": [1] * 3},
            },
            "images normalised by mean .*expected one of half, imagenet",
        ),
    ],
)
def test_configs_that_are_refused(config, message, tmp_path):
    snapshot(tmp_path, model_of(), config)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(UserError, match=message):
            ddae.load_encoder(path, heads=3)


def test_config_beside_a_pickled_file_is_read(images, tmp_path):
    model = model_of()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "num_attention_heads": 3}))
    check(tmp_path / "pytorch_model.bin", model, images, heads=None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_act": "quick_gelu"}))
    with pytest.raises(UserError, match="the activation 'quick_gelu'"):
        ddae.load_encoder(tmp_path / "pytorch_model.bin", heads=3)


@pytest.mark.parametrize("index", ["", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_damaged_index_of_weights(index, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "num_attention_heads": 3}))
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json (does not name|names no)"):
        ddae.load_encoder(tmp_path)


@pytest.mark.parametrize("normalisation", ["half", "imagenet"])
def test_normalisation_is_kept(normalisation, tmp_path):
    save_file(model_of().state_dict(), tmp_path / "model.safetensors")
    encoder = ddae.load_encoder(tmp_path / "model.safetensors", heads=3, normalisation=normalisation)
    write_timm(encoder, tmp_path / "timm")
    assert ddae.load_encoder(tmp_path / "timm").normalisation == normalisation
    (tmp_path / "hf").mkdir()
    snapshot(tmp_path / "hf", model_of(), {"model_type": "vit", "num_attention_heads": 3})
    mean, std = NORMALISATIONS[normalisation]
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    assert ddae.load_encoder(tmp_path / "hf").normalisation == normalisation


@pytest.mark.parametrize("arch, heads", [("vit_small", 12), ("deit_small", 6), (None, 6)])
def test_heads_of_small_models(arch, heads):
    state = {"cls_token": torch.zeros(1, 1, 384)}
    content = {"state_dict": state} | ({} if arch is None else {"arch": arch})
    with tempfile.TemporaryDirectory() as folder:
        torch.save(content, Path(folder) / "file.pth")
        stated = read_encoder_file(Path(folder) / "file.pth").heads
    assert (stated or HEADS[384, 12]) == heads


def test_what_is_taken_of_several_is_reported(images, tmp_path):
    model, other = model_of(), model_of()
    torch.nn.init.zeros_(other.cls_token)
    both = {f"model.{name}": values for name, values in model.state_dict().items()}
    both |= {f"ema_model.{name}": values for name, values in other.state_dict().items()}
    torch.save(both, tmp_path / "prefixes.pth")
    check(tmp_path / "prefixes.pth", model, images)
    beside = dict(model.state_dict()) | {"state_dict_ema": dict(other.state_dict())}
    torch.save(beside, tmp_path / "beside.pth")
    check(tmp_path / "beside.pth", model, images)
    check(tmp_path / "beside.pth", other, images, key="state_dict_ema")
    taken = [read_encoder_file(tmp_path / f"{name}.pth").source for name in ("prefixes", "beside")]
    assert taken == [
        "model, not ema_model (--key selects)",
        "the top level, not state_dict_ema (--key selects)",
    ]


@pytest.mark.parametrize("name", ["head_token", "mem_head_tokens", "de_register", "blocks.0.mlp.fc3.weight"])
def test_unknown_tokens_are_refused(name, tmp_path):
    save_file(model_of().state_dict() | {name: torch.zeros(1, 2, 96)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"has {name}, which would change the features"):
        ddae.load_encoder(tmp_path / "model.safetensors", heads=3)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s | {"dist_token": torch.zeros(1, 1, 96), "reg_token": torch.zeros(1, 2, 96)}, "and registers"),
        (lambda s: {n: v.to(torch.int8) for n, v in s.items()}, "in int8; expected floating-point"),
        (lambda s: s | {"cls_token": torch.zeros(96)}, "is not an encoder of this architecture"),
        (lambda s: s | {"norm.weight": torch.zeros(95)}, "is not an encoder of this architecture"),
        (lambda s: s | {"blocks.1.mlp.fc2.weight": torch.zeros(96, 200)}, "is not an encoder of this architecture"),
        (
            lambda s: s | {f"blocks.{n}.attn.{k}_norm.{p}": torch.ones(96) for n in (0, 1) for k in "qk" for p in PAIR},
            "has norms of queries over 96 of 96 channels",
        ),
        (
            lambda s: s | {f"blocks.{n}.attn.{k}_norm.{p}": torch.ones(16) for n in (0, 1) for k in "qk" for p in PAIR},
            "has norms of queries over 16 of 96 channels",
        ),
    ],
)
def test_tensors_that_are_refused(change, message, tmp_path):
    save_file(change(dict(model_of().state_dict())), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        ddae.load_encoder(tmp_path / "model.safetensors", heads=3)


@pytest.mark.parametrize(
    "value, name", [(np.zeros(2), "numpy"), (Path("x"), "pathlib"), (re.compile("x"), "re._compile")]
)
def test_refused_objects_are_named(value, name, tmp_path):
    torch.save(dict(model_of().state_dict()) | {"extra": value}, tmp_path / "file.pth")
    with pytest.raises(UserError, match=f"holds more than tensors, which could run code: {name}"):
        ddae.load_encoder(tmp_path / "file.pth", heads=3)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nofile\.pth does not exist"):
        ddae.load_encoder(tmp_path / "nofile.pth")


def test_hash_depends_on_all_that_features_depend_on(tmp_path):
    save_file(model_of().state_dict(), tmp_path / "model.safetensors")
    variants = [{"heads": 3}, {"heads": 6}, {"heads": 3, "normalisation": "half"}, {"heads": 3, "image_size": 32}]
    hashes = [encoder_hash(ddae.load_encoder(tmp_path / "model.safetensors", **options)) for options in variants]
    assert len(set(hashes)) == len(variants)
    assert hashes[0] == encoder_hash(ddae.load_encoder(tmp_path / "model.safetensors", heads=3))
