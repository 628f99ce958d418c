"""Fine-tuning: its layers' learning rates, its augmentations, and the whole of it on digits."""

import json
import shutil

import numpy as np
import pytest
import ranks
import timm
import torch
from PIL import Image

from ddae.config.evaluation import AugmentConfig, FinetuneConfig, recipe, task_folder
from ddae.config.pretrain import ModelConfig
from ddae.errors import UserError
from ddae.eval import dataset as examples
from ddae.eval.augment import Mixer, Policy, posterize
from ddae.eval.finetune import Classifier, scores
from ddae.eval.predict import predict
from ddae.models.vit import Encoder, initialise
from ddae.training.optimizer import layer_groups

PROGRAM = str(ranks.ROOT / "tests" / "support" / "evaluations.py")
QUIET = "--preset demo --tracker.kind jsonl --train.log_every 1 --data.workers 0 --data.batch_size 70".split()


def words(digits, encoder, run_dir, *more):
    zero = str(ranks.ROOT / "ds_configs" / "zero1.json")
    named = ["--ds_config", zero, "--encoder", str(encoder), "--data.train", str(digits), "--run_dir", str(run_dir)]
    alone = [] if "--tune.untrained" in more else ["--tune.no_untrained"]
    return ["finetune", *QUIET, *named, *alone, *more]


def classifier(pool="mean", depth=12, width=64):
    encoder = Encoder(ModelConfig(width=width, depth=depth, heads=1, image_size=32, patch_size=8))
    initialise(encoder, torch.Generator().manual_seed(0))
    encoder.learn_positions()
    return Classifier(encoder, 5, pool, 0.02, torch.Generator().manual_seed(1))


def test_layers_learn_as_beit_says():
    """method: id 0 makes tokens, block i (from 0) is i + 1, all else 13; 0.65^(13 - id)."""
    module = classifier()
    found = {}
    for group in layer_groups(module, 12, 0.65, 0.05):
        for parameter in group["params"]:
            name = next(n for n, p in module.named_parameters() if p is parameter)
            found[name] = (group["lr_scale"], group["weight_decay"])
    assert found.keys() == dict(module.named_parameters()).keys()
    for name, (scale, decay) in found.items():
        if "blocks." in name:
            number = int(name.split("blocks.")[1].split(".")[0]) + 1
        else:
            number = 0 if any(word in name for word in ("cls_token", "pos_embed", "patch_embed")) else 13
        assert scale == pytest.approx(0.65 ** (13 - number)), name
        exempt = name.endswith(("bias", "cls_token", "pos_embed")) or "norm" in name
        assert decay == (0.0 if exempt else 0.05), name
    assert found["encoder.cls_token"][0] == pytest.approx(0.0037, rel=0.01)
    assert found["encoder.blocks.11.mlp.fc1.weight"][0] == pytest.approx(0.65)
    assert found["head.weight"] == (1, 0.05)


def test_recipes_are_the_published_ones():
    rows = {
        "beit": (4e-3, 0.65, 20, 1024),
        "beitv2": (5e-4, 0.65, 20, 1024),
        "mae": (2e-3, 0.65, 5, 1024),
    }
    for name, wanted in rows.items():
        config = recipe(name)
        settings = config.peak_lr, config.tune.layer_decay, config.optim.warmup_epochs, config.data.batch_size
        assert settings == pytest.approx(wanted), name
    for width, (lr, decay) in {384: (1.6e-2, 0.75), 768: (8e-3, 0.65)}.items():
        config = recipe("paper").resolved_for(width)
        assert (config.peak_lr, config.tune.layer_decay, config.optim.warmup_epochs) == (lr, decay, 5)
    assert recipe("mae").resolved_for(384).peak_lr == pytest.approx(2e-3)
    for name in (*rows, "paper"):
        config = recipe(name)
        assert config.augment == AugmentConfig("rand-m9-mstd0.5-inc1", 0.25, 0.8, 1.0, 0.5, 0.1)
        assert (config.optim.weight_decay, config.optim.adam_betas, config.optim.min_lr) == (0.05, (0.9, 0.999), 1e-6)
        assert (config.tune.drop_path, config.tune.pool, config.data.crop_scale) == (0.1, "mean", (0.08, 1.0))
        assert (config.optim.clip_grad, config.train.epochs) == (0, 100)
    with pytest.raises(UserError, match="unknown recipe 'biet': the nearest is 'beit'"):
        recipe("biet")


@pytest.mark.parametrize(
    "encoder, folder",
    {
        "runs/demo": "runs/demo/finetune",
        "runs/demo/encoder/": "runs/demo/finetune",
        "runs/demo/checkpoints/step_00000100": "runs/demo/finetune_step_00000100",
        "files/mae_vit_base.pth": "runs/mae_vit_base.pth_finetune",
    }.items(),
)
def test_where_it_lives(encoder, folder):
    assert task_folder(encoder, "finetune") == folder
    assert FinetuneConfig(encoder=encoder, run_dir="here").folder == "here"


def test_augmentations_are_functions_of_their_seeds():
    image = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    policy = Policy("rand-m9-mstd0.5-inc1", 32, "imagenet")
    drawn = [policy(image, seed) for seed in range(200)]  # every operation at many strengths
    assert all(each.shape == image.shape and each.dtype == np.uint8 for each in drawn)
    assert np.array_equal(policy(image, 7), drawn[7])
    assert sum(np.array_equal(each, image) for each in drawn) < 80  # two operations, each half the time
    mixer = Mixer(AugmentConfig(), 5, torch.device("cpu"))
    pixels, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    one, targets = mixer(pixels.clone(), labels, 3)
    again, same = mixer(pixels.clone(), labels, 3)
    other, _ = mixer(pixels.clone(), labels, 4)
    assert torch.equal(one, again)
    assert torch.equal(targets, same)
    assert not torch.equal(one, other)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    bare = Mixer(AugmentConfig("", 0.0, 0.0, 0.0, 0.5, 0.1), 5, torch.device("cpu"))
    same, targets = bare(pixels, labels, 0)
    assert torch.equal(same, pixels)
    assert targets[2].tolist() == pytest.approx([0.02, 0.02, 0.92, 0.02, 0.02])


def test_the_strongest_posterize_is_black():
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    assert posterize(image, 0).getextrema() == ((0, 0),) * 3
    assert posterize(image, 1).getpixel((0, 0)) == (128, 0, 0)


def test_scores():
    logits = torch.tensor([[3.0, 1, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0], [0, 0, 0, 0, 0, 9]])
    labels = torch.tensor([0, 5, 5])
    count, right, near, loss = scores(logits, labels).tolist()
    assert (count, right, near) == (3, 2, 2)
    wanted = -sum(float(row.log_softmax(0)[label]) for row, label in zip(logits, labels, strict=True))
    assert loss == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_out_the_validation_images(world, digits, monkeypatch):
    reader = examples.ExampleReader(str(digits), "val", 16)
    seen, batches = [], []
    monkeypatch.setattr(examples, "world_size", lambda: world)
    for number in range(world):
        monkeypatch.setattr(examples, "rank", lambda number=number: number)
        loaded = list(examples.batches_of_rank(reader, 50, 0, torch.device("cpu")))
        batches.append(len(loaded))
        seen += [image for each in loaded for image, label in zip(each.images, each.labels, strict=True) if label >= 0]
    assert len(set(batches)) == 1  # or ranks would wait for one another under ZeRO-3
    assert len(seen) == len(reader) == 397
    assert len({image.numpy().tobytes() for image in seen}) > 390


@pytest.fixture(scope="module")
def runs(digits, encoder_folder, tmp_path_factory):
    """One process: a run, the same resumed from its middle, one in bf16 at ZeRO-3 with averaged weights, mistakes."""
    folder = tmp_path_factory.mktemp("finetune")
    easy = "--augment.policy= --data.crop_scale 0.8 1 --optim.warmup_epochs 0.5 --tune.layer_decay 1".split()
    plain = ("--train.epochs", "5", "--train.save_every", "50", *easy, "--optim.lr", "3e-3")
    small = ("--train.steps", "4", "--engine.precision", "bf16", "--tune.ema", "0.5", "--tune.pool", "cls")
    mixed = ("--augment.mixup", "0.8", "--augment.cutmix", "1.0", "--augment.erase", "0.25")
    three = str(ranks.ROOT / "ds_configs" / "zero3.json")
    compared = ("--train.steps", "6", "--tune.untrained", "--data.cache", str(folder / "cache"))
    empty = folder / "encoder" / "encoder"
    shutil.copytree(encoder_folder, empty)
    made = [
        words(digits, folder / "encoder", folder / "encoder" / "finetune", *plain),
        words(digits, empty, folder / "zero3", *small, *mixed, "--ds_config", three),
        words(digits, empty, folder / "compared", *compared),
        words(digits, empty, folder / "again", *compared),
        words(digits, empty, folder / "odd", *mixed, "--data.batch_size", "35"),
        words(digits, "nowhere", folder / "none"),
        words(digits, empty, folder / "none", "--data.train", str(empty)),
        words(digits, empty, folder / "none", "--augment.policy", "rund-m9"),
        words(digits, empty, folder / "none", "--image_size", "60"),
        words(digits, empty, folder / "none", "--data.train", f"{digits}/train-{{000000..000001}}.tar"),
    ]
    run, resumed = folder / "encoder" / "finetune", folder / "resumed"
    later = [  # in a process of its own, as a run that is started again
        ["forget", str(run), str(resumed), "100"],
        words(digits, folder / "encoder", resumed, *plain),
        words(digits, empty, folder / "one", "--train.steps", "4", "--tune.drop_path", "0"),
        words(digits, empty, folder / "later", *compared[:2]),
        words(digits, empty, folder / "later", *compared),  # complete, and compared now
    ]
    said = ranks.run_program(1, [PROGRAM], made)
    ranks.run_program(1, [PROGRAM], later)
    ranks.run_program(
        2,
        [PROGRAM],
        [
            words(
                digits, empty, folder / "both", "--train.steps", "2", "--tune.untrained", *compared[3:4], str(folder)
            ),
            words(digits, empty, folder / "two", "--train.steps", "4", "--tune.drop_path", "0"),
        ],
    )
    return folder, said


def test_it_learns(runs):
    folder, _ = runs
    run = folder / "encoder" / "finetune"
    losses = [row["loss/total"] for row in ranks.metrics(run) if "loss/total" in row]
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
    results = json.loads((run / "results.json").read_text())
    assert results["last"]["top1"] > 40
    assert results["best"]["top1"] >= results["last"]["top1"]
    assert results["last"]["epoch"] == 5
    assert (results["classes"], results["images"]) == (10, {"train": 1400, "val": 397})
    tops = [row["val/top1"] for row in ranks.metrics(run) if "val/top1" in row]
    assert len(tops) == 5


def test_it_is_compared_with_untrained_weights(runs):
    """Trained once by the same recipe, and remembered for the next run; the other baselines are always there."""
    folder, said = runs
    first, again = (json.loads((folder / name / "results.json").read_text()) for name in ("compared", "again"))
    alone = json.loads((folder / "compared" / "untrained" / "results.json").read_text())
    assert first["accuracy"] == pytest.approx(first["last"]["top1"])
    assert first["untrained"] == pytest.approx(alone["accuracy"]) == again["untrained"]
    assert not (folder / "again" / "untrained").exists()
    assert 5 < first["chance"] < 15 < first["raw_pixels"] < 100
    assert first["verdict"] in said
    later = json.loads((folder / "later" / "results.json").read_text())
    assert later["untrained"] == first["untrained"]
    assert later["verdict"] == first["verdict"]
    both = json.loads((folder / "both" / "results.json").read_text())  # two ranks
    assert both["untrained"] is not None
    assert (folder / "both" / "untrained" / "results.json").exists()
    plain = json.loads((folder / "encoder" / "finetune" / "results.json").read_text())
    assert plain["untrained"] is None
    assert plain["verdict"] in said


def test_resumed_is_unbroken(runs):
    """To the rounding of torch's products, which may depend on where in memory their factors lie."""
    folder, _ = runs
    one, other = (ranks.metrics(path) for path in (folder / "encoder" / "finetune", folder / "resumed"))
    assert [row["step"] for row in one] == [row["step"] for row in other]
    for name, tolerance in {"loss/total": 1e-4, "lr": 0, "val/loss": 1e-4}.items():
        values = [[row[name] for row in rows if name in row] for rows in (one, other)]
        assert values[0] == pytest.approx(values[1], rel=tolerance), name
    assert "step_00000050" in str(sorted((folder / "resumed" / "checkpoints").iterdir()))


def test_two_ranks_learn_what_one_does(runs):
    folder, _ = runs
    one, two = (ranks.metrics(folder / name) for name in ("one", "two"))
    for name in ("loss/total", "val/top1", "val/loss"):
        values = [[row[name] for row in rows if name in row] for rows in (one, two)]
        assert values[0] == pytest.approx(values[1], rel=1e-5), name


def test_timm_loads_the_classifier(runs, digits):
    folder, _ = runs
    run = folder / "encoder" / "finetune"
    model = timm.create_model(f"local-dir:{run / 'classifier'}", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == [str(number) for number in range(10)]
    reader = examples.ExampleReader(str(digits), "val", 32)
    right = []
    with torch.no_grad():
        for batch in examples.batches(reader, 100, 0, torch.device("cpu")):
            right += (model((batch.images / 255 - 0.5) / 0.5).argmax(1) == batch.labels).tolist()
    results = json.loads((run / "results.json").read_text())
    assert 100 * sum(right) / len(right) == pytest.approx(results["last"]["top1"], abs=0.01)


def test_it_predicts_on_a_picture(runs, tmp_path):
    folder, _ = runs
    from sklearn.datasets import load_digits

    right = 0
    for number in range(1400, 1420):
        pixels = (load_digits().images[number] * 15.9).astype(np.uint8)
        Image.fromarray(pixels).resize((73, 73), 2).save(tmp_path / "digit.png")
        (guesses,) = predict(folder / "encoder" / "finetune", [tmp_path / "digit.png"]).values()
        assert len(guesses) == 5
        right += guesses[0].name == str(load_digits().target[number])
    assert right >= 5  # of 20
    with pytest.raises(UserError, match="holds no classifier"):
        predict(tmp_path, [tmp_path / "digit.png"])
    (tmp_path / "no.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"no\.png cannot be read as a picture"):
        predict(folder / "encoder" / "finetune", [tmp_path / "no.png"])


def test_zero_3_in_bf16_with_averaged_weights(runs):
    folder, _ = runs
    results = json.loads((folder / "zero3" / "results.json").read_text())
    assert set(results["last"]) == {"top1", "top5", "loss", "ema_top1", "ema_top5", "ema_loss", "epoch"}
    model = timm.create_model(f"local-dir:{folder / 'zero3' / 'classifier'}", pretrained=True)
    assert model.global_pool == "token"
    assert results["last"]["ema_loss"] != results["last"]["loss"]


def test_what_it_leaves_to_look_at(runs):
    folder, _ = runs
    run = folder / "encoder" / "finetune"
    page = (run / "report.html").read_text()
    for name in ("curves", "confusion", "examples"):
        assert (run / "figures" / f"{name}.png").stat().st_size > 5000
        assert f'<img alt="{name}"' in page
    assert "last.top1" in page


def test_mistakes_are_one_sentence(runs):
    _, said = runs
    mistakes = [line.removeprefix("MISTAKE ") for line in said.splitlines() if line.startswith("MISTAKE")]
    wanted = [
        "a micro-batch of 35 cannot be mixed in pairs",
        "nowhere is not an export",
        "holds no shards of 'train'",
        "augment.policy 'rund-m9' is none of timm's",
        "image_size 60 is not divisible",
        "names its shards one by one: name a folder",
    ]
    assert len(mistakes) == len(wanted)
    for line, words_wanted in zip(mistakes, wanted, strict=True):
        assert words_wanted in line
