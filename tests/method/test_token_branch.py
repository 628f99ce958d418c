"""Codes as targets (BEiT-v2): the branch against a float64 transcription, the tokenizer by itself and from a file, its
training, and a pretraining on it."""

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
from ddae.config.pretrain import ModelConfig, check
from ddae.config.tokenizer import TOKENIZING
from ddae.data.masking import sample_mask
from ddae.errors import UserError
from ddae.export.encoder import load_tokenizer
from ddae.method.branches import Inputs, TokenBranch, Tokens
from ddae.method.distance import masked_distance
from ddae.method.model import build_model
from ddae.models.tokenizer import Quantizer, Tokenizer, usage
from ddae.models.vit import Encoder, initialise
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
def test_the_token_branch_is_weighted_cross_entropy(rescale_grad):
    """Loss, gradients of tokens and head, and of beta, written out in float64."""
    mask, distance = batch()
    generator = torch.Generator().manual_seed(0)
    branch = TokenBranch(16, CODES, (2, 5), (0.75, 1.0), rescale_grad).double()
    branch.beta_places = (1, 0)
    tokens = {tap: torch.randn(3, 37, 16, generator=generator).double().requires_grad_() for tap in (2, 5)}
    codes = torch.randint(CODES, (3, 20), generator=generator)
    betas = torch.tensor([-0.5, 0.3], dtype=torch.float64, requires_grad=True)
    found = branch(Tokens({}, tokens), inputs(mask, distance, betas, codes))
    found.loss.backward()

    weight, bias = (p.detach().numpy() for p in branch.head.parameters())
    distances, loss = distance.double().numpy(), 0.0
    grad_weight, grad_beta, grad_tokens = np.zeros_like(weight), np.zeros(2), {}
    for place, tap, share in ((1, 2, 0.75 / 2), (0, 5, 1.0 / 2)):
        beta = float(betas.detach()[place])
        relative = equations.relative_weights(distances, beta)
        slope = equations.relative_slope(distances, beta, rescale_grad)
        grad_tokens[tap] = np.zeros((3, 37, 16))
        for b in range(3):
            for i, patch in enumerate(mask.masked[b].tolist()):
                read = tokens[tap].detach().numpy()[b, 1 + patch]
                logits = weight @ read + bias
                likelihood = np.exp(logits) / np.exp(logits).sum()
                error = -np.log(likelihood[codes[b, i]])
                loss += share * relative[b, i] * error / 60
                grad_beta[place] += share * slope[b, i] * error / 60
                of_logits = likelihood - np.eye(CODES)[codes[b, i]]
                grad_weight += share * relative[b, i] / 60 * np.outer(of_logits, read)
                grad_tokens[tap][b, 1 + patch] += share * relative[b, i] / 60 * weight.T @ of_logits
    np.testing.assert_allclose(found.loss.item(), loss, rtol=1e-6)  # the cross-entropy is taken in fp32
    np.testing.assert_allclose(branch.head.weight.grad, grad_weight, atol=1e-6 * np.abs(grad_weight).max())
    np.testing.assert_allclose(betas.grad, grad_beta, rtol=2e-5)
    for tap, wanted in grad_tokens.items():
        np.testing.assert_allclose(tokens[tap].grad, wanted, atol=1e-6 * np.abs(wanted).max())


def test_an_encoder_with_mask_tokens_does_not_see_what_is_masked():
    config = ablations.nano(preset("dds_beitv2_vit_b16_100e"))
    check(config)
    method = build_model(config)
    mask = sample_mask("beit_block", torch.arange(2), config.grid, config.num_masked)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    codes = torch.zeros_like(mask.masked)
    hidden = images.clone()
    for b in range(2):
        for patch in mask.masked[b].tolist():
            row, column = divmod(patch, config.grid[1])
            hidden[b, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 0
    betas, distance = torch.full((4,), -0.5, requires_grad=True), masked_distance(mask, config.grid)
    seen, unseen = (method(inputs(mask, distance, betas, codes, each)) for each in (images, hidden))
    assert torch.equal(seen.total, unseen.total)
    assert seen.branches.keys() == {"token", "cls"}
    assert [len(each.tap_loss) for each in seen.branches.values()] == [4, 1]
    # The cls branch weighs all patches alike, and is added as it is.
    cls = seen.branches["cls"]
    torch.testing.assert_close(cls.loss, 0.5 * cls.token_error.mean())
    seen.total.backward()
    without = {name for name, p in method.named_parameters() if p.grad is None}
    assert without == set()
    assert method.mask_token.grad.abs().sum() > 0
    assert betas.grad.abs().min() > 0


def test_where_nothing_is_masked_mask_tokens_change_nothing():
    encoder = Encoder(SHAPE).eval()
    initialise(encoder, torch.Generator().manual_seed(0))
    images, everywhere = torch.randn(2, 3, 32, 32), torch.arange(16).expand(2, -1)
    with torch.no_grad():
        assert torch.equal(encoder(images), encoder(images, visible=everywhere, mask_token=torch.ones(1, 1, 24)))


def tokenizer(seed=0, codes=40):
    made = Tokenizer(SHAPE, codes, 8)
    initialise(made, torch.Generator().manual_seed(seed))
    made.codebook.copy_(F.normalize(torch.randn(codes, 8, generator=torch.Generator().manual_seed(seed)), dim=-1))
    return made.eval()


def pictures(count, seed=0):
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_the_nearest_code_is_the_nearest():
    """By a search in float64, and the same whatever batch an image comes in."""
    made, images = tokenizer(), pictures(9)
    codes = made.codes(images)
    assert codes.shape == (9, 16)
    vectors = made.encode(images).double()
    apart = (vectors[:, :, None] - made.codebook.double()).square().sum(-1)
    assert torch.equal(codes, apart.argmin(-1))
    assert len(codes.unique()) > 5
    for size in (1, 2, 5):
        assert torch.equal(torch.cat([made.codes(each) for each in images.split(size)]), codes)


def test_the_search_is_not_rounded():
    """Under autocast, as pretraining in bf16 calls it: the codes of the very vectors that are found there."""
    made, images = tokenizer(codes=8000), pictures(9)
    with torch.autocast("cpu", torch.bfloat16):
        codes, vectors = made.codes(images), made.encode(images)
    assert vectors.dtype == torch.float32
    assert torch.equal(codes, (vectors.double() @ made.codebook.double().T).argmax(-1))


def quantizer(codes=40, **options):
    made = Quantizer(tokenizer(codes=codes), 5, 1, 8, 2, **options)
    for name, parameter in made.named_parameters():
        if not name.startswith("tokenizer"):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return made


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_codebook_follows_its_patches(micro_batches):
    """codes <- unit(0.9 code + 0.1 unit(sum of its patches)), once a step, whatever the micro-batches; a code that
    nobody takes begins anew at some patch."""
    made, generator = quantizer(codes=4, decay=0.9, dead=0.5), torch.Generator().manual_seed(5)
    book = torch.eye(8)[:4].clone()
    made.tokenizer.codebook.copy_(book)
    made.share.copy_(torch.tensor([0.3, 0.3, 0.3, 0.13]))
    vectors = F.normalize(book[[0, 0, 1, 2, 2, 2]] + 0.1 * torch.randn(6, 8, generator=generator), dim=-1)
    features = torch.randn(6, 5, generator=generator)
    made.gather(vectors[None], features[None] * torch.nan, first=True)  # of a step that was left out
    parts = zip(vectors.chunk(micro_batches), features.chunk(micro_batches), strict=True)
    for number, (some, their) in enumerate(parts):
        made.gather(some[None], their[None], first=number == 0)
    made.update(seed=3)
    for code, its in ((0, [0, 1]), (1, [2]), (2, [3, 4, 5])):
        wanted = F.normalize(0.9 * book[code] + 0.1 * F.normalize(vectors[its].sum(0), dim=-1), dim=-1)
        torch.testing.assert_close(made.tokenizer.codebook[code], wanted)
    torch.testing.assert_close(made.share[:3], 0.9 * 0.3 + 0.1 * torch.tensor([2, 1, 3]) / 6)
    revived = made.tokenizer.codebook[3]  # 0.9 * 0.13 is below 0.5 / 4
    assert (revived == vectors).all(1).any()
    assert made.share[3] == 0.25
    torch.testing.assert_close(made.centre, 0.1 * features.mean(0))


def test_the_gradient_passes_the_quantiser():
    made = quantizer()
    loss, vectors = made(pictures(2), torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(0)))
    assert vectors.shape == (2, 16, 8)
    loss.backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert "bias" in name or parameter.grad.abs().sum() > 0, name


def test_usage_of_a_codebook():
    assert usage(torch.tensor([0.25, 0.25, 0.5, 0.0])) == (75.0, pytest.approx(2**1.5))


def published(width=64, codes=50):
    """A checkpoint in the layout of BEiT-v2's tokenizers, by timm's Vision Transformer; and what its codes are."""
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": width, "depth": 2, "num_heads": 1, "num_classes": 0}
    model = timm.create_model("vit_base_patch16_224", **options, global_pool="avg")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = {}
    for name, values in model.state_dict().items():
        if name.endswith("qkv.bias"):
            query, key, value = values.chunk(3)
            key.zero_()  # BEiT has none
            state |= {f"{name[:-8]}q_bias": query, f"{name[:-8]}v_bias": value}
        else:
            state[name] = values
    state = {f"encoder.{name}": values.clone() for name, values in state.items()}
    layers = torch.nn.Linear(width, width), torch.nn.Linear(width, 32)
    for number, layer in zip((0, 2), layers, strict=True):
        state |= {f"encode_task_layer.{number}.{kind}": v.detach() for kind, v in layer.named_parameters()}
    state["quantize.embedding.weight"] = book = F.normalize(torch.randn(codes, 32), dim=-1)
    more = {"quantize.cluster_size": torch.zeros(codes), "decoder.cls_token": torch.zeros(1, 1, 8)}

    def codes_of(images):
        with torch.no_grad():
            tokens = model.fc_norm(model.forward_features(images / 127.5 - 1)[:, 1:])
            return (F.normalize(layers[1](layers[0](tokens).tanh()), dim=-1) @ book.T).argmax(-1)

    return state, more, codes_of


@pytest.mark.parametrize("container", ["model", "state_dict"])
def test_a_published_tokenizer_loads_completely(container, tmp_path):
    state, more, codes_of = published()
    torch.save({container: state | more}, tmp_path / "vqkd.pth")
    loaded = load_tokenizer(tmp_path / "vqkd.pth")
    images = pictures(4)
    assert torch.equal(loaded.codes(images), codes_of(images))
    from ddae.export.convert import read_tokenizer

    report = read_tokenizer(tmp_path / "vqkd.pth").report
    assert sorted(report["loaded"]) == sorted(state)
    assert report["left out"] == sorted(more)


def test_a_file_without_a_tokenizer_is_told(tmp_path):
    state, _, _ = published()
    del state["encode_task_layer.2.weight"]
    save_file(state, tmp_path / "part.safetensors")
    for path, words in (
        (tmp_path / "part.safetensors", "it has no encode_task_layer.2.weight"),
        (tmp_path, "no tokenizer"),
    ):
        with pytest.raises(UserError, match=words):
            load_tokenizer(path)


@pytest.fixture(scope="module")
def trained(digits, encoder_folder, tmp_path_factory):
    """A tokenizer trained on digits, once broken off and gone on with; two runs on it."""
    folder = tmp_path_factory.mktemp("tokens")
    data = ["--data.train", str(digits), "--data.workers", "0", "--data.batch_size", "50", "--tracker.kind", "jsonl"]
    zero = ["--ds_config", str(ranks.ROOT / "ds_configs" / "zero1.json")]
    shape = "--model.image_size 32 --model.patch_size 8 --model.width 48 --model.heads 2 --model.depth".split()
    words = ["tokenizer", "--preset", "demo", *data, *zero, *shape, "2", "--vq.codes", "24", "--vq.code_width", "8"]
    words += (
        "--vq.decoder_width 48 --vq.decoder_heads 2 --train.steps 24 --train.save_every 8 --train.log_every 4".split()
    )
    words += ["--vq.teacher", str(encoder_folder)]
    short = (
        "--train.steps 6 --train.log_every 1 --pixel.no_enabled --feature.no_enabled --token.enabled --train.no_report"
    )
    model = "--mask.use_mask_token --mask.kind beit_block --mask.ratio 0.5 --token.taps 1 2 --token.tap_weights 0.75 1".split()
    run = ["pretrain", "--preset", "demo", *data, *zero, *shape, "2", *short.split(), *model, "--token.cls_block", "1"]
    run += ["--token.tokenizer", str(folder / "whole")]
    lines = [
        [*words, "--run_dir", str(folder / "whole")],
        ["forget", str(folder / "whole"), str(folder / "again"), "24"],
        [*words, "--run_dir", str(folder / "again")],
        [*words, "--run_dir", str(folder / "lost"), "--vq.teacher", str(folder / "nowhere")],
        [*words, "--run_dir", str(folder / "lost"), "--engine.precision", "bf16"],
        [*words, "--run_dir", str(folder / "lost"), "--vq.decoder_width", "50"],
        [*run, "--token.codes", "24", "--run_dir", str(folder / "run")],
        [*run, "--token.codes", "25", "--run_dir", str(folder / "lost")],
        [*words, "--run_dir", str(folder / "other"), "--train.seed", "1"],
        [*run, "--token.codes", "24", "--run_dir", str(folder / "run"), "--train.allow_longer", "--train.steps", "8"]
        + ["--token.tokenizer", str(folder / "other")],
    ]
    said = ranks.run_program(1, [PROGRAM], lines)
    micro = json.dumps({"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 5})
    (folder / "two.json").write_text(micro)
    two = ["--ds_config", str(folder / "two.json")]
    lines = [
        [*words, *two, "--run_dir", str(folder / "two")],
        [*run, *two, "--token.codes", "24", "--run_dir", str(folder / "run_two"), "--engine.precision", "bf16"]
        + ["--token.tokenizer", str(folder / "two")],
    ]
    return folder, said + ranks.run_program(2, [PROGRAM], lines)


def test_a_tokenizer_is_trained_gone_on_with_and_pretrained_on(trained):
    folder, _ = trained
    results = json.loads((folder / "whole" / "results.json").read_text())
    assert results["val/cosine"] > 0.3  # of features that a random encoder gives
    assert results["codebook/used_percent"] > 30
    whole, again = (load_file(folder / name / "tokenizer" / "tokenizer.safetensors") for name in ("whole", "again"))
    for name, values in whole.items():
        torch.testing.assert_close(again[name], values, rtol=1e-4, atol=1e-4)
    assert (folder / "whole" / "figures" / "codes.png").exists()
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert abs(rows[0]["loss/token/tap_02"] - np.log(24)) < 1.5
    assert rows[-1]["loss/token/tap_02"] < rows[0]["loss/token/tap_02"]
    assert {"beta/tap_01", "beta/tap_02", "loss/cls/tap_02"} <= rows[0].keys()


def test_two_ranks_with_micro_batches_train_one_too(trained):
    folder, _ = trained
    results = json.loads((folder / "two" / "results.json").read_text())
    assert results["val/cosine"] > 0.3
    book = load_file(folder / "two" / "tokenizer" / "tokenizer.safetensors")["codebook"]
    torch.testing.assert_close(book.norm(dim=-1), torch.ones(24))
    losses = ranks.column(folder / "run_two", "loss/token/tap_02")  # in bf16
    assert losses[-1] < losses[0]


def test_mistakes_are_one_sentence(trained):
    folder, said = trained
    for words in (
        "nowhere is not an export",
        "engine.precision is bf16, in which a codebook cannot follow slowly",
        "has a codebook of 24, and token.codes is 25: make them equal",
        "vq.decoder_width 50 must be a multiple of 4 and of vq.decoder_heads 2",
        "the run was started with another tokenizer",
    ):
        assert len([line for line in said.splitlines() if line.startswith("MISTAKE") and words in line]) == 1, said[
            -2000:
        ]
    assert not (folder / "lost").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ("--preset dds_beitv2_vit_b16_100e --token.tokenizer nowhere", "nowhere holds no tokenizer"),
        ("--preset dds_beitv2_vit_b16_100e", "token.tokenizer is empty"),
    ],
)
def test_a_pretraining_without_its_tokenizer(words, message):
    with pytest.raises(UserError, match=message):
        build_tokenizer(parse(words.split()))


@pytest.mark.parametrize(
    "words, message",
    [
        ("--token.enabled", "token.enabled wants an encoder that sees mask tokens"),
        ("--mask.use_mask_token", "mask.use_mask_token is for token.enabled alone"),
        ("--preset beitv2_vit_b16_100e --pixel.enabled", "token.enabled wants an encoder"),
        ("--preset beitv2_vit_b16_100e --token.cls_block 12", "token.cls_block 12 must be a block before the last"),
        ("--preset beitv2_vit_b16_100e --mask.no_use_mask_token", "sees all patches"),
    ],
)
def test_configs_that_do_not_fit_together(words, message):
    with pytest.raises(UserError, match=message):
        parse(words.split())


def test_a_tokenizer_wants_a_teacher():
    with pytest.raises(UserError, match=r"vq\.teacher is empty"):
        parse(["--preset", "demo"], TOKENIZING)


def test_one_of_another_grid_is_refused(tmp_path):
    state, more, _ = published(codes=8192)
    torch.save({"model": state | more}, tmp_path / "small.pth")
    config = parse(["--preset", "beitv2_vit_b16_100e", "--token.tokenizer", str(tmp_path / "small.pth")])
    with pytest.raises(UserError, match="reads images of 32 pixels in patches of 8, the model 224 in 16"):
        build_tokenizer(config)
