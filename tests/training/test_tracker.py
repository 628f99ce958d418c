"""Tracker: metrics.jsonl is complete, MLflow gets one run despite server failures, and neither contains secrets."""

import contextlib
import http.server
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time

import mlflow
import pytest
import ranks

from ddae.config.base import TrackerConfig
from ddae.config.cli import parse
from ddae.config.pretrain import PretrainConfig
from ddae.distributed.logs import configure_logging
from ddae.training import mlflow_tracker as tracking
from ddae.training.mlflow_tracker import create_store
from ddae.training.tracker import Tracker, read_metrics
from ddae.training.tracking import start_tracker


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Give each test its own folder and MLflow store, and short pauses between retries."""
    configure_logging()
    monkeypatch.chdir(tmp_path)
    # An absolute path: MLflow caches the store of a relative one from test to test.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for name in ("MLFLOW_EXPERIMENT_NAME", *tracking.TIMEOUTS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tracking, "RETRY_PAUSE_S", (0.1, 0.2))
    yield
    for thread in threading.enumerate():
        if thread.name == "mlflow":  # still running after a timeout: it would log during the next test
            thread.join()


def test_rows_after_the_resumed_step_are_removed(tmp_path):
    rows = "".join(json.dumps({"step": step, "loss/total": 0.5}) + "\n" for step in range(1, 8))
    (tmp_path / "metrics.jsonl").write_text(rows + '{"step": 8, "lo')
    tracker = Tracker(tmp_path, 5)
    tracker.log({"step": 6, "loss/total": 0.25})
    tracker.finish([])
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["loss/total"] == 0.25


def test_rows_are_buffered_while_the_disk_is_full(tmp_path, capsys):
    tracker = Tracker(tmp_path, 0)
    tracker.log({"step": 1})
    file, tracker._file = tracker._file, open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    for step in (2, 3):
        tracker.log({"step": step})
    assert capsys.readouterr().out.count("cannot be written (No space left on device); its rows are buffered") == 1
    tracker._file = file
    tracker.log({"step": 4})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def runs_of(client, name="ddae"):
    (experiment,) = [each for each in client.search_experiments() if each.name == name]
    return client.search_runs([experiment.experiment_id])


@pytest.mark.parametrize("run_id_from", ["folder", "checkpoint"])
def test_a_resumed_run_continues_its_mlflow_run(run_id_from, tmp_path):
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
        if run_id_from == "checkpoint":
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


def test_a_run_deleted_from_mlflow_is_replaced_by_a_new_one(tmp_path, capsys):
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


def test_a_run_that_raises_has_status_failed(tmp_path):
    import mlflow

    program = (
        "import time; from pathlib import Path; from ddae.config.base import TrackerConfig\n"
        "from ddae.training.tracking import start_tracker\n"
        "tracker = start_tracker(TrackerConfig(), Path('.'), 0, {})\n"
        "while not tracker.run_id: time.sleep(0.1)\n"
        "tracker.log({'step': 1, 'loss/total': 1.0}); raise RuntimeError('broken')"
    )
    paths = {"PYTHONPATH": f"{ranks.ROOT}:{ranks.ROOT / 'kernels'}"}
    process = subprocess.run([sys.executable, "-c", program], env=os.environ | paths, capture_output=True, check=False)
    assert process.returncode == 1
    (run,) = runs_of(mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"))
    assert run.info.status == "FAILED"
    assert run.data.metrics == {"loss/total": 1.0}


class Server:
    """A failing MLflow server: it answers every request with `status` after `delay` seconds."""

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

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"


@pytest.mark.reliability
@pytest.mark.parametrize("kind", ["down", "failing", "slow"])
def test_a_failing_server_does_not_delay_training(kind, tmp_path, monkeypatch, capsys, record_result):
    """An MLflow server that is down, answers 500, or takes 2 s per request."""
    address = "http://me:hunter2@127.0.0.1:9"  # port of the discard service: nothing listens
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
    output = capsys.readouterr().out
    assert output.count("MLflow does not answer") <= 1
    assert "hunter2" not in output
    assert "MLflow lacks at least" in output
    record_result(f"a row takes {sorted(times)[50] * 1e6:.0f} us, the end {waited:.1f} s; metrics.jsonl is complete")


def test_rows_of_an_outage_are_sent_afterwards(tmp_path, monkeypatch, capsys):
    import mlflow

    down = [True]
    create = mlflow.MlflowClient.create_run

    def flaky(self, *args, **options):
        if down[0]:
            raise ConnectionError("refused")
        return create(self, *args, **options)

    monkeypatch.setattr(mlflow.MlflowClient, "create_run", flaky)
    tracker = start_tracker(TrackerConfig(), tmp_path, 0, {"preset": "demo"})
    for step in range(1, 31):
        tracker.log({"step": step, "loss/total": float(step)})
    while "does not answer" not in capsys.readouterr().out:
        time.sleep(0.05)
    down[0] = False
    tracker.finish([])
    assert "MLflow answers again" in capsys.readouterr().out
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = runs_of(client)
    assert len(client.get_metric_history(run.info.run_id, "loss/total")) == 30
    assert run.data.params == {"preset": "demo"}


def test_a_long_outage_drops_rows_that_the_queue_cannot_hold(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "QUEUE_ROWS", 10)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    tracker = start_tracker(TrackerConfig(), tmp_path, 0, {})
    for step in range(1, 51):
        tracker.log({"step": step, "loss/total": 1.0})
    tracker.finish([], timeout_s=0.5)
    assert "MLflow lacks at least 50 rows" in capsys.readouterr().out
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 50


def test_a_store_appears_complete_or_not_at_all(tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", fail)
        with pytest.raises(KeyboardInterrupt):
            create_store(uri)
    assert list(tmp_path.iterdir()) == []
    create_store(uri)
    content = (tmp_path / "mlflow.db").read_bytes()
    create_store(uri)
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
    assert (tmp_path / "mlflow.db").read_bytes() == content
    client = mlflow.MlflowClient(uri)
    assert client.get_run(client.create_run("0").info.run_id).info.status == "RUNNING"


def test_a_store_that_another_process_creates_is_left_alone(tmp_path, monkeypatch):
    path = tmp_path / "mlflow.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        database.execute("INSERT INTO alembic_version VALUES ('an earlier one')")
        database.commit()
    with pytest.raises(RuntimeError, match="another process is creating"):
        create_store(f"sqlite:///{path}")
    os.utime(path, (0, 0))  # an old store, which MLflow itself refuses
    create_store(f"sqlite:///{path}")


OPEN_STORE = """
import sys, time
from pathlib import Path
from ddae.config.base import TrackerConfig
from ddae.training.tracking import start_tracker
tracker = start_tracker(TrackerConfig("mlflow", "x"), Path(sys.argv[1]), 0, {"a": 1})
tracker.log({"step": 1, "loss": 2.0})
tracker.finish([], timeout_s=120)
print("run", tracker.run_id)
"""


@pytest.mark.faults
def test_first_runs_at_the_same_time_share_a_new_store(tmp_path, record_result):
    """Three first runs open a new MLflow SQLite file at the same time."""
    env = os.environ | {"PYTHONPATH": str(ranks.ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    processes = []
    for number in range(3):
        (tmp_path / f"run_{number}").mkdir()
        command = [sys.executable, "-c", OPEN_STORE, str(tmp_path / f"run_{number}")]
        processes.append(subprocess.Popen(command, env=env, cwd=tmp_path, text=True, stdout=subprocess.PIPE))
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    runs = [line.split()[1] for output in outputs for line in output.splitlines() if line.startswith("run ")]
    client = mlflow.MlflowClient(env["MLFLOW_TRACKING_URI"])
    assert [client.get_run(run).data.metrics["loss"] for run in runs] == [2.0] * 3
    record_result("each has its run with its metrics")


@pytest.mark.faults
def test_a_store_that_mlflow_ui_creates_at_the_same_time(tmp_path, record_result):
    """`mlflow ui` creates the SQLite file while the first run opens it."""
    env = os.environ | {"PYTHONPATH": str(ranks.ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    ui = [sys.executable, "-c", "import mlflow; print(len(mlflow.MlflowClient().search_experiments()))"]
    creator = subprocess.Popen(ui, env=env, cwd=tmp_path, text=True, stdout=subprocess.PIPE)  # as the UI does
    deadline = time.monotonic() + 120
    while not (tmp_path / "mlflow.db").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", OPEN_STORE, str(tmp_path / "run")]
    output = subprocess.run(command, env=env, cwd=tmp_path, text=True, stdout=subprocess.PIPE, timeout=300).stdout
    assert (creator.communicate(timeout=120)[0], creator.returncode) == ("1\n", 0)
    (run,) = [line.split()[1] for line in output.splitlines() if line.startswith("run ")]
    assert mlflow.MlflowClient(env["MLFLOW_TRACKING_URI"]).get_run(run).data.metrics["loss"] == 2.0
    record_result("the run waits until the file is complete; both work")


def test_secrets_are_not_logged():
    secret = "https://me:hunter2@host/shards/train-{000000..000009}.tar?X-Amz-Signature=abc"
    config = parse(["--preset", "demo", "--data.train", secret])
    assert config.data.train == secret  # the loader needs it
    logged = json.dumps(config.to_dict())
    assert "hunter2" not in logged
    assert "Signature" not in logged
    assert config.to_dict()["data"]["train"] == "https://host/shards/train-{000000..000009}.tar"


def test_a_config_is_restored_from_its_json():
    for config in (PretrainConfig(), parse(["--preset", "mae_vit_h14_300e"]), parse(["--preset", "demo"])):
        assert PretrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def refusal(tmp_path, capsys, uri, monkeypatch, name="ddae"):
    """Return the warning of a tracker that cannot use a store, and the seconds that its end took."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracker = start_tracker(TrackerConfig(experiment=name), tmp_path, 0, {})
    tracker.log({"step": 1, "loss/total": 1.0})
    tracker._thread.join(60)
    assert not tracker._thread.is_alive()
    before = time.perf_counter()
    tracker.finish([], timeout_s=30)
    assert time.perf_counter() - before < 5
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    output = capsys.readouterr().out
    assert "does not answer" not in output
    (warning,) = [line for line in output.splitlines() if "MLflow gets no more of this run" in line]
    return warning


def test_a_deleted_experiment_is_no_outage(tmp_path, capsys, monkeypatch):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    number = client.create_experiment("gone")
    client.delete_experiment(number)
    warning = refusal(tmp_path, capsys, uri, monkeypatch, "gone")
    assert (
        f"its experiment gone is deleted; restore it with mlflow experiments restore -x {number}, or choose" in warning
    )


@pytest.mark.parametrize(
    "uri, reason",
    [
        ("file://{folder}/mlruns", "maintenance mode"),  # MLflow's old store of files
        ("postgresql://localhost/mlflow", "No module named"),
        ("sqlite:///{folder}/broken.db", "file is not a database"),
    ],
)
def test_a_store_that_cannot_work_is_no_outage(uri, reason, tmp_path, capsys, monkeypatch):
    (tmp_path / "broken.db").write_text("text" * 100)
    assert reason in refusal(tmp_path, capsys, uri.format(folder=tmp_path), monkeypatch)


def test_artifacts_that_cannot_be_written_are_no_outage(tmp_path, capsys, monkeypatch):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (tmp_path / "file").touch()
    mlflow.MlflowClient(uri).create_experiment("ddae", artifact_location=str(tmp_path / "file" / "artifacts"))
    tracker = start_tracker(TrackerConfig(), tmp_path, 0, {})
    tracker.log({"step": 1, "loss/total": 1.0})
    tracker.finish([tmp_path / "metrics.jsonl"], timeout_s=60)
    output = capsys.readouterr().out
    assert "Not a directory" in output
    assert "does not answer" not in output
    (run,) = runs_of(mlflow.MlflowClient(uri))
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"loss/total": 1.0}
