"""Token branch (BEiT-v2): loss against a float64 transcription; tokenizer: codes, files, training, pretraining."""

import json

import equations
import numpy as np
import pytest
import ranks
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from ddae.ablation import tables as ablations
from ddae.config.cli import parse
from ddae.config.presets import preset
from ddae.config.pretrain import ModelConfig, TokenConfig, check
from ddae.config.tokenizer import TOKENIZING, QuantizerConfig
from ddae.data.masking import sample_mask
from ddae.errors import UserError
from ddae.export.encoder import load_tokenizer
from ddae.export.published_weights import read_tokenizer
from ddae.method.branches import Inputs, TokenBranch, Tokens
from ddae.method.distance import masked_distance
from ddae.method.model import build_model
from ddae.models.tokenizer import Quantizer, Tokenizer, codebook_usage
from ddae.models.vit import Encoder, initialise
from ddae.train_tokenizer import CodebookState
from ddae.training.step import build_tokenizer

PROGRAM = str(ranks.ROOT / "tests" / "support" / "evaluations.py")
GRID, CODES = (6, 6), 11
SHAPE = ModelConfig(width=24, depth=2, heads=2, image_size=32, patch_size=8)


def batch(count=3, num_masked=20):
    mask = sample_mask("beit_block", torch.arange(count), GRID, num_masked)
    return mask, masked_distance(mask, GRID)


def inputs(mask, distance, betas, codes, images=None):
    return Inputs(images, mask, distance, betas, torch.ones(()), 0.5, "reference", codes=codes)


@pytest.mark.parametrize("rescale_grad", ["full", "detach"])
def test_token_branch_equals_weighted_cross_entropy(rescale_grad):
    """Loss and gradients of tokens, head and betas, transcribed in float64."""
    mask, distance = batch()
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # of the head's weights
    branch = TokenBranch(16, TokenConfig(taps=(2, 5), tap_weights=(0.75, 1.0), codes=CODES), rescale_grad).double()
    branch.beta_indices = (1, 0)
    tokens = {tap: torch.randn(3, 37, 16, generator=generator).double().requires_grad_() for tap in (2, 5)}
    codes = torch.randint(CODES, (3, 20), generator=generator)
    betas = torch.tensor([-0.5, 0.3], dtype=torch.float64, requires_grad=True)
    result = branch(Tokens({}, tokens), inputs(mask, distance, betas, codes))
    result.loss.backward()

    weight, bias = (p.detach().numpy() for p in branch.head.parameters())
    distances, loss = distance.double().numpy(), 0.0
    grad_weight, grad_beta, grad_tokens = np.zeros_like(weight), np.zeros(2), {}
    for index, tap, share in ((1, 2, 0.75 / 2), (0, 5, 1.0 / 2)):
        beta = float(betas.detach()[index])
        relative = equations.relative_weights(distances, beta)
        slope = equations.relative_slope(distances, beta, rescale_grad)
        grad_tokens[tap] = np.zeros((3, 37, 16))
        for b in range(3):
            for i, patch in enumerate(mask.masked[b].tolist()):
                token = tokens[tap].detach().numpy()[b, 1 + patch]
                logits = weight @ token + bias
                probabilities = np.exp(logits) / np.exp(logits).sum()
                error = -np.log(probabilities[codes[b, i]])
                loss += share * relative[b, i] * error / 60
                grad_beta[index] += share * slope[b, i] * error / 60
                grad_logits = probabilities - np.eye(CODES)[codes[b, i]]
                grad_weight += share * relative[b, i] / 60 * np.outer(grad_logits, token)
                grad_tokens[tap][b, 1 + patch] += share * relative[b, i] / 60 * weight.T @ grad_logits
    np.testing.assert_allclose(result.loss.item(), loss, rtol=1e-6)  # the cross-entropy is computed in fp32
    np.testing.assert_allclose(branch.head.weight.grad, grad_weight, atol=1e-6 * np.abs(grad_weight).max())
    np.testing.assert_allclose(betas.grad, grad_beta, atol=2e-5 * np.abs(grad_beta).max())
    for tap, expected in grad_tokens.items():
        np.testing.assert_allclose(tokens[tap].grad, expected, atol=1e-6 * np.abs(expected).max())


def test_encoder_with_mask_tokens_ignores_masked_pixels():
    config = ablations.at_scale(preset("dds_beitv2_vit_b16_100e"), "nano", None)
    check(config)
    model = build_model(config)
    mask = sample_mask("beit_block", torch.arange(2), config.grid, config.num_masked)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    codes = torch.zeros_like(mask.masked)
    zeroed = images.clone()
    for b in range(2):
        for patch in mask.masked[b].tolist():
            row, column = divmod(patch, config.grid[1])
            zeroed[b, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 0
    betas, distance = torch.full((4,), -0.5, requires_grad=True), masked_distance(mask, config.grid)
    losses, losses_of_zeroed = (model(inputs(mask, distance, betas, codes, each)) for each in (images, zeroed))
    assert torch.equal(losses.total, losses_of_zeroed.total)
    assert losses.branches.keys() == {"token", "cls"}
    assert [len(each.tap_loss) for each in losses.branches.values()] == [4, 1]
    # The cls branch is not weighted by distance, and its tap weight is 1.
    cls = losses.branches["cls"]
    torch.testing.assert_close(cls.loss, 0.5 * cls.token_error.mean())
    losses.total.backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == set()
    assert model.mask_token.grad.abs().sum() > 0
    assert betas.grad.abs().min() > 0


def test_mask_token_is_unused_without_masked_patches():
    encoder = Encoder(SHAPE).eval()
    initialise(encoder, torch.Generator().manual_seed(0))
    images, all_patches = torch.randn(2, 3, 32, 32), torch.arange(16).expand(2, -1)
    with torch.no_grad():
        assert torch.equal(encoder(images), encoder(images, visible=all_patches, mask_token=torch.ones(1, 1, 24)))


def tokenizer(seed=0, codes=40):
    module = Tokenizer(SHAPE, codes, 8)
    initialise(module, torch.Generator().manual_seed(seed))
    module.codebook.copy_(F.normalize(torch.randn(codes, 8, generator=torch.Generator().manual_seed(seed)), dim=-1))
    return module.eval()


def random_images(count, seed=0):
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_codes_are_nearest_and_independent_of_the_batch():
    """The nearest code by a search in float64; batches of 1, 2, 5 and 9 images give equal codes."""
    module, images = tokenizer(), random_images(9)
    codes = module.codes(images)
    assert codes.shape == (9, 16)
    vectors = module.encode(images).double()
    distances = (vectors[:, :, None] - module.codebook.double()).square().sum(-1)
    assert torch.equal(codes, distances.argmin(-1))
    assert len(codes.unique()) > 5
    for size in (1, 2, 5):
        assert torch.equal(torch.cat([module.codes(each) for each in images.split(size)]), codes)


def test_codes_under_autocast_are_computed_in_fp32():
    """Under bf16 autocast, as in pretraining, the codes are those of the unrounded vectors."""
    module, images = tokenizer(codes=8000), random_images(9)
    with torch.autocast("cpu", torch.bfloat16):
        codes, vectors = module.codes(images), module.encode(images)
    assert vectors.dtype == torch.float32
    assert torch.equal(codes, (vectors.double() @ module.codebook.double().T).argmax(-1))


def quantizer(codes=40, **options):
    config = QuantizerConfig(decoder_depth=1, decoder_width=8, decoder_heads=2, **options)
    module = Quantizer(tokenizer(codes=codes), 5, config)
    for name, parameter in module.named_parameters():
        if not name.startswith("tokenizer"):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return module


def test_a_codebook_saved_before_the_first_step_is_initialised_after_resuming():
    module = quantizer()
    saved, resumed = CodebookState(module).state_dict(), CodebookState(module)
    resumed.load_state_dict(saved)
    assert not resumed.initialised
    resumed.load_state_dict(saved | {"share": torch.full((40,), 1 / 40)})
    assert resumed.initialised


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_codebook_update(micro_batches):
    """code <- unit(0.9 code + 0.1 unit(sum of its vectors)), once per step; a dead code is reset to some vector."""
    module, generator = quantizer(codes=4, decay=0.9, dead=0.5), torch.Generator().manual_seed(5)
    codebook = torch.eye(8)[:4].clone()
    module.tokenizer.codebook.copy_(codebook)
    module.share.copy_(torch.tensor([0.3, 0.3, 0.3, 0.13]))
    vectors = F.normalize(codebook[[0, 0, 1, 2, 2, 2]] + 0.1 * torch.randn(6, 8, generator=generator), dim=-1)
    features = torch.randn(6, 5, generator=generator)
    module.accumulate(vectors[None], features[None] * torch.nan, first=True)  # of a step that was skipped
    module.update_codebook(seed=3, applied=torch.zeros(()))
    assert torch.equal(module.tokenizer.codebook, codebook)
    assert module.centre.isfinite().all()
    parts = zip(vectors.chunk(micro_batches), features.chunk(micro_batches), strict=True)
    for number, (some_vectors, some_features) in enumerate(parts):
        module.accumulate(some_vectors[None], some_features[None], first=number == 0)
    module.update_codebook(seed=3, applied=torch.ones(()))
    for code, members in ((0, [0, 1]), (1, [2]), (2, [3, 4, 5])):
        expected = F.normalize(0.9 * codebook[code] + 0.1 * F.normalize(vectors[members].sum(0), dim=-1), dim=-1)
        torch.testing.assert_close(module.tokenizer.codebook[code], expected)
    torch.testing.assert_close(module.share[:3], 0.9 * 0.3 + 0.1 * torch.tensor([2, 1, 3]) / 6)
    reset = module.tokenizer.codebook[3]  # 0.9 * 0.13 is below 0.5 / 4
    assert (reset == vectors).all(1).any()
    assert module.share[3] == 0.25
    torch.testing.assert_close(module.centre, 0.1 * features.mean(0))


def test_straight_through_gradient():
    module = quantizer()
    loss, vectors = module(random_images(2), torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(0)))
    assert vectors.shape == (2, 16, 8)
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert "bias" in name or parameter.grad.abs().sum() > 0, name


def test_codebook_usage():
    assert codebook_usage(torch.tensor([0.25, 0.25, 0.5, 0.0])) == (75.0, pytest.approx(2**1.5))


def published(width=64, codes=50):
    """Return a checkpoint in BEiT-v2's layout with random weights, tensors to ignore, and its codes' function."""
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": width, "depth": 2, "num_heads": 1, "num_classes": 0}
    model = timm.create_model("vit_base_patch16_224", **options, global_pool="avg")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = {}
    for name, values in model.state_dict().items():
        if name.endswith("qkv.bias"):
            query, key, value = values.chunk(3)
            key.zero_()  # BEiT's keys have no bias
            state |= {f"{name[:-8]}q_bias": query, f"{name[:-8]}v_bias": value}
        else:
            state[name] = values
    state = {f"encoder.{name}": values.clone() for name, values in state.items()}
    layers = torch.nn.Linear(width, width), torch.nn.Linear(width, 32)
    for number, layer in zip((0, 2), layers, strict=True):
        state |= {f"encode_task_layer.{number}.{kind}": v.detach() for kind, v in layer.named_parameters()}
    state["quantize.embedding.weight"] = codebook = F.normalize(torch.randn(codes, 32), dim=-1)
    ignored = {"quantize.cluster_size": torch.zeros(codes), "decoder.cls_token": torch.zeros(1, 1, 8)}

    def codes_of(images):
        with torch.no_grad():
            tokens = model.fc_norm(model.forward_features(images / 127.5 - 1)[:, 1:])
            return (F.normalize(layers[1](layers[0](tokens).tanh()), dim=-1) @ codebook.T).argmax(-1)

    return state, ignored, codes_of


@pytest.mark.parametrize("container", ["model", "state_dict"])
def test_published_tokenizer_loads_completely(container, tmp_path):
    state, ignored, codes_of = published()
    torch.save({container: state | ignored}, tmp_path / "vqkd.pth")
    loaded = load_tokenizer(tmp_path / "vqkd.pth")
    images = random_images(4)
    assert torch.equal(loaded.codes(images), codes_of(images))
    report = read_tokenizer(tmp_path / "vqkd.pth").report
    assert sorted(report["loaded"]) == sorted(state)
    assert report["left out"] == sorted(ignored)


def test_path_without_tokenizer_raises(tmp_path):
    state, _, _ = published()
    del state["encode_task_layer.2.weight"]
    save_file(state, tmp_path / "part.safetensors")
    for path, message in (
        (tmp_path / "part.safetensors", "it has no encode_task_layer.2.weight"),
        (tmp_path, "is not a tokenizer"),
    ):
        with pytest.raises(UserError, match=message):
            load_tokenizer(path)


@pytest.fixture(scope="module")
def trained(digits, encoder_folder, tmp_path_factory):
    """Train a tokenizer on digits, resume it, and pretrain on it; on one rank and on two. Return folder and output."""
    folder = tmp_path_factory.mktemp("tokens")
    data = ["--data.train", str(digits), "--data.workers", "0", "--data.batch_size", "50", "--tracker.kind", "jsonl"]
    zero = ["--ds_config", str(ranks.ROOT / "ds_configs" / "zero1.json")]
    shape = "--model.image_size 32 --model.patch_size 8 --model.width 48 --model.heads 2 --model.depth".split()
    args = ["tokenizer", "--preset", "demo", *data, *zero, *shape, "2", "--vq.codes", "24", "--vq.code_width", "8"]
    args += "--vq.decoder_width 48 --vq.decoder_heads 2".split()
    args += "--train.steps 24 --train.save_every 8 --train.log_every 4".split()
    args += ["--vq.teacher", str(encoder_folder)]
    run = ["pretrain", "--preset", "demo", *data, *zero, *shape, "2"]
    run += "--train.steps 6 --train.log_every 1 --train.no_report".split()
    run += "--pixel.no_enabled --feature.no_enabled --token.enabled".split()
    run += "--mask.use_mask_token --mask.kind beit_block --mask.ratio 0.5".split()
    run += "--token.taps 1 2 --token.tap_weights 0.75 1 --token.cls_block 1".split()
    run += ["--token.tokenizer", str(folder / "whole")]
    lines = [
        [*args, "--run_dir", str(folder / "whole")],
        ["copy_before", str(folder / "whole"), str(folder / "again"), "24"],
        [*args, "--run_dir", str(folder / "again")],
        [*args, "--run_dir", str(folder / "failed"), "--vq.teacher", str(folder / "nowhere")],
        [*args, "--run_dir", str(folder / "failed"), "--engine.precision", "bf16"],
        [*args, "--run_dir", str(folder / "failed"), "--vq.decoder_width", "50"],
        [*run, "--token.codes", "24", "--run_dir", str(folder / "run")],
        [*run, "--token.codes", "25", "--run_dir", str(folder / "failed")],
        [*args, "--run_dir", str(folder / "other"), "--train.seed", "1"],
        [*run, "--token.codes", "24", "--run_dir", str(folder / "run"), "--train.allow_longer", "--train.steps", "8"]
        + ["--token.tokenizer", str(folder / "other")],
    ]
    output = ranks.run_program(1, [PROGRAM], lines)
    micro = json.dumps({"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 5})
    (folder / "two.json").write_text(micro)
    two = ["--ds_config", str(folder / "two.json")]
    lines = [
        [*args, *two, "--run_dir", str(folder / "two")],
        [*run, *two, "--token.codes", "24", "--run_dir", str(folder / "run_two"), "--engine.precision", "bf16"]
        + ["--token.tokenizer", str(folder / "two")],
    ]
    return folder, output + ranks.run_program(2, [PROGRAM], lines)


def test_tokenizer_training_resume_and_pretraining(trained):
    folder, _ = trained
    results = json.loads((folder / "whole" / "results.json").read_text())
    assert results["val/cosine"] > 0.3  # features of a random encoder
    assert results["codebook/used_percent"] > 30
    whole, again = (load_file(folder / name / "tokenizer" / "tokenizer.safetensors") for name in ("whole", "again"))
    for name, values in whole.items():
        torch.testing.assert_close(again[name], values, rtol=1e-4, atol=1e-4)
    assert (folder / "whole" / "figures" / "codes.png").exists()
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert abs(rows[0]["loss/token/tap_02"] - np.log(24)) < 1.5
    assert rows[-1]["loss/token/tap_02"] < rows[0]["loss/token/tap_02"]
    assert {"beta/tap_01", "beta/tap_02", "loss/cls/tap_02"} <= rows[0].keys()


def test_tokenizer_training_on_two_ranks_with_micro_batches(trained):
    folder, _ = trained
    results = json.loads((folder / "two" / "results.json").read_text())
    assert results["val/cosine"] > 0.3
    codebook = load_file(folder / "two" / "tokenizer" / "tokenizer.safetensors")["codebook"]
    torch.testing.assert_close(codebook.norm(dim=-1), torch.ones(24))
    losses = ranks.column(folder / "run_two", "loss/token/tap_02")  # in bf16
    assert losses[-1] < losses[0]


def test_user_errors_are_reported_once(trained):
    folder, output = trained
    errors = [line for line in output.splitlines() if line.startswith("ERROR")]
    for message in (
        "nowhere does not exist",
        "engine.precision is bf16, too coarse for the codebook's moving averages",
        "has 24 codes. Pass --token.codes 24",
        "vq.decoder_width is 50; expected a multiple of 4 and of vq.decoder_heads 2",
        "the run was started with another tokenizer",
    ):
        assert len([line for line in errors if message in line]) == 1, output[-2000:]
    assert not (folder / "failed").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        ("--preset dds_beitv2_vit_b16_100e --token.tokenizer nowhere", "nowhere is not a tokenizer"),
        ("--preset dds_beitv2_vit_b16_100e", "token.tokenizer is empty"),
    ],
)
def test_pretraining_without_tokenizer_raises(args, message):
    with pytest.raises(UserError, match=message):
        build_tokenizer(parse(args.split()))


@pytest.mark.parametrize(
    "args, message",
    [
        ("--token.enabled", "token.enabled needs an encoder with mask tokens"),
        ("--mask.use_mask_token", "mask.use_mask_token is for token.enabled alone"),
        ("--preset beitv2_vit_b16_100e --pixel.enabled", "token.enabled needs an encoder"),
        ("--preset beitv2_vit_b16_100e --token.cls_block 12", "token.cls_block is 12; expected a block from 1 to 11"),
        ("--preset beitv2_vit_b16_100e --mask.no_use_mask_token", "sees all patches"),
    ],
)
def test_contradicting_fields_raise(args, message):
    with pytest.raises(UserError, match=message):
        parse(args.split())


def test_tokenizer_without_teacher_raises():
    with pytest.raises(UserError, match=r"vq\.teacher is empty"):
        parse(["--preset", "demo"], TOKENIZING)


def test_tokenizer_of_another_grid_raises(tmp_path):
    state, ignored, _ = published(codes=8192)
    torch.save({"model": state | ignored}, tmp_path / "small.pth")
    config = parse(["--preset", "beitv2_vit_b16_100e", "--token.tokenizer", str(tmp_path / "small.pth")])
    with pytest.raises(UserError, match="expects images of 32 pixels in patches of 8, but the model has 224 and 16"):
        build_tokenizer(config)
