"""k-NN and what features say of themselves; digits stand for a labelled data set."""

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

from ddae.data.shard_writer import Sample, write_manifest, write_shard
from ddae.eval.dataset import ExampleReader, batches
from ddae.eval.features import Features, effective_rank, extract, spread
from ddae.eval.knn import Settings, accuracy, by_neighbours, vote


def test_votes_are_what_the_words_say():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(50, 6, generator=generator), torch.randn(1100, 6, generator=generator)
    labels = torch.randint(0, 4, (50,), generator=generator)
    votes, nearest = vote(bank, labels, queries, k=7, temperature=0.1)
    for row in (0, 17, 1023, 1024, 1099):
        similar = [float(queries[row].double() @ b.double() / queries[row].norm() / b.norm()) for b in bank]
        wanted = [0.0] * 4
        for near in sorted(range(50), key=lambda n: -similar[n])[:7]:
            wanted[int(labels[near])] += math.exp(similar[near] / 0.1)
        assert votes[row].tolist() == pytest.approx(wanted, rel=1e-4)
        assert nearest[row].tolist() == sorted(range(50), key=lambda n: -similar[n])[:7]
    with pytest.raises(ValueError, match="k is 51: the bank has 50 images"):
        vote(bank, labels, queries, k=51)


def test_votes_are_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(300, 12, generator=generator), torch.randn(200, 12, generator=generator)
    labels = (bank[:, :3] + 0.5 * torch.randn(300, 3, generator=generator)).argmax(1)
    theirs = KNeighborsClassifier(20, weights=lambda far: np.exp((1 - far) / 0.07), metric="cosine", algorithm="brute")
    theirs.fit(bank.numpy(), labels.numpy())
    votes = vote(bank, labels, queries).votes
    np.testing.assert_allclose(votes / votes.sum(1, keepdim=True), theirs.predict_proba(queries.numpy()), atol=1e-4)
    assert (votes.argmax(1).numpy() == theirs.predict(queries.numpy())).all()


def test_a_feature_is_chosen_on_train_and_reported_on_val():
    """Feature a tells classes of train, b those of val: a is chosen, and its accuracy on val reported."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    one_hot, noise = torch.eye(4)[labels], torch.randn(200, 4, generator=generator)
    train = Features({"a": one_hot, "b": noise}, labels)
    val = Features({"a": noise, "b": one_hot}, labels)
    found = by_neighbours(train, val, Settings())
    assert found.feature == "a"
    assert found.accuracy == 100 * float(found.right.float().mean()) < 60
    assert by_neighbours(Features({"a": noise, "b": one_hot}, labels), val, Settings()).feature == "b"


def test_accuracy():
    votes = torch.tensor([[3.0, 1, 0], [0, 1, 2], [0, 2, 1]])
    labels = torch.tensor([0, 1, 0])
    assert accuracy(votes, labels) == pytest.approx(100 / 3)
    assert accuracy(votes, labels, 2) == pytest.approx(200 / 3)
    assert accuracy(votes, labels, 5) == 100


def test_health():
    generator = torch.Generator().manual_seed(0)
    whole = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    assert effective_rank(whole) == pytest.approx(64, rel=1e-3)
    assert effective_rank(torch.ones(64, 64)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.randn(100, 8, generator=generator) @ torch.randn(8, 64, generator=generator)) < 8.01
    assert spread(torch.ones(64, 64)) == 0
    assert spread(torch.randn(2000, 64, generator=generator)) == pytest.approx(1, abs=0.02)


def test_features_are_the_encoders(digits, encoder_folder):
    from ddae import load_encoder

    encoder = load_encoder(encoder_folder)
    reader = ExampleReader(str(digits), "val", 32)
    (found,) = extract([encoder], batches(reader, 100, 0, torch.device("cpu")), [2, 4])
    assert found.labels.tolist() == load_digits().target[1400:].tolist()
    images = torch.stack([torch.from_numpy(reader[n][0]) for n in (0, 150, 396)])
    pixels = (images / 255 - 0.5) / 0.5
    with torch.no_grad():
        last, middle = encoder(pixels), encoder.features(pixels, [2])[0]
    for name, wanted in {"block 4 cls": last[:, 0], "block 4 mean": last[:, 1:].mean(1)}.items():
        torch.testing.assert_close(found.by_name[name][[0, 150, 396]], wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found.by_name["block 2 mean"][[0, 150, 396]], middle[:, 1:].mean(1), rtol=1e-4, atol=1e-4
    )


def knn(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["knn.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ranks.ROOT / "launch" / "knn.py"), run_name="__main__")
    return ended.value.code


def test_the_command(digits, encoder_folder, tmp_path, monkeypatch, capsys):
    words = ["--encoder", encoder_folder, "--data", digits, "--workers", "0", "--out", tmp_path, "--tracker", "jsonl"]
    words += ["--cache", tmp_path / "cache"]
    assert knn(words, monkeypatch) == 0
    first = (tmp_path / "results.json").read_text()
    assert len(list((tmp_path / "cache" / "baselines").iterdir())) == 1
    capsys.readouterr()
    assert knn(words, monkeypatch) == 0  # from what is remembered of the untrained encoder
    assert (tmp_path / "results.json").read_text() == first
    results = json.loads((tmp_path / "results.json").read_text())
    said = capsys.readouterr().out
    assert (results["bank"], results["queries"], results["width"], results["k"]) == (1400, 397, 64, 20)
    assert list(results["features"]) == [f"block {layer} {pool}" for layer in (1, 2, 3, 4) for pool in ("cls", "mean")]
    assert results["accuracy"] > 50  # even random features tell digits apart better than one in ten
    assert results["features"][results["best"]]["top1"] == pytest.approx(results["accuracy"])
    assert f"{results['best']:18}" in said
    assert said.count("<-- chosen on a part of train") == 1
    assert 5 < results["chance"] < 15 < results["raw_pixels"] < 100
    assert results["untrained"] > 50
    assert results["gain"] == pytest.approx(results["accuracy"] - results["untrained"])
    assert said.splitlines()[0] == results["verdict"]
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
        ({"--encoder": "nowhere"}, "nowhere is not an export"),
        ({"--data": "nowhere"}, "nowhere"),
        ({"--k": 5000}, "--k is 5000; expected 1 to 1260, the images of"),
        ({"--k": 0}, "--k is 0; expected 1 to 1260, the images of"),
    ],
)
def test_mistakes_are_one_sentence(change, message, digits, encoder_folder, monkeypatch, capsys):
    words = {"--encoder": encoder_folder, "--data": digits, "--workers": 0} | change
    assert knn([word for pair in words.items() for word in pair], monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.startswith("knn: ")
    assert message in said
    assert said.count("\n") == 1


def test_shards_without_classes_show_what_needs_none(encoder_folder, tmp_path, monkeypatch, capsys):
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
    words = ["--encoder", encoder_folder, "--data", tmp_path, "--k", "12", "--workers", "0", "--tracker", "jsonl"]
    assert knn([*words, "--out", out], monkeypatch) == 0
    said, results = capsys.readouterr().out, json.loads((out / "results.json").read_text())
    assert (
        said.splitlines()[0]
        == f"{tmp_path} has no classes, which accuracies need: shard it with a class for each image"
    )
    assert set(results["features"]["block 4 mean"]) == {"effective_rank", "spread"}
    assert results["accuracy"] is None
    assert '<img alt="neighbours"' in (out / "report.html").read_text()


@pytest.fixture(scope="module")
def probed(digits, tmp_path_factory):
    """A pretraining that is probed while it goes on, by one rank and by two."""
    folder = tmp_path_factory.mktemp("probed")
    more = ("--train.steps", "30", "--probe_every", "0.1", "--engine.precision", "fp32", "--train.report")
    for count in (1, 2):
        ranks.run_all(count, [ranks.words(digits, folder / str(count), 1, *more)])
    return folder


def test_a_run_is_probed(probed):
    rows = [row for row in ranks.metrics(probed / "1") if "features/effective_rank/tap_02" in row]
    assert [row["step"] for row in rows] == [0, 9, 18, 27, 30]
    first, *rows = rows  # untrained weights
    assert 5 < first["knn/chance"] < 15 < first["knn/raw_pixels"]
    for row in rows:
        assert set(row) == {"step"} | {
            f"{of}/tap_0{n}" for of in ("features/effective_rank", "features/std") for n in (1, 2)
        } | {f"knn/tap_0{n}/{pool}" for n in (1, 2) for pool in ("cls", "mean")} | {"knn/raw_pixels", "knn/chance"}
        assert (row["knn/raw_pixels"], row["knn/chance"]) == (first["knn/raw_pixels"], first["knn/chance"])
        assert row["knn/tap_02/mean"] > 30
        assert 1 <= row["features/effective_rank/tap_02"] <= 32
    assert '<img alt="probes"' in (probed / "1" / "report.html").read_text()


def test_ranks_probe_together(probed):
    one, two = (
        [row for row in ranks.metrics(probed / n) if "features/effective_rank/tap_02" in row] for n in ("1", "2")
    )
    for mine, theirs in zip(one, two, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=0.3)  # an image of 397 may change its mind


def test_shards_without_a_held_out_split_are_told(shards, tmp_path):
    words = ranks.words(shards, tmp_path, 1, "--probe_every", "1")
    code, said = ranks.run_command("launch/pretrain.py", *words)
    assert code == 2
    assert "--probe_every wants a split to hold out" in said
    assert not list(tmp_path.iterdir())
