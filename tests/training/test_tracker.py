"""metrics.jsonl always; MLflow in one run, whatever becomes of its server; nothing secret in either."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import ranks

from ddae.config.base import TrackerConfig
from ddae.config.cli import parse
from ddae.config.pretrain import PretrainConfig
from ddae.training import tracker as tracking
from ddae.training.tracker import Tracker, read_metrics, start_tracker


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """A folder and a store of its own, and no long pauses between attempts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(
        "MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db"
    )  # a relative one is kept from test to test
    for name in ("MLFLOW_EXPERIMENT_NAME", *tracking.IMPATIENT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tracking, "PAUSE", (0.1, 0.2))
    yield
    for thread in threading.enumerate():
        if thread.name == "mlflow":  # left behind by a run that waited no longer: not to speak in the next test
            thread.join()


def test_metrics_are_cut_back_to_the_resumed_step(tmp_path):
    rows = "".join(json.dumps({"step": step, "loss/total": 0.5}) + "\n" for step in range(1, 8))
    (tmp_path / "metrics.jsonl").write_text(rows + '{"step": 8, "lo')
    tracker = Tracker(tmp_path, 5)
    tracker.log({"step": 6, "loss/total": 0.25})
    tracker.finish([])
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["loss/total"] == 0.25


def test_a_full_disk_keeps_rows_waiting(tmp_path, capsys):
    tracker = Tracker(tmp_path, 0)
    tracker.log({"step": 1})
    whole, tracker._file = tracker._file, open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    for step in (2, 3):
        tracker.log({"step": step})
    assert capsys.readouterr().out.count("cannot be written (No space left on device): its rows wait") == 1
    tracker._file = whole
    tracker.log({"step": 4})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def runs_of(client, experiment="ddae"):
    (found,) = [each for each in client.search_experiments() if each.name == experiment]
    return client.search_runs([found.experiment_id])


@pytest.mark.parametrize("known_by", ["folder", "checkpoint"])
def test_mlflow_has_one_run_however_often_it_is_resumed(known_by, tmp_path):
    import mlflow

    folder = tmp_path / "run"
    (folder / "figures").mkdir(parents=True)
    picture = folder / "figures" / "losses.png"
    picture.write_bytes(b"png")
    params, run_id = {"data": {"batch_size": 32}, "preset": "demo"}, ""
    for start in (0, 2):
        tracker = start_tracker(TrackerConfig(), folder, start, params, run_id)
        for step in (start + 1, start + 2):
            tracker.log({"step": step, "loss/total": 1 / step, "beta/tap_02": -0.5})
        tracker.finish([picture])
        if known_by == "checkpoint":
            run_id = tracker.run_id
            (folder / tracking.RUN_ID).unlink()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = runs_of(client)
    assert run.data.params == {"data.batch_size": "32", "preset": "demo"}
    history = client.get_metric_history(run.info.run_id, "loss/total")
    assert sorted((point.step, point.value) for point in history) == [(step, 1 / step) for step in (1, 2, 3, 4)]
    assert [file.path for file in client.list_artifacts(run.info.run_id, "figures")] == ["figures/losses.png"]
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"


def test_a_run_that_mlflow_lost_is_opened_anew(tmp_path, capsys):
    import mlflow

    mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").create_experiment("ddae")
    (tmp_path / "run").mkdir()
    tracker = start_tracker(TrackerConfig(), tmp_path / "run", 0, {"preset": "demo"}, "0" * 32)
    tracker.log({"step": 1, "loss/total": 1.0})
    tracker.finish([], "KILLED")
    assert "MLflow has no run 000" in capsys.readouterr().out
    (run,) = runs_of(mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"))
    assert run.info.run_id == tracker.run_id != "0" * 32
    assert run.info.status == "KILLED"


def test_a_run_that_breaks_off_has_failed(tmp_path):
    import mlflow

    program = (
        "import time; from pathlib import Path; from ddae.config.base import TrackerConfig\n"
        "from ddae.training.tracker import start_tracker\n"
        "tracker = start_tracker(TrackerConfig(), Path('.'), 0, {})\n"
        "while not tracker.run_id: time.sleep(0.1)\n"
        "tracker.log({'step': 1, 'loss/total': 1.0}); raise RuntimeError('broken')"
    )
    paths = {"PYTHONPATH": f"{ranks.ROOT}:{ranks.ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | paths, capture_output=True, check=False)
    assert done.returncode == 1
    (run,) = runs_of(mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"))
    assert run.info.status == "FAILED"
    assert run.data.metrics == {"loss/total": 1.0}


class Server:
    """An MLflow server of the worst kind: it answers every request with `status` after `delay` seconds."""

    def __init__(self, status=500, delay=0.0):
        outer = self
        self.status, self.delay, self.requests = status, delay, 0

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self):
                outer.requests += 1
                time.sleep(outer.delay)
                self.send_response(outer.status)
                self.end_headers()

            do_GET = do_POST = do_PATCH = answer  # noqa: N815 - http.server's names

            def log_message(self, *words):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"


@pytest.mark.reliability
@pytest.mark.parametrize("kind", ["down", "failing", "slow"])
def test_a_bad_server_stops_nothing(kind, tmp_path, monkeypatch, capsys, tell):
    """An MLflow server that is down, answers 500, or takes 2 s a request."""
    address = "http://me:hunter2@127.0.0.1:9"  # discard: nobody listens
    if kind != "down":
        address = Server(500, 2.0 if kind == "slow" else 0.0).address
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    tracker = start_tracker(TrackerConfig(), tmp_path, 0, {})
    times = []
    for step in range(1, 101):
        before = time.perf_counter()
        tracker.log({"step": step, "loss/total": 1.0})
        times.append(time.perf_counter() - before)
        time.sleep(0.01)
    before = time.perf_counter()
    tracker.finish([], timeout_s=1.0)
    waited = time.perf_counter() - before
    assert sorted(times)[50] < 0.05
    assert waited < 10
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 100
    said = capsys.readouterr().out
    assert said.count("MLflow does not answer") <= 1
    assert "hunter2" not in said
    assert "MLflow has not taken everything" in said
    tell(f"a row costs {sorted(times)[50] * 1e6:.0f} us, the end of the run {waited:.1f} s; metrics.jsonl is complete")


def test_a_server_that_comes_back_gets_what_it_missed(tmp_path, monkeypatch, capsys):
    import mlflow

    broken = [True]
    create = mlflow.MlflowClient.create_run

    def flaky(self, *args, **options):
        if broken[0]:
            raise ConnectionError("nobody there")
        return create(self, *args, **options)

    monkeypatch.setattr(mlflow.MlflowClient, "create_run", flaky)
    tracker = start_tracker(TrackerConfig(), tmp_path, 0, {"preset": "demo"})
    for step in range(1, 31):
        tracker.log({"step": step, "loss/total": float(step)})
    while "does not answer" not in capsys.readouterr().out:
        time.sleep(0.05)
    broken[0] = False
    tracker.finish([])
    assert "MLflow answers again" in capsys.readouterr().out
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = runs_of(client)
    assert len(client.get_metric_history(run.info.run_id, "loss/total")) == 30
    assert run.data.params == {"preset": "demo"}


def test_a_long_outage_costs_the_oldest_rows_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "WAITING", 10)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    tracker = start_tracker(TrackerConfig(), tmp_path, 0, {})
    for step in range(1, 51):
        tracker.log({"step": step, "loss/total": 1.0})
    tracker.finish([], timeout_s=0.5)
    assert "MLflow has not taken everything (50 rows" in capsys.readouterr().out
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 50


def test_nothing_secret_is_logged():
    secret = "https://me:hunter2@host/shards/train-{000000..000009}.tar?X-Amz-Signature=abc"
    config = parse(["--preset", "demo", "--data.train", secret])
    assert config.data.train == secret  # as it is used
    logged = json.dumps(config.to_dict())
    assert "hunter2" not in logged
    assert "Signature" not in logged
    assert config.to_dict()["data"]["train"] == "https://host/shards/train-{000000..000009}.tar"


def test_a_config_comes_back_from_its_file():
    for config in (PretrainConfig(), parse(["--preset", "mae_vit_h14_300e"]), parse(["--preset", "demo"])):
        assert PretrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
