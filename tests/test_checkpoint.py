"""Which checkpoint a run resumes from, and the tracker's rows beside it."""

import hashlib
import json

import pytest

from ddae.checkpoint import MANIFEST, Checkpoints
from ddae.config import TrackerConfig
from ddae.errors import UserError
from ddae.tracker import Tracker, read_metrics, start_tracker


def make(folder, step, files=("state.pt", "rank_00000.safetensors")):
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    for name in files:
        (path / name).write_bytes(bytes(100))
    entry = {"bytes": 100, "sha256": hashlib.sha256(bytes(100)).hexdigest()}
    (path / MANIFEST).write_text(json.dumps({"step": step, "ranks": 1, "files": dict.fromkeys(files, entry)}))
    return path


def test_a_new_run_has_none(tmp_path):
    assert Checkpoints(tmp_path / "checkpoints", 3).newest(allow_scratch=False) is None


def test_the_newest_is_taken(tmp_path):
    for step in (5, 100, 20):
        make(tmp_path, step)
    (tmp_path / ".unfinished_00000200").mkdir()
    found = Checkpoints(tmp_path, 3).newest(False)
    assert (found.step, found.path.name) == (100, "step_00000100")


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda path: (path / "state.pt").unlink(), "state.pt is missing"),
        (lambda path: (path / "state.pt").write_bytes(bytes(40)), "state.pt has 40 bytes of 100"),
        (lambda path: (path / "state.pt").write_bytes(bytes(99) + b"\1"), "state.pt has changed"),
        (lambda path: (path / MANIFEST).unlink(), "manifest cannot be read"),
        (lambda path: (path / MANIFEST).write_text('{"step": 1'), "manifest cannot be read"),
        (lambda path: (path / MANIFEST).write_text("[]"), "manifest cannot be read"),
    ],
)
def test_a_broken_one_is_passed_over_and_named(damage, reason, tmp_path, capsys):
    make(tmp_path, 10)
    damage(make(tmp_path, 20))
    assert Checkpoints(tmp_path, 3).newest(False).step == 10
    said = capsys.readouterr().out
    assert reason in said
    assert "step_00000020" in said


def test_only_broken_ones_never_mean_a_silent_start(tmp_path):
    (make(tmp_path, 10) / "state.pt").unlink()
    checkpoints = Checkpoints(tmp_path, 3)
    with pytest.raises(UserError, match="--allow_scratch"):
        checkpoints.newest(allow_scratch=False)
    assert checkpoints.newest(allow_scratch=True) is None


def test_metrics_are_cut_back_to_the_resumed_step(tmp_path):
    rows = "".join(json.dumps({"step": step, "loss/total": 0.5}) + "\n" for step in range(1, 8))
    (tmp_path / "metrics.jsonl").write_text(rows + '{"step": 8, "lo')
    tracker = Tracker(tmp_path, 5)
    tracker.log({"step": 6, "loss/total": 0.25})
    tracker.finish([])
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["loss/total"] == 0.25


def test_mlflow_has_one_run_however_often_it_is_resumed(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "figures").mkdir()
    picture = tmp_path / "run" / "figures" / "losses.png"
    picture.write_bytes(b"png")
    params = {"data": {"batch_size": 32}, "preset": "demo"}
    for start in (0, 2):
        tracker = start_tracker(TrackerConfig(), tmp_path / "run", start, params)
        for step in (start + 1, start + 2):
            tracker.log({"step": step, "loss/total": 1 / step, "beta/tap_02": -0.5})
        tracker.finish([picture])
    client = mlflow.MlflowClient("sqlite:///mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "ddae"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"data.batch_size": "32", "preset": "demo"}
    history = client.get_metric_history(run.info.run_id, "loss/total")
    assert [(point.step, point.value) for point in history] == [(step, 1 / step) for step in (1, 2, 3, 4)]
    assert [file.path for file in client.list_artifacts(run.info.run_id, "figures")] == ["figures/losses.png"]
    assert run.info.status == "FINISHED"


def test_a_failing_mlflow_is_told_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nosuch://server")
    tracker = start_tracker(TrackerConfig(), tmp_path, 0, {})
    tracker.log({"step": 1, "loss/total": 1.0})
    tracker.log({"step": 2, "loss/total": 0.5})
    tracker.finish([])
    assert capsys.readouterr().out.count("MLflow is left out") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
