"""Fine-tuning: layer-wise learning rates, augmentations, and whole runs on digits."""

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
from ddae.eval import dataset
from ddae.eval.augment import BatchAugment, RandAugment, posterize
from ddae.eval.finetune import Classifier
from ddae.eval.metrics import sum_metrics
from ddae.eval.predict import classify_images
from ddae.models.vit import Encoder, initialise
from ddae.training.optimizer import layer_groups

PROGRAM = str(ranks.ROOT / "tests" / "support" / "evaluations.py")
QUIET = "--preset demo --tracker.kind jsonl --train.log_every 1 --data.workers 0 --data.batch_size 70".split()


def command(digits, encoder, run_dir, *more):
    """Return a line for PROGRAM: a fine-tuning run."""
    zero = str(ranks.ROOT / "ds_configs" / "zero1.json")
    paths = ["--ds_config", zero, "--encoder", str(encoder), "--data.train", str(digits), "--run_dir", str(run_dir)]
    untrained = [] if "--tune.untrained" in more else ["--tune.no_untrained"]
    return ["finetune", *QUIET, *paths, *untrained, *more]


def classifier(pool="mean", depth=12, width=64):
    encoder = Encoder(ModelConfig(width=width, depth=depth, heads=1, image_size=32, patch_size=8))
    initialise(encoder, torch.Generator().manual_seed(0))
    encoder.make_positions_learnable()
    return Classifier(encoder, 5, pool, 0.02, torch.Generator().manual_seed(1))


def test_layer_wise_learning_rates_are_beits():
    """BEiT: layer id 0 for the embeddings, i + 1 for block i (from 0), 13 for the rest; scale 0.65^(13 - id)."""
    module = classifier()
    by_name = {}
    for group in layer_groups(module, 12, 0.65, 0.05):
        for parameter in group["params"]:
            name = next(n for n, p in module.named_parameters() if p is parameter)
            by_name[name] = (group["lr_scale"], group["weight_decay"])
    assert by_name.keys() == dict(module.named_parameters()).keys()
    for name, (scale, decay) in by_name.items():
        if "blocks." in name:
            number = int(name.split("blocks.")[1].split(".")[0]) + 1
        else:
            number = 0 if any(part in name for part in ("cls_token", "pos_embed", "patch_embed")) else 13
        assert scale == pytest.approx(0.65 ** (13 - number)), name
        exempt = name.endswith(("bias", "cls_token", "pos_embed")) or "norm" in name
        assert decay == (0.0 if exempt else 0.05), name
    assert by_name["encoder.cls_token"][0] == pytest.approx(0.0037, rel=0.01)
    assert by_name["encoder.blocks.11.mlp.fc1.weight"][0] == pytest.approx(0.65)
    assert by_name["head.weight"] == (1, 0.05)


def test_recipes_match_the_publications():
    rows = {
        "beit": (4e-3, 0.65, 20, 1024),
        "beitv2": (5e-4, 0.65, 20, 1024),
        "mae": (2e-3, 0.65, 5, 1024),
    }
    for name, expected in rows.items():
        config = recipe(name)
        settings = config.peak_lr, config.tune.layer_decay, config.optim.warmup_epochs, config.data.batch_size
        assert settings == pytest.approx(expected), name
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
    with pytest.raises(UserError, match="unknown recipe 'biet'; the nearest is 'beit'"):
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
def test_task_folder(encoder, folder):
    assert task_folder(encoder, "finetune") == folder
    assert FinetuneConfig(encoder=encoder, run_dir="here").folder == "here"


def test_augmentations_are_functions_of_their_seeds():
    image = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    augment = RandAugment("rand-m9-mstd0.5-inc1", 32, "imagenet")
    augmented = [augment(image, seed) for seed in range(200)]  # every operation at many strengths
    assert all(each.shape == image.shape and each.dtype == np.uint8 for each in augmented)
    assert np.array_equal(augment(image, 7), augmented[7])
    assert sum(np.array_equal(each, image) for each in augmented) < 80  # two operations, each with probability 1/2
    mix = BatchAugment(AugmentConfig(), 5, torch.device("cpu"))
    pixels, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    one, targets = mix(pixels.clone(), labels, 3)
    again, same = mix(pixels.clone(), labels, 3)
    other, _ = mix(pixels.clone(), labels, 4)
    assert torch.equal(one, again)
    assert torch.equal(targets, same)
    assert not torch.equal(one, other)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    smooth = BatchAugment(AugmentConfig("", 0.0, 0.0, 0.0, 0.5, 0.1), 5, torch.device("cpu"))
    same, targets = smooth(pixels, labels, 0)
    assert torch.equal(same, pixels)
    assert targets[2].tolist() == pytest.approx([0.02, 0.02, 0.92, 0.02, 0.02])


def test_strongest_posterize_is_black():
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    assert posterize(image, 0).getextrema() == ((0, 0),) * 3
    assert posterize(image, 1).getpixel((0, 0)) == (128, 0, 0)


def test_sum_metrics():
    logits = torch.tensor([[3.0, 1, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0], [0, 0, 0, 0, 0, 9]])
    labels = torch.tensor([0, 5, 5])
    count, top1, top5, loss = sum_metrics(logits, labels).tolist()
    assert (count, top1, top5) == (3, 2, 2)
    expected = -sum(float(row.log_softmax(0)[label]) for row, label in zip(logits, labels, strict=True))
    assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_validation_images(world, digits, monkeypatch):
    reader = dataset.ExampleReader(str(digits), "val", 16)
    images, indices, batches = [], [], []
    monkeypatch.setattr(dataset, "world_size", lambda: world)
    for number in range(world):
        monkeypatch.setattr(dataset, "rank", lambda number=number: number)
        loaded = list(dataset.batches_of_rank(reader, 50, 0, torch.device("cpu")))
        batches.append(len(loaded))
        images += [image for each in loaded for image in each.images[each.labels >= 0]]
        indices += [index for each in loaded for index in each.indices[each.labels >= 0].tolist()]
    assert len(set(batches)) == 1  # otherwise ranks would deadlock under ZeRO-3
    assert sorted(indices) == list(range(len(reader))) == list(range(397))
    assert all(
        torch.equal(image, torch.from_numpy(reader[index][0])) for image, index in zip(images, indices, strict=True)
    )


@pytest.fixture(scope="module")
def runs(digits, encoder_folder, tmp_path_factory):
    """Run: one resumed from its middle, one in bf16 at ZeRO-3 with averaged weights, with baselines, user errors."""
    folder = tmp_path_factory.mktemp("finetune")
    fast = "--augment.policy= --data.crop_scale 0.8 1 --optim.warmup_epochs 0.5 --tune.layer_decay 1".split()
    plain = ("--train.epochs", "5", "--train.save_every", "50", *fast, "--optim.lr", "3e-3")
    small = ("--train.steps", "4", "--engine.precision", "bf16", "--tune.ema", "0.5", "--tune.pool", "cls")
    mixed = ("--augment.mixup", "0.8", "--augment.cutmix", "1.0", "--augment.erase", "0.25")
    zero3 = str(ranks.ROOT / "ds_configs" / "zero3.json")
    compared = ("--train.steps", "6", "--tune.untrained", "--data.cache", str(folder / "cache"))
    untrained = folder / "encoder" / "encoder"
    shutil.copytree(encoder_folder, untrained)
    first = [
        command(digits, folder / "encoder", folder / "encoder" / "finetune", *plain),
        command(digits, untrained, folder / "zero3", *small, *mixed, "--ds_config", zero3),
        command(digits, untrained, folder / "compared", *compared),
        command(digits, untrained, folder / "again", *compared),
        command(digits, untrained, folder / "odd", *mixed, "--data.batch_size", "35"),
        command(digits, "nowhere", folder / "none"),
        command(digits, untrained, folder / "none", "--data.train", str(untrained)),
        command(digits, untrained, folder / "none", "--augment.policy", "rund-m9"),
        command(digits, untrained, folder / "none", "--image_size", "60"),
        command(digits, untrained, folder / "none", "--data.train", f"{digits}/train-{{000000..000001}}.tar"),
    ]
    run, resumed = folder / "encoder" / "finetune", folder / "resumed"
    later = [  # in a new process, as a restarted run
        ["copy_before", str(run), str(resumed), "100"],
        command(digits, folder / "encoder", resumed, *plain),
        command(digits, untrained, folder / "one", "--train.steps", "4", "--tune.drop_path", "0"),
        command(digits, untrained, folder / "later", *compared[:2]),
        command(digits, untrained, folder / "later", *compared),  # complete; the baseline is added
    ]
    output = ranks.run_program(1, [PROGRAM], first)
    ranks.run_program(1, [PROGRAM], later)
    ranks.run_program(
        2,
        [PROGRAM],
        [
            command(
                digits,
                untrained,
                folder / "both",
                "--train.steps",
                "2",
                "--tune.untrained",
                *compared[3:4],
                str(folder),
            ),
            command(digits, untrained, folder / "two", "--train.steps", "4", "--tune.drop_path", "0"),
        ],
    )
    return folder, output


def test_loss_falls_and_accuracy_rises(runs):
    folder, _ = runs
    run = folder / "encoder" / "finetune"
    losses = [row["loss/total"] for row in ranks.metrics(run) if "loss/total" in row]
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
    results = json.loads((run / "results.json").read_text())
    assert results["last"]["top1"] > 40
    assert results["best"]["top1"] >= results["last"]["top1"]
    assert results["last"]["epoch"] == 5
    assert (results["classes"], results["images"]) == (10, {"train": 1400, "val": 397})
    accuracies = [row["val/top1"] for row in ranks.metrics(run) if "val/top1" in row]
    assert len(accuracies) == 5


def test_untrained_baseline(runs):
    """It is trained once by the same recipe, then read from the cache; the other baselines are always reported."""
    folder, output = runs
    first, again = (json.loads((folder / name / "results.json").read_text()) for name in ("compared", "again"))
    alone = json.loads((folder / "compared" / "untrained" / "results.json").read_text())
    assert first["accuracy"] == pytest.approx(first["last"]["top1"])
    assert first["untrained"] == pytest.approx(alone["accuracy"]) == again["untrained"]
    assert not (folder / "again" / "untrained").exists()
    assert 5 < first["chance"] < 15 < first["raw_pixels"] < 100
    assert first["verdict"] in output
    later = json.loads((folder / "later" / "results.json").read_text())
    assert later["untrained"] == first["untrained"]
    assert later["verdict"] == first["verdict"]
    both = json.loads((folder / "both" / "results.json").read_text())  # two ranks
    assert both["untrained"] is not None
    assert (folder / "both" / "untrained" / "results.json").exists()
    plain = json.loads((folder / "encoder" / "finetune" / "results.json").read_text())
    assert plain["untrained"] is None
    assert plain["verdict"] in output


def test_resumed_run_equals_uninterrupted_run(runs):
    """Up to the rounding of matrix products, which may depend on the alignment of their factors in memory."""
    folder, _ = runs
    one, other = (ranks.metrics(path) for path in (folder / "encoder" / "finetune", folder / "resumed"))
    assert [row["step"] for row in one] == [row["step"] for row in other]
    for name, tolerance in {"loss/total": 1e-4, "lr": 0, "val/loss": 1e-4}.items():
        values = [[row[name] for row in rows if name in row] for rows in (one, other)]
        assert values[0] == pytest.approx(values[1], rel=tolerance), name
    assert "step_00000050" in str(sorted((folder / "resumed" / "checkpoints").iterdir()))


def test_two_ranks_equal_one(runs):
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
    reader = dataset.ExampleReader(str(digits), "val", 32)
    correct = []
    with torch.no_grad():
        for batch in dataset.batches(reader, 100, 0, torch.device("cpu")):
            correct += (model((batch.images / 255 - 0.5) / 0.5).argmax(1) == batch.labels).tolist()
    results = json.loads((run / "results.json").read_text())
    assert 100 * sum(correct) / len(correct) == pytest.approx(results["last"]["top1"], abs=0.01)


def test_predict(runs, tmp_path):
    folder, _ = runs
    from sklearn.datasets import load_digits

    correct = 0
    for number in range(1400, 1420):
        pixels = (load_digits().images[number] * 15.9).astype(np.uint8)
        Image.fromarray(pixels).resize((73, 73), 2).save(tmp_path / "digit.png")
        (predictions,) = classify_images(folder / "encoder" / "finetune", [tmp_path / "digit.png"]).values()
        assert len(predictions) == 5
        correct += predictions[0].name == str(load_digits().target[number])
    assert correct >= 5  # of 20
    with pytest.raises(UserError, match="contains no classifier"):
        classify_images(tmp_path, [tmp_path / "digit.png"])
    (tmp_path / "no.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"no\.png cannot be read as an image"):
        classify_images(folder / "encoder" / "finetune", [tmp_path / "no.png"])


def test_zero_3_in_bf16_with_averaged_weights(runs):
    folder, _ = runs
    results = json.loads((folder / "zero3" / "results.json").read_text())
    assert set(results["last"]) == {"top1", "top5", "loss", "ema_top1", "ema_top5", "ema_loss", "epoch"}
    model = timm.create_model(f"local-dir:{folder / 'zero3' / 'classifier'}", pretrained=True)
    assert model.global_pool == "token"
    assert results["last"]["ema_loss"] != results["last"]["loss"]


def test_report(runs):
    folder, _ = runs
    run = folder / "encoder" / "finetune"
    page = (run / "report.html").read_text()
    for name in ("curves", "confusion", "examples"):
        assert (run / "figures" / f"{name}.png").stat().st_size > 5000
        assert f'<img alt="{name}"' in page
    assert "last.top1" in page


def test_user_errors(runs):
    _, output = runs
    errors = [line.removeprefix("ERROR ") for line in output.splitlines() if line.startswith("ERROR")]
    expected = [
        "the micro-batch has 35 images; mixup and CutMix expect an even number.",
        "nowhere does not exist",
        "holds no shards of",
        "augment.policy is 'rund-m9'; expected the name of a RandAugment policy of timm",
        "image_size is 60; expected a multiple of the patch size 8",
        "a list of shards; without --val a folder with splits train and val is expected.",
    ]
    assert len(errors) == len(expected)
    for error, part in zip(errors, expected, strict=True):
        assert part in error
