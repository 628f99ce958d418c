"""Linear probing: LARS and the heads against reference implementations, and whole runs on digits."""

import json
import shutil
from dataclasses import replace

import pytest
import ranks
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from ddae import load_encoder
from ddae.config.evaluation import probe_recipe
from ddae.data.loader import Batch
from ddae.data.sampling import central_crops, clamped_crops
from ddae.errors import UserError
from ddae.eval.dataset import ExampleReader, Labels
from ddae.eval.linear_probe import Heads, HeadsOptimizer, LinearProbe
from ddae.export.encoder import write_export
from ddae.training.schedules import warmup_cosine

PROGRAM = str(ranks.ROOT / "tests" / "support" / "evaluations.py")
QUIET = "--preset demo --tracker.kind jsonl --train.log_every 1 --data.workers 0 --data.batch_size 100".split()
CPU = torch.device("cpu")


def command(digits, encoder, run_dir, *more):
    """Return a line for PROGRAM: a linear probe."""
    paths = ["--encoder", str(encoder), "--data.train", str(digits), "--run_dir", str(run_dir)]
    return ["linear_probe", *QUIET, *paths, *more]


def features(seed, heads=3, batch=20, width=6):
    return torch.randn(heads, batch, width, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def test_lars_equals_maes():
    """util/lars.py: dp = g + wd p; scaled by 0.001 |p| / |dp| where p has two axes; mu = 0.9 mu + dp; p -= lr mu."""
    heads = Heads(3, 6, 4, seed=0)
    optimizer = HeadsOptimizer(heads, momentum=0.9, weight_decay=0.0, grad_accum_steps=1, device=CPU)
    weights = [p.detach().double().clone() for p in heads.parameters()]
    buffers = [torch.zeros_like(w) for w in weights]
    labels = torch.arange(20) % 4
    for step in range(5):
        logits = heads(features(step))
        optimizer.backward(sum(F.cross_entropy(each, labels) for each in logits))
        gradients = [p.grad.double().clone() for p in heads.parameters()]
        assert optimizer.step(lr=6.4)
        for weight, buffer, gradient in zip(weights, buffers, gradients, strict=True):
            if weight.ndim > 1:
                gradient = gradient * 0.001 * weight.norm() / gradient.norm()
            buffer.mul_(0.9).add_(gradient)
            weight -= 6.4 * buffer
    for parameter, expected in zip(heads.parameters(), weights, strict=True):
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_a_head_is_batch_norm_and_a_linear_layer_independent_of_others():
    heads, one = Heads(3, 6, 4, seed=1), Heads(1, 6, 4, seed=1)
    norm, linear = torch.nn.BatchNorm1d(6, affine=False, eps=1e-6), torch.nn.Linear(6, 4)
    with torch.no_grad():
        linear.weight.copy_(heads.weights[1])
        linear.bias.zero_()
    both = [HeadsOptimizer(each, 0.9, 0.0, 1, CPU) for each in (heads, one)]
    labels = torch.arange(20) % 4
    for step in range(3):
        x = features(step)
        logits = heads(x)
        if step == 0:
            torch.testing.assert_close(logits[1], linear(norm(x[1])), rtol=1e-4, atol=1e-5)
        both[0].backward(sum(F.cross_entropy(each, labels) for each in logits))
        both[1].backward(F.cross_entropy(one(x[1:2])[0], labels))
        assert all(optimizer.step(0.5) for optimizer in both)
    torch.testing.assert_close(heads.weights[1], one.weights[0])
    heads.eval(), one.eval()
    torch.testing.assert_close(heads(features(9))[1], one(features(9)[1:2])[0])


def test_converged_head_agrees_with_scikit_learn():
    """Logistic regression on standardised features: nearly the same predictions.

    The features are digits of 4 x 4 pixels, which no linear head separates, so that the best head is unique.
    """
    data = load_digits()
    x = F.avg_pool2d(torch.from_numpy(data.images).float()[:, None], 2).flatten(1)
    labels = torch.from_numpy(data.target)
    theirs = LogisticRegression(C=1e4, max_iter=2000).fit(StandardScaler().fit_transform(x[:1200]), labels[:1200])
    heads = Heads(1, 16, 10, seed=0)
    optimizer = HeadsOptimizer(heads, 0.9, 0.0, 1, CPU)
    for step in range(300):
        optimizer.backward(F.cross_entropy(heads(x[None, :1200])[0], labels[:1200]))
        optimizer.step(warmup_cosine(step, 300, 10, 10.0, 0.0))
    heads.eval()
    ours = heads(x[None, 1200:])[0].argmax(1).numpy()
    reference = theirs.predict(StandardScaler().fit(x[:1200]).transform(x[1200:]))
    truth = labels[1200:].numpy()
    assert (ours == reference).mean() > 0.93
    assert (ours == truth).mean() > (reference == truth).mean() - 0.02


def test_the_held_out_part_does_not_train(digits, encoder_folder):
    """Another label of a held-out image changes neither loss nor gradients; of a training image it changes both."""
    config = probe_recipe("demo")
    config = replace(config, data=replace(config.data, train=str(digits)))
    encoder = load_encoder(encoder_folder)
    val = ExampleReader(str(digits), "val", 32)
    targets = torch.from_numpy(ExampleReader(str(digits), "train", 32).shards.labels()).long()
    losses, gradients = [], []
    for changed in (None, True, False):
        task = LinearProbe(config.resolved_for(4), encoder, Labels(targets.clone(), list("0123456789")), val, 1)
        if changed is not None:
            index = int((task.is_selection == changed).nonzero()[3])
            labels = targets.clone()
            labels[index] = (labels[index] + 1) % 10
            task = LinearProbe(config.resolved_for(4), encoder, Labels(labels, list("0123456789")), val, 1)
        task._feature_cache["train"] = torch.randn(1400, 20, 64, generator=torch.Generator().manual_seed(0))[
            :, : len(task._all_names())
        ]
        task.build({})
        loss = task.loss(Batch(torch.empty(0), torch.empty(0), torch.arange(1400)), 0)
        loss.backward()
        losses.append(loss.item())
        gradients.append(task.heads.weights[0].grad)
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("good_on_train", [0, 1])
def test_head_is_selected_on_train(good_on_train, digits, encoder_folder):
    """One head's features separate the classes of train, the other's those of val: the first is selected."""
    config = probe_recipe("demo")
    config = replace(config, data=replace(config.data, train=str(digits)), probe=replace(config.probe, layers=(4,)))
    reader, val = (ExampleReader(str(digits), split, 32) for split in ("train", "val"))
    task = LinearProbe(config, load_encoder(encoder_folder), Labels(reader.labels, list("0123456789")), val, 1)
    task.build({})
    with torch.no_grad():
        for weight in task.heads.weights:
            weight.copy_(torch.eye(10, 64))
    for split, each in (("train", reader), ("val", val)):
        table = torch.randn(len(each), 4, 64, generator=torch.Generator().manual_seed(0))
        table[:, good_on_train if split == "train" else 1 - good_on_train] = 9 * torch.eye(64)[each.labels]
        task._feature_cache[split] = table
    assert task.select(lambda: None)[0] == (task.names[good_on_train], 100)
    metrics = task.evaluate(lambda: None)
    assert metrics[f"val/top1/{task.names[1 - good_on_train].replace(' ', '_')}"] == 100
    results = task.results([metrics], (task.select(lambda: None), 0.0))
    assert results["accuracy"] == pytest.approx(metrics[f"val/top1/{results['best'].replace(' ', '_')}"])
    assert results["accuracy"] < 50


def test_accumulation_equals_one_batch_and_non_finite_gradients_change_nothing():
    heads = Heads(2, 6, 4, seed=0)
    optimizer = HeadsOptimizer(heads, 0.9, 0.0, 2, CPU)
    x, labels = features(0, heads=2), torch.arange(20) % 4
    before = [p.detach().clone() for p in heads.parameters()]
    heads.eval()  # batch statistics would differ
    loss = sum(F.cross_entropy(each, labels) for each in heads(x))
    whole = torch.autograd.grad(loss, list(heads.parameters()))
    for half in (slice(0, 10), slice(10, 20)):
        optimizer.backward(sum(F.cross_entropy(each, labels[half]) for each in heads(x[:, half])) / 2)
        if half.start == 0:
            optimizer.step(1.0)
            assert all(torch.equal(p, old) for p, old in zip(heads.parameters(), before, strict=True))
    for parameter, gradient in zip(heads.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    heads.weights[0].grad[0, 0] = torch.nan
    assert not optimizer.step(1.0)
    assert all(torch.equal(p, old) for p, old in zip(heads.parameters(), before, strict=True))


def test_paper_recipe():
    config = probe_recipe("paper")
    assert (config.data.batch_size, config.train.epochs, config.optim.warmup_epochs) == (16384, 90, 10)
    assert config.peak_lr == pytest.approx(6.4)
    assert (config.optim.weight_decay, config.probe.momentum, config.data.crop) == (0, 0.9, "clamped")
    assert config.resolved_for(12).probe.layers == (3, 6, 9, 10, 12)
    assert config.resolved_for(24).probe.layers == (6, 12, 18, 20, 24)
    assert warmup_cosine(999, 1000, 100, 6.4, 0.0) == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match=r"probe.layers is \(3, 99\); expected blocks from 1 to 12"):
        probe_recipe("paper").__class__(probe=config.probe.__class__(layers=(3, 99))).resolved_for(12)


def test_crops():
    seeds, sides = torch.arange(4000) * 7919, torch.full((4000,), 100)
    boxes, flips = clamped_crops(seeds, sides, sides * 2, (0.08, 1.0))
    assert bool((boxes[:, :2] >= 0).all())
    assert int((boxes[:, 0] + boxes[:, 2]).max()) == 100
    assert int((boxes[:, 1] + boxes[:, 3]).max()) <= 200
    assert float((boxes[:, 2] == 100).float().mean()) > 0.3  # clamped; random_crops() would resample
    assert 0.45 < float(flips.float().mean()) < 0.55
    boxes, flips = central_crops(seeds[:1], torch.tensor([256]), torch.tensor([300]), (1.0, 1.0))
    assert boxes.tolist() == [[16, 38, 224, 224]]
    assert not flips.any()


@pytest.fixture(scope="module")
def runs(digits, encoder_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    long = ("--train.epochs", "30", "--train.save_every", "210", "--optim.lr", "20")
    short = ("--train.epochs", "2", "--probe.evaluate_every", "1", "--train.save_every", "14")
    images = (*short, "--probe.no_cache")
    shutil.copytree(encoder_folder, folder / "encoder")
    first = [
        command(digits, encoder_folder, folder / "cached", *long),
        command(digits, encoder_folder, folder / "short", *short),
        command(digits, encoder_folder, folder / "images", *images),
        command(digits, encoder_folder, folder / "micro", *short, "--probe.micro_batch", "50"),
        command(digits, encoder_folder, folder / "alone", *short, "--probe.no_untrained"),
        command(digits, folder / "encoder", folder / "bound", *short, "--probe.no_untrained"),
        command(digits, encoder_folder, folder / "none", "--data.crop", "random"),
        command(digits, encoder_folder, folder / "none", "--probe.layers", "2", "9"),
        command(digits, encoder_folder, folder / "none", "--probe.micro_batch", "30"),
        command(digits, encoder_folder, folder / "none", "--probe.micro_batch", "1"),
    ]
    resumed = folder / "resumed"
    later = [
        ["copy_before", str(folder / "cached"), str(resumed), "420"],
        command(digits, encoder_folder, resumed, *long),
    ]
    output = ranks.run_program(1, [PROGRAM], first)
    changed = load_encoder(folder / "encoder")
    changed.norm.bias += 1
    write_export(changed, folder / "encoder")
    shutil.copytree(folder / "bound", folder / "bound_unfinished")
    (folder / "bound_unfinished" / "finished.json").unlink()
    for name in ("bound", "bound_unfinished"):
        later.append(command(digits, folder / "encoder", folder / name, *short, "--probe.no_untrained"))
    output += ranks.run_program(1, [PROGRAM], later)
    two = command(digits, encoder_folder, folder / "two", *short, "--probe.micro_batch", "50")
    ranks.run_program(2, [PROGRAM], [two])
    return folder, output


def metrics(run, prefix=("loss/total", "val/", "lr")):
    return [{name: value for name, value in row.items() if name.startswith(prefix)} for row in ranks.metrics(run)]


def test_loss_falls_and_accuracy_rises(runs):
    folder, _ = runs
    losses = [row["loss/total"] for row in ranks.metrics(folder / "cached") if "loss/total" in row]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    results = json.loads((folder / "cached" / "results.json").read_text())
    assert list(results["heads"]) == [f"block {n} {pool}" for n in (1, 2, 3, 4) for pool in ("cls", "mean")]
    assert results["accuracy"] > 70
    assert results["heads"][results["best"]]["top1"] == pytest.approx(results["accuracy"])
    assert 5 < results["chance"] < 15 < results["raw_pixels"] < 100
    assert results["untrained"] > 50
    last = [row for row in ranks.metrics(folder / "cached") if "val/top1/untrained/block_4_mean" in row][-1]
    untrained = [last[f"val/top1/untrained/{name.replace(' ', '_')}"] for name in results["heads"]]
    assert any(value == pytest.approx(results["untrained"]) for value in untrained)
    assert all(row["top5"] >= row["top1"] for row in results["heads"].values())


def test_cached_features_equal_features_of_images(runs):
    folder, _ = runs
    cached, images = metrics(folder / "short"), metrics(folder / "images")
    assert len(cached) == len(images)
    for one, other in zip(cached, images, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_resumed_run_equals_uninterrupted_run(runs):
    folder, _ = runs
    for one, other in zip(metrics(folder / "cached"), metrics(folder / "resumed"), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=0.3)  # one of 397 predictions may flip


def test_two_ranks_equal_one_with_the_same_micro_batches(runs):
    """Batch norm uses the statistics of a rank's micro-batch, so runs with equal micro-batches are compared."""
    folder, _ = runs
    one, two = (metrics(folder / name, ("loss/total",)) for name in ("micro", "two"))
    for mine, theirs in zip(one, two, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_report(runs):
    folder, output = runs
    results = json.loads((folder / "cached" / "results.json").read_text())
    assert results["verdict"] in output
    alone = json.loads((folder / "alone" / "results.json").read_text())
    assert alone["untrained"] is None
    assert alone["verdict"] in output
    page = (folder / "cached" / "report.html").read_text()
    for name in ("curves", "blocks", "confusion"):
        assert (folder / "cached" / "figures" / f"{name}.png").stat().st_size > 5000
        assert f'<img alt="{name}"' in page


def test_user_errors(runs):
    _, output = runs
    errors = [line.removeprefix("ERROR ") for line in output.splitlines() if line.startswith("ERROR")]
    expected = [
        "data.crop is 'random'; probe.cache requires 'centre'.",
        "probe.layers is (2, 9); expected blocks from 1 to 4",
        "data.batch_size 100 is not divisible by 1 ranks x probe.micro_batch 30",
        "batch norm needs at least two images, but a micro-batch has one. Raise --probe.micro_batch",
        "bound was started with an encoder whose weights have changed since. Choose another --run_dir, or",
        "bound_unfinished was started with an encoder whose weights have changed since.",
    ]
    assert len(errors) == len(expected), output
    for error, part in zip(errors, expected, strict=True):
        assert part in error
