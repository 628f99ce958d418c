"""Trackers besides MLflow: TensorBoard's event files, Weights & Biases without a network; a package that fails."""

import json

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddae.config.base import TrackerConfig
from ddae.distributed.logs import configure_logging
from ddae.errors import UserError
from ddae.training.tracker import read_metrics
from ddae.training.tracking import check_installed, start_tracker

SETTINGS = {"model": {"width": 96}, "preset": "demo"}


@pytest.fixture(autouse=True)
def _logging():
    configure_logging()


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "losses.png"
    Image.new("RGB", (8, 6), "red").save(path)
    return path


def start(folder, kind, step=0):
    folder.mkdir(exist_ok=True)
    return start_tracker(TrackerConfig(kind=kind), folder, step, SETTINGS)


def test_tensorboard_shows_a_resumed_run(tmp_path, picture):
    run = tmp_path / "run"
    first = start(run, "tensorboard")
    for step in (1, 2, 3):
        first.log({"step": step, "loss/total": float(step)})
    first.finish([], "KILLED")
    second = start(run, "tensorboard", step=2)
    for step in (3, 4):
        second.log({"step": step, "loss/total": 10.0 + step, "val/knn": 0.5})
    second.finish([picture, tmp_path / "encoder.safetensors"])
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("loss/total")]
    assert curve == [(1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0)]
    assert events.Tags()["images"] == ["losses"]
    assert "96" in str(events.Tensors("settings/text_summary")[0].tensor_proto)
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4]


def test_wandb_keeps_a_run_without_a_key(tmp_path, monkeypatch, picture, capsys):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    run = tmp_path / "run"
    first = start(run, "wandb")
    first.log({"step": 1, "loss/total": 1.0})
    first.finish([], "KILLED")
    assert "has no API key; wandb sync" in capsys.readouterr().out
    name = (run / "wandb_run_id").read_text()
    second = start(run, "wandb", step=1)
    second.log({"step": 2, "loss/total": 0.5})
    second.finish([picture])
    assert (run / "wandb_run_id").read_text() == name
    offline = sorted((run / "wandb").glob("offline-run-*"))
    assert len(offline) == 2
    assert all(each.name.endswith(name) for each in offline)
    assert list(offline[1].glob("files/media/images/losses*.png"))
    assert "gets no more" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_an_error_of_the_package_ends_nothing(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = start(tmp_path / "run", kind)
    package = tracker._writer if kind == "tensorboard" else tracker._run

    def fail(*args, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr(package, "add_scalar" if kind == "tensorboard" else "log", fail)
    for step in (1, 2):
        tracker.log({"step": step, "loss/total": 1.0})
    tracker.finish([])
    printed = capsys.readouterr().out
    assert printed.count("gets no more of this run: No space left on device") == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for kind in ("mlflow", "tensorboard", "wandb"):
        with pytest.raises(UserError, match=f"the package {kind} is not installed. pip install {kind}, or"):
            check_installed(TrackerConfig(kind=kind))
    check_installed(TrackerConfig(kind="jsonl"))
