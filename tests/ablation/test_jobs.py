"""Several jobs at a time: number, GPUs, a failure, signals, and the tracker of an interrupted table."""

import os
import signal
import sys
import threading
import time

import pytest

from ddae.ablation import jobs, run
from ddae.ablation.jobs import Job, run_jobs
from ddae.distributed.logs import configure_logging
from ddae.errors import UserError


@pytest.fixture(autouse=True)
def clean_process(monkeypatch):
    """Restore signal handlers; unset what a launcher would set; configure logging."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    configure_logging()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def python_jobs(folder, codes):
    """Return a job for each piece of Python code; its argument is the job's number."""
    return [Job(f"job {n}", [sys.executable, "-c", code, str(n)], folder / f"{n}.log") for n, code in enumerate(codes)]


@pytest.mark.parametrize("visible", ["", "5,7"])
def test_parallel_jobs_share_gpus_and_cores(visible, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs.torch.cuda, "device_count", lambda: 2)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    code = (
        "import os, time; print(time.time()); time.sleep(0.6); "
        "print(time.time(), os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'])"
    )
    run_jobs(python_jobs(tmp_path, [code] * 4), parallel=2)
    outputs = [(tmp_path / f"{n}.log").read_text().split() for n in range(4)]
    spans = [(float(start), float(end)) for start, end, *_ in outputs]
    most_at_a_time = max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)
    assert most_at_a_time == 2
    gpus = visible.split(",") if visible else ["0", "1"]
    assert [gpu for *_, gpu, _ in outputs][:2] == gpus
    assert sorted(gpu for *_, gpu, _ in outputs) == sorted(gpus * 2)
    assert {int(threads) for *_, threads in outputs} == {max(1, len(os.sched_getaffinity(0)) // 2)}
    assert capsys.readouterr().out.count(": done in ") == 4


def test_after_a_failure_running_jobs_finish_and_none_starts(tmp_path, capsys):
    codes = ["print('no data'); raise SystemExit(3)", "import time; time.sleep(1); print('whole')", "print('never')"]
    with pytest.raises(SystemExit) as ended:
        run_jobs(python_jobs(tmp_path, codes), parallel=2)
    assert ended.value.code == 3
    assert (tmp_path / "1.log").read_text() == "whole\n"
    assert not (tmp_path / "2.log").exists()
    assert f"job 0: failed with code 3: no data ({tmp_path / '0.log'})" in capsys.readouterr().out


def test_a_signal_is_forwarded_to_running_jobs(tmp_path):
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('up', flush=True)\n"
        "time.sleep(30)"
    )

    def send_signal():
        while not all((tmp_path / f"{n}.log").exists() and (tmp_path / f"{n}.log").read_text() for n in range(2)):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send_signal, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        run_jobs(python_jobs(tmp_path, [code] * 3), parallel=2)
    assert ended.value.code == 75
    assert time.monotonic() - start < 20
    assert not (tmp_path / "2.log").exists()


def test_ranks_of_a_launcher_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="Start this command with python, not with a launcher"):
        run_jobs(python_jobs(tmp_path, [""]), parallel=2)


@pytest.mark.parametrize("parallel, code, state", [(1, 75, "KILLED"), (2, 75, "KILLED"), (2, 1, "FAILED")])
def test_the_tracker_records_an_interrupted_table(parallel, code, state, tmp_path, monkeypatch):
    """With runs one after the other, and with several at a time."""
    states = []

    def exit_with_code(*_):
        raise SystemExit(code)

    class RecordingTracker:
        def finish(self, files, status="FINISHED", timeout_s=0):
            states.append(status)

    replacements = {"_run_row": exit_with_code, "run_jobs": exit_with_code}
    for name, function in (replacements | {"_start_tracker": lambda *_: RecordingTracker()}).items():
        monkeypatch.setattr(run, name, function)
    monkeypatch.setattr(run, "StopSignal", object)
    monkeypatch.setattr(run, "start_process_group", lambda: None)
    settings = run.AblationSettings("3", "nano", (0,), ("MAE",), "", "", "jsonl", None, "", parallel, True, "")
    with pytest.raises(SystemExit):
        run.ablate(tmp_path / "table", settings)
    assert states == [state]
