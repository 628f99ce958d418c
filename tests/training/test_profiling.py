"""A profiler trace of chosen steps, and snapshots of GPU memory on request."""

import gzip
import json
import os

import pytest
import ranks
import torch

from ddae.distributed.logs import configure_logging
from ddae.errors import UserError
from ddae.training import profiling
from ddae.training.profiling import REQUEST, MemorySnapshots, StepProfiler


def run_steps(profiler, start, end):
    for number in range(start + 1, end + 1):
        profiler.begin_step(number)
        torch.ones(4).sum()
        profiler.end_step(number)


def trace_names(file):
    return {event.get("name") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}


def test_a_run_writes_a_trace_of_the_steps_of_the_window(shards, tmp_path):
    options = ("--train.steps", "4", "--engine.precision", "fp32", "--train.profile_steps")
    args = ranks.arguments(shards, tmp_path / "run", 2, *options)
    code, output = ranks.run_command("launch/pretrain.py", *args, "3:5")
    assert code == 2, output
    assert "train.profile_steps is 3:5; expected FIRST:LAST with steps from 1 to 4, such as 2:4." in output
    code, output = ranks.run_command("launch/pretrain.py", *args, "2:3")
    assert code == 0, output
    (file,) = (tmp_path / "run" / "profile").iterdir()
    assert file.name == "rank_0_steps_2_3.json.gz"
    assert f"profile of steps 2 to 3: {file}" in output
    names = trace_names(file)
    assert {"step 2", "step 3", "aten::mm"} <= names
    assert names.isdisjoint({"step 1", "step 4"})


@pytest.mark.parametrize("steps", ["5", "5:", "0:3", "6:5", "5:11", "a:b", "-1:3", "1:2:3"])
def test_a_wrong_range_is_refused(steps, tmp_path):
    with pytest.raises(UserError, match=f"train.profile_steps is {steps}; expected FIRST:LAST with steps from 1 to 10"):
        StepProfiler(steps, 10, tmp_path)


def test_a_resumed_run_profiles_the_rest_of_the_window(tmp_path, capsys):
    configure_logging()
    run_steps(StepProfiler("2:4", 10, tmp_path), 2, 10)
    assert [file.name for file in (tmp_path / "profile").iterdir()] == ["rank_0_steps_3_4.json.gz"]
    StepProfiler("2:4", 10, tmp_path).warn_if_over(3)
    assert "no profile" not in capsys.readouterr().out
    StepProfiler("2:4", 10, tmp_path).warn_if_over(4)
    assert "steps 2 to 4 are over: no profile is written" in capsys.readouterr().out


def test_a_run_that_stops_within_the_window_writes_its_part(tmp_path):
    profiler = StepProfiler("2:9", 10, tmp_path)
    run_steps(profiler, 0, 5)
    profiler.close()
    profiler.close()  # as after the run has written it already
    assert [file.name for file in (tmp_path / "profile").iterdir()] == ["rank_0_steps_2_5.json.gz"]


def test_a_trace_that_cannot_be_written_is_logged(tmp_path, capsys):
    configure_logging()
    (tmp_path / "profile").write_text("a file")
    run_steps(StepProfiler("1:1", 10, tmp_path), 0, 2)
    assert "rank_0_steps_1_1.json.gz cannot be written (File exists)" in capsys.readouterr().out


@pytest.fixture
def clock(monkeypatch):
    """Let every step be later than the last one by more than the interval of checks."""
    monkeypatch.setattr(profiling, "CHECK_INTERVAL_S", -1.0)


def test_a_request_on_a_cpu_is_answered_by_one_line(clock, tmp_path, capsys):
    configure_logging()
    (tmp_path / REQUEST).touch()  # answered by an earlier start
    snapshots = MemorySnapshots(tmp_path)
    for number in range(1, 5):
        if number == 3:
            os.utime(tmp_path / REQUEST, ns=(number, number))
        snapshots.begin_step()
        snapshots.end_step(number)
    assert capsys.readouterr().out.count("this run is on a CPU, which has no snapshot of GPU memory") == 1
    assert not (tmp_path / "memory").exists()


def test_each_request_is_one_snapshot_of_one_step(clock, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(profiling, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda file: calls.append(file))
    snapshots = MemorySnapshots(tmp_path)
    for number in range(1, 7):
        if number in (2, 5):
            (tmp_path / REQUEST).touch()
            os.utime(tmp_path / REQUEST, ns=(number, number))
        snapshots.begin_step()
        snapshots.end_step(number)
    files = [str(tmp_path / "memory" / f"rank_0_step_{number}.pickle") for number in (2, 5)]
    record, stop = {"max_entries": profiling.MAX_ALLOCATIONS}, {"enabled": None}
    assert calls == [record, files[0], stop, record, files[1], stop]
