"""From a folder of photos to a judged encoder, as a new user would: in an empty folder, by `ddae` and in Python."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from image_archives import photo
from PIL import Image

import ddae
from ddae.config.pretrain import PretrainConfig
from ddae.data.cache import Cache
from ddae.data.shards import open_shards
from ddae.errors import UserError
from ddae.eval.without_labels import retrieval

TINY = {  # settings of a run of seconds
    "model": {"width": 24, "depth": 4, "heads": 2, "image_size": 32, "patch_size": 8},
    "pixel": {"taps": (1, 2, 3, 4), "decoder_width": 24, "decoder_heads": 2},
    "feature": {"taps": (1, 2, 3, 4), "decoder_width": 24, "decoder_heads": 2},
    "train": {"steps": 4, "log_every": 2, "save_every": 2},
    "data": {"workers": 0, "backend": "pillow"},
    "tracker": {"kind": "jsonl"},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """An empty folder beside one of 130 photos in dated folders."""
    root = tmp_path_factory.mktemp("own")
    for number in range(130):
        day = root / "photos" / f"2024-05-{1 + number // 50:02d}"
        day.mkdir(parents=True, exist_ok=True)
        (day / f"IMG_{number:04d}.jpg").write_bytes(photo(number))
    (root / "work").mkdir()
    return root / "work"


@pytest.fixture(scope="module")
def run(work) -> Path:
    """The folder of a finished run."""
    from ddae.api import flags

    output = command(work, "pretrain", "../photos", "--out", "runs/mine", *flags(TINY))
    assert "130 images found = 130 written unchanged" in output
    assert re.search("preset own: 1[12]0 training images, a CPU, zero2", output)  # one burst of 10 or 20 is set aside
    assert "warning: fewer than 1,000 steps" in output
    assert "runs/mine: 4 steps done" in output
    return work / "runs" / "mine"


def command(work: Path, *args: str, code: int = 0) -> str:
    """Run `ddae ARGS` in the folder. Return its output."""
    path = os.pathsep.join((str(ranks.ROOT), str(ranks.ROOT / "kernels")))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "-m", "ddae", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=work,
        env=env,
    )
    assert finished.returncode == code, finished.stdout
    return finished.stdout


def test_settings_and_shards(run, work):
    config = PretrainConfig.read(run / "config.json")
    assert config.preset == "own"
    assert config.model.width == 24  # a flag comes before the preset
    assert config.optim.lr == 3e-3
    splits = [open_shards(str(work / config.data.train), Cache(work, 1), split) for split in ("train", "val")]
    assert sum(map(len, splits)) == 130
    assert splits[0].classes == ()


def test_the_same_command_is_done_already(run, work):
    from ddae.api import flags

    output = command(work, "pretrain", "../photos", "--out", "runs/mine", *flags(TINY))
    assert "runs/mine is complete: 4 of 4 steps" in output
    assert "images found" not in output


def test_report(run, work):
    output = command(work, "report", "--encoder", "runs/mine")
    results = json.loads((run / "report" / "results.json").read_text())
    assert output.splitlines()[0] == results["verdict"]
    assert results["split"] == "val"
    assert set(results["features"]) == {"trained", "untrained", "raw pixels"}
    assert set(results["masked_pixel_error"]) == {
        "decoder, given mean and contrast of each masked patch",
        "mean colour of the visible patches",
        "mean colour of each masked patch",
    }
    assert results["chance"]["two_crop_retrieval"] == pytest.approx(100 / results["images"])
    assert "Photos (left) and the photos nearest to each" in (run / "report.html").read_text()
    with Image.open(run / "report" / "figures" / "similar.png") as image:
        assert min(image.size) > 200


def test_report_on_other_photos(run, work):
    output = command(work, "report", "--encoder", "runs/mine/encoder", "--data", "../photos", "--out", "judged")
    assert "of split val of" in output
    assert (work / "judged" / "results.json").exists()
    output = command(work, "report", "--encoder", "runs/mine/encoder", code=2)
    assert "is no run, so that its images are unknown. Pass some as --data." in output


def test_embeddings_by_command_and_in_python(run, work):
    command(work, "embed", "--encoder", "runs/mine", "../photos", "--out", "embedded", "--workers", "1")
    with np.load(work / "embedded" / "embeddings.npz") as file:
        values, names = file["embeddings"], file["names"]
    assert values.shape == (130, 24)
    files = [work / name for name in names[:3]]
    np.testing.assert_allclose(ddae.embed(run, files), values[:3], rtol=1e-5, atol=1e-6)


def test_in_python(run, work, monkeypatch, capfd):
    monkeypatch.chdir(work)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ranks.ROOT), str(ranks.ROOT / "kernels"))))
    made = ddae.pretrain("../photos", out="runs/python", **TINY)
    assert made == Path("runs/python")
    assert "runs/python: 4 steps done" in capfd.readouterr().out
    by_command, by_python = (ddae.load_encoder(each) for each in (run, made))
    for name, values in by_command.state_dict().items():
        torch.testing.assert_close(by_python.state_dict()[name], values, rtol=0, atol=0)
    with pytest.raises(UserError, match=r"unknown flag --optim\.learning_rate; the nearest is"):
        ddae.pretrain("../photos", out="runs/wrong", optim={"learning_rate": 1})
    with pytest.raises(UserError, match="contains no image"):
        ddae.pretrain("runs/mine/heartbeats", out="runs/wrong")
    assert not Path("runs/wrong").exists()


def test_probe_on_class_folders(run, work):
    for number in range(120):
        folder = work.parent / "classes" / ("cat", "dog", "owl")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(photo(number))
    args = (
        "probe",
        "--encoder",
        "runs/mine",
        "--preset",
        "demo",
        "--data.train",
        "../classes",
        "--tracker.kind",
        "jsonl",
    )
    output = command(
        work, *args, "--train.epochs", "1", "--data.batch_size", "20", "--data.workers", "0", "--val_share", "0.3"
    )
    assert "chance" in output
    results = json.loads((run / "linear_probe" / "results.json").read_text())
    assert results["classes"] == 3
    assert sum(results["images"].values()) == 120


@pytest.mark.slow
def test_further_from_given_weights(run, work):
    from ddae.api import flags

    settings = {name: TINY[name] for name in ("train", "data", "tracker")}
    args = ("pretrain", "../photos", "--out", "runs/further", "--init", "runs/mine", *flags(settings))
    output = command(work, *args)
    assert "init: all " in output
    assert "of the encoder in runs/mine; decoders and betas start anew" in output
    config = PretrainConfig.read(work / "runs" / "further" / "config.json")
    assert (config.model.width, config.pixel.taps) == (24, (1, 2, 3, 4))
    initial, first = ddae.load_encoder(work / "runs" / "further" / "initial"), ddae.load_encoder(run)
    for name, values in first.state_dict().items():
        torch.testing.assert_close(initial.state_dict()[name], values, rtol=0, atol=0)
    trained = ddae.load_encoder(work / "runs" / "further")
    assert not torch.equal(trained.cls_token, initial.cls_token)
    assert trained.initial_path == work / "runs" / "further" / "initial"
    output = command(work, "report", "--encoder", "runs/further")
    assert "initial weights (" in output
    (work / "runs" / "mine").rename(work / "runs" / "elsewhere")  # a complete run needs what it started from no more
    try:
        assert "runs/further is complete" in command(work, *args)
    finally:
        (work / "runs" / "elsewhere").rename(work / "runs" / "mine")


@pytest.mark.parametrize(
    "args, message",
    [
        ((), "no images are given. Pass a folder: ddae pretrain PHOTOS"),
        (("../photos", "--preset", "own1"), "unknown preset 'own1'; the nearest is 'own'"),
        (("missing",), "data.train is 'missing'"),
        (("../photos/2024-05-03",), "contains 30 images; expected at least 100"),
        (("../photos", "--init", "nowhere.pth"), "nowhere.pth does not exist"),
        (("../photos", "--preset", "demo", "--init", "runs/mine"), "has model.width = 24, not 96"),
        (("../photos", "--val_share", "2"), "data.val_share is 2.0; expected a value from 0 to 1"),
    ],
)
def test_mistakes_leave_nothing_behind(args, message, work, run):
    before = set(work.rglob("*"))
    output = command(work, "pretrain", *args, "--out", "runs/new", code=2)
    assert message in output
    assert len(output.splitlines()) == 1
    assert set(work.rglob("*")) == before


def test_settings_are_shown_without_any_work(work, tmp_path):
    output = command(tmp_path, "pretrain", str(work.parent / "photos"), "--out", "runs/shown", "--show")
    assert json.loads(output)["train"]["steps"] == 2000
    assert list(tmp_path.iterdir()) == []


def test_retrieval():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(40, 8, generator=generator)
    assert retrieval(first, first + 0.01) == 100
    assert retrieval(first, first.roll(1, 0)) == 0
