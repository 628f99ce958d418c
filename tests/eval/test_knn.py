"""k-NN, effective rank and standard deviation of features; digits as a labelled data set."""

import html
import io
import json
import math
import runpy
import sys

import numpy as np
import pytest
import ranks
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from ddae.config.pretrain import ModelConfig
from ddae.data.shard_writer import Sample, write_manifest, write_shard
from ddae.errors import UserError
from ddae.eval.baselines import untrained_encoder
from ddae.eval.dataset import ExampleBatch, ExampleReader, batches
from ddae.eval.features import Features, extract_features
from ddae.eval.knn import Settings, accuracy, select_and_evaluate, vote
from ddae.models.vit import Encoder


def test_votes_follow_the_definition():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(50, 6, generator=generator), torch.randn(1100, 6, generator=generator)
    labels = torch.randint(0, 4, (50,), generator=generator)
    votes, nearest = vote(bank, labels, queries, k=7, temperature=0.1)
    for row in (0, 17, 1023, 1024, 1099):
        similarities = [float(queries[row].double() @ b.double() / queries[row].norm() / b.norm()) for b in bank]
        by_similarity = sorted(range(50), key=lambda n: -similarities[n])[:7]
        expected = [0.0] * 4
        for neighbour in by_similarity:
            relative = similarities[neighbour] - similarities[by_similarity[0]]
            expected[int(labels[neighbour])] += math.exp(relative / 0.1)
        assert votes[row].tolist() == pytest.approx(expected, rel=1e-4)
        assert nearest[row].tolist() == by_similarity
    with pytest.raises(ValueError, match="k is 51; expected 1 to 50, the number of images in the bank"):
        vote(bank, labels, queries, k=51)


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 0.0112, 0.07])
def test_small_temperatures_do_not_overflow(temperature):
    generator = torch.Generator().manual_seed(0)
    bank, labels = torch.randn(50, 6, generator=generator), torch.arange(50) % 5
    votes, nearest = vote(bank, labels, bank[:10], k=20, temperature=temperature)
    assert votes.isfinite().all()
    assert (nearest[:, 0] == torch.arange(10)).all()
    assert (votes.argmax(1) == labels[:10])[: 10 if temperature < 0.01 else 0].all()  # the nearest decides


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(value):
    bank = torch.eye(4)
    for broken in (0, 1):
        pair = [bank.clone(), bank.clone()]
        pair[broken][2, 1] = value
        with pytest.raises(UserError, match="features are not finite, so that images cannot be ranked"):
            vote(pair[0], torch.arange(4), pair[1], k=1)


@pytest.mark.parametrize("factor", [1e-30, 1e-10, 1e10, 1e25])
def test_the_magnitude_of_features_does_not_matter(factor):
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(50, 8, generator=generator), torch.randn(9, 8, generator=generator)
    labels = torch.arange(50) % 5
    expected = vote(bank, labels, queries, k=5)
    scaled = vote(bank * factor, labels, queries * factor, k=5)
    torch.testing.assert_close(scaled.nearest, expected.nearest)
    torch.testing.assert_close(scaled.votes, expected.votes, rtol=1e-4, atol=1e-6)


def test_features_are_checked_before_their_rank_is_computed():
    encoder = untrained_encoder(Encoder(ModelConfig(width=24, depth=1, heads=2, image_size=16, patch_size=8)))
    encoder.cls_token.fill_(float("nan"))
    batch = ExampleBatch(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.zeros(2), torch.arange(2))
    with pytest.raises(UserError, match="features are not finite"):
        extract_features([encoder], [batch], [1])


def test_votes_equal_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(300, 12, generator=generator), torch.randn(200, 12, generator=generator)
    labels = (bank[:, :3] + 0.5 * torch.randn(300, 3, generator=generator)).argmax(1)
    theirs = KNeighborsClassifier(
        20, weights=lambda distance: np.exp((1 - distance) / 0.07), metric="cosine", algorithm="brute"
    )
    theirs.fit(bank.numpy(), labels.numpy())
    votes = vote(bank, labels, queries).votes
    np.testing.assert_allclose(votes / votes.sum(1, keepdim=True), theirs.predict_proba(queries.numpy()), atol=1e-4)
    assert (votes.argmax(1).numpy() == theirs.predict(queries.numpy())).all()


def test_feature_is_selected_on_train_and_reported_on_val():
    """Feature a separates the classes of train, b those of val: a is selected, and its accuracy on val reported."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    one_hot, noise = torch.eye(4)[labels], torch.randn(200, 4, generator=generator)
    train = Features({"a": one_hot, "b": noise}, labels)
    val = Features({"a": noise, "b": one_hot}, labels)
    result = select_and_evaluate(train, val, Settings())
    assert result.feature == "a"
    assert result.accuracy == 100 * float(result.correct.float().mean()) < 60
    assert select_and_evaluate(Features({"a": noise, "b": one_hot}, labels), val, Settings()).feature == "b"


def test_accuracy():
    votes = torch.tensor([[3.0, 1, 0], [0, 1, 2], [0, 2, 1]])
    labels = torch.tensor([0, 1, 0])
    assert accuracy(votes, labels) == pytest.approx(100 / 3)
    assert accuracy(votes, labels, 2) == pytest.approx(200 / 3)
    assert accuracy(votes, labels, 5) == 100


def test_features_equal_the_encoders(digits, encoder_folder):
    from ddae import load_encoder

    encoder = load_encoder(encoder_folder)
    reader = ExampleReader(str(digits), "val", 32)
    (features,) = extract_features([encoder], batches(reader, 100, 0, torch.device("cpu")), [2, 4])
    assert features.labels.tolist() == load_digits().target[1400:].tolist()
    images = torch.stack([torch.from_numpy(reader[n][0]) for n in (0, 150, 396)])
    pixels = (images / 255 - 0.5) / 0.5
    with torch.no_grad():
        last, middle = encoder(pixels), encoder.features(pixels, [2])[0]
    for name, expected in {"block 4 cls": last[:, 0], "block 4 mean": last[:, 1:].mean(1)}.items():
        torch.testing.assert_close(features.by_name[name][[0, 150, 396]], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        features.by_name["block 2 mean"][[0, 150, 396]], middle[:, 1:].mean(1), rtol=1e-4, atol=1e-4
    )


def knn(args, monkeypatch):
    """Run launch/knn.py in this process. Return its exit code."""
    monkeypatch.setattr(sys, "argv", ["knn.py", *map(str, args)])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(ranks.ROOT / "launch" / "knn.py"), run_name="__main__")
    return exit_info.value.code


def test_command(digits, encoder_folder, tmp_path, monkeypatch, capsys):
    args = ["--encoder", encoder_folder, "--data", digits, "--workers", "0", "--out", tmp_path, "--tracker", "jsonl"]
    args += ["--cache", tmp_path / "cache"]
    assert knn(args, monkeypatch) == 0
    first = (tmp_path / "results.json").read_text()
    assert len(list((tmp_path / "cache" / "baselines").iterdir())) == 1
    capsys.readouterr()
    assert knn(args, monkeypatch) == 0  # with the cached result of the untrained encoder
    assert (tmp_path / "results.json").read_text() == first
    results = json.loads((tmp_path / "results.json").read_text())
    output = capsys.readouterr().out
    assert (results["bank"], results["queries"], results["width"], results["k"]) == (1400, 397, 64, 20)
    assert list(results["features"]) == [f"block {layer} {pool}" for layer in (1, 2, 3, 4) for pool in ("cls", "mean")]
    assert results["accuracy"] > 50  # even random features classify digits far above chance
    assert results["features"][results["best"]]["top1"] == pytest.approx(results["accuracy"])
    assert f"{results['best']:18}" in output
    assert output.count("<-- selected on a part of train") == 1
    assert 5 < results["chance"] < 15 < results["raw_pixels"] < 100
    assert results["untrained"] > 50
    assert results["gain"] == pytest.approx(results["accuracy"] - results["untrained"])
    assert output.splitlines()[0] == results["verdict"]
    assert results["verdict"].endswith(f"raw pixels {results['raw_pixels']:.1f} %, chance {results['chance']:.1f} %")
    page = (tmp_path / "report.html").read_text()
    assert f"<b>{html.escape(results['verdict'])}</b>" in page
    for name in ("blocks", "neighbours", "confusion"):
        assert f'<img alt="{name}"' in page
    *_, row = ranks.metrics(tmp_path)
    assert row["top1/block_4_cls"] == results["features"]["block 4 cls"]["top1"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--encoder": "nowhere"}, "nowhere does not exist"),
        ({"--data": "nowhere"}, "nowhere"),
        ({"--k": 5000}, "--k is 5000; expected 1 to 1260, the images of"),
        ({"--k": 0}, "--k is 0; expected 1 to 1260, the images of"),
        ({"--batch": 0}, "--batch is 0; expected a number of at least 1"),
        ({"--workers": -1}, "--workers is -1; expected a number of at least 0"),
        ({"--temperature": 0}, "--temperature is 0.0; expected a number of at least 1e-06"),
    ],
)
def test_user_errors(change, message, digits, encoder_folder, monkeypatch, capsys):
    args = {"--encoder": encoder_folder, "--data": digits, "--workers": 0} | change
    assert knn([each for pair in args.items() for each in pair], monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("knn: ")
    assert message in error
    assert error.count("\n") == 1


def test_shards_without_classes(encoder_folder, tmp_path, monkeypatch, capsys):
    entries = {}
    for split in ("train", "val"):
        samples = []
        for number in range(12):
            file = io.BytesIO()
            Image.new("RGB", (40, 40), (20 * number, 100, 0)).save(file, "JPEG")
            samples.append(Sample(f"{number}", file.getvalue(), None, 40, 40))
        entries[f"{split}-000000.tar"] = write_shard(tmp_path / f"{split}-000000.tar", samples)
    write_manifest(tmp_path, entries, classes=[])
    out = tmp_path / "knn"
    args = ["--encoder", encoder_folder, "--data", tmp_path, "--k", "12", "--workers", "0", "--tracker", "jsonl"]
    assert knn([*args, "--out", out], monkeypatch) == 0
    output, results = capsys.readouterr().out, json.loads((out / "results.json").read_text())
    first_line = f"{tmp_path} has no classes, so no accuracy is reported. Write shards with a class per image."
    assert output.splitlines()[0] == first_line
    assert set(results["features"]["block 4 mean"]) == {"effective_rank", "std"}
    assert results["accuracy"] is None
    assert '<img alt="neighbours"' in (out / "report.html").read_text()


@pytest.fixture(scope="module")
def probed(digits, tmp_path_factory):
    """Pretraining runs with online evaluation, on one rank and on two."""
    folder = tmp_path_factory.mktemp("probed")
    more = ("--train.steps", "30", "--probe_every", "0.1", "--engine.precision", "fp32", "--train.report")
    for count in (1, 2):
        ranks.run_all(count, [ranks.arguments(digits, folder / str(count), 1, *more)])
    return folder


def test_online_evaluation(probed):
    rows = [row for row in ranks.metrics(probed / "1") if "features/effective_rank/tap_02" in row]
    assert [row["step"] for row in rows] == [0, 9, 18, 27, 30]
    first, *rows = rows  # untrained weights
    assert 5 < first["knn/chance"] < 15 < first["knn/raw_pixels"]
    for row in rows:
        assert set(row) == {"step"} | {
            f"{metric}/tap_0{n}" for metric in ("features/effective_rank", "features/std") for n in (1, 2)
        } | {f"knn/tap_0{n}/{pool}" for n in (1, 2) for pool in ("cls", "mean")} | {"knn/raw_pixels", "knn/chance"}
        assert (row["knn/raw_pixels"], row["knn/chance"]) == (first["knn/raw_pixels"], first["knn/chance"])
        assert row["knn/tap_02/mean"] > 30
        assert 1 <= row["features/effective_rank/tap_02"] <= 32
    assert '<img alt="probes"' in (probed / "1" / "report.html").read_text()


def test_online_evaluation_on_two_ranks(probed):
    one, two = (
        [row for row in ranks.metrics(probed / n) if "features/effective_rank/tap_02" in row] for n in ("1", "2")
    )
    for mine, theirs in zip(one, two, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=0.3)  # one of 397 predictions may flip


def test_probe_every_needs_a_validation_split(shards, tmp_path):
    args = ranks.arguments(shards, tmp_path, 1, "--probe_every", "1")
    code, output = ranks.run_command("launch/pretrain.py", *args)
    assert code == 2
    assert "--probe_every needs a validation split" in output
    assert not list(tmp_path.iterdir())
