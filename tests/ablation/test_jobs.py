"""Several commands at a time: how many, whose GPU, what becomes of one that fails, and of all when told to stop."""

import os
import signal
import sys
import threading
import time

import pytest

from ddae.ablation import jobs as packed
from ddae.ablation import run as ablate
from ddae.ablation.jobs import Job, run_packed
from ddae.errors import UserError


@pytest.fixture(autouse=True)
def signals(monkeypatch):
    """As they were before; no launcher has started these tests."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def jobs(folder, codes):
    """One a piece of Python, which is given the number of its job."""
    return [Job(f"job {n}", [sys.executable, "-c", code, str(n)], folder / f"{n}.log") for n, code in enumerate(codes)]


@pytest.mark.parametrize("shown", ["", "5,7"])
def test_so_many_at_a_time_share_gpus_and_processors(shown, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packed.torch.cuda, "device_count", lambda: 2)
    if shown:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    code = (
        "import os, time; print(time.time()); time.sleep(0.6); "
        "print(time.time(), os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'])"
    )
    run_packed(jobs(tmp_path, [code] * 4), parallel=2)
    said = [(tmp_path / f"{n}.log").read_text().split() for n in range(4)]
    spans = [(float(start), float(end)) for start, end, *_ in said]
    at_once = max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)
    assert at_once == 2
    gpus = shown.split(",") if shown else ["0", "1"]
    assert [gpu for *_, gpu, _ in said][:2] == gpus
    assert sorted(gpu for *_, gpu, _ in said) == sorted(gpus * 2)
    assert {int(threads) for *_, threads in said} == {max(1, len(os.sched_getaffinity(0)) // 2)}
    assert capsys.readouterr().out.count("--- job ") == 4


def test_one_that_fails_lets_the_running_ones_end_and_starts_no_more(tmp_path, capsys):
    codes = ["print('no data'); raise SystemExit(3)", "import time; time.sleep(1); print('whole')", "print('never')"]
    with pytest.raises(SystemExit) as ended:
        run_packed(jobs(tmp_path, codes), parallel=2)
    assert ended.value.code == 3
    assert (tmp_path / "1.log").read_text() == "whole\n"
    assert not (tmp_path / "2.log").exists()
    assert f"job 0 ended with code 3: no data ({tmp_path / '0.log'})" in capsys.readouterr().out


def test_told_to_stop_it_tells_them_and_waits(tmp_path):
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('up', flush=True)\n"
        "time.sleep(30)"
    )

    def tell():
        while not all((tmp_path / f"{n}.log").exists() and (tmp_path / f"{n}.log").read_text() for n in range(2)):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=tell, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        run_packed(jobs(tmp_path, [code] * 3), parallel=2)
    assert ended.value.code == 75
    assert time.monotonic() - start < 20
    assert not (tmp_path / "2.log").exists()


def test_ranks_of_a_launcher_do_not_pack(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="start it with python, not with a launcher"):
        run_packed(jobs(tmp_path, [""]), parallel=2)


@pytest.mark.parametrize("parallel, code, state", [(1, 75, "KILLED"), (2, 75, "KILLED"), (2, 1, "FAILED")])
def test_a_table_that_is_stopped_says_so_in_the_tracker(parallel, code, state, tmp_path, monkeypatch):
    """Whether its runs come one after the other or several at a time."""
    told = []

    def ends(*_):
        raise SystemExit(code)

    class Noted:
        def finish(self, files, status="FINISHED", timeout_s=0):
            told.append(status)

    for name, instead in {"_run": ends, "run_packed": ends, "_table_run": lambda *_: Noted()}.items():
        monkeypatch.setattr(ablate, name, instead)
    monkeypatch.setattr(ablate, "Stop", object)
    monkeypatch.setattr(ablate, "start_process_group", lambda: None)
    settings = ablate.Settings("3", "nano", (0,), ("MAE",), "", "", "jsonl", None, "", parallel, True)
    with pytest.raises(SystemExit):
        ablate.ablate(tmp_path / "table", settings)
    assert told == [state]
