"""Failures of a run: kills at any instant, damaged checkpoints, dead or hanging ranks, a cut link, leaks in long runs.

Most tests are long: make test-faults.
"""

import contextlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import ranks
import torch
from safetensors.torch import load_file

from ddae.training.tracker import read_metrics

FP32 = ("--engine.precision", "fp32")
PRETRAIN = "launch/pretrain.py"


@pytest.fixture
def forks():
    return ranks.forks()


def is_running(process, since, seconds=240):
    """Return whether a rank is still running. Fail `seconds` after `since`."""
    assert time.monotonic() < since + seconds, "waited too long"
    return psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE


def rows(run_dir, without=("time/", "throughput/", "system/")):
    """Return a run's rows without the metrics that differ from run to run."""
    return [
        {key: value for key, value in row.items() if not key.startswith(without)}
        for row in read_metrics(run_dir / "metrics.jsonl")
    ]


def state(run_dir, step):
    """Return all tensors of a checkpoint, by file and name."""
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    return {(file.name, key): v for file in sorted(folder.glob("rank_*")) for key, v in load_file(file).items()}


def assert_same_run(one, other, step):
    assert rows(one) == rows(other)
    a, b = state(one, step), state(other, step)
    assert a.keys() == b.keys()
    assert len(a) > 0
    for key, values in a.items():
        assert torch.equal(values, b[key]), key


@pytest.mark.faults
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("saving", ["no_async_save", "async_save"])
def test_kill_9_twenty_times(saving, count, shards, tmp_path, forks, record_result):
    """kill -9 at 20 instants, every other one inside a save, then resume: weights of an uninterrupted run."""
    steps, saves = 700, 7
    options = (*FP32, "--train.steps", str(steps), "--train.save_every", str(saves), "--train.watchdog_timeout_s", "20")
    options += (f"--train.{saving}",)
    processes = forks.start([PRETRAIN, *ranks.arguments(shards, tmp_path / "uninterrupted", 2, *options)], count)
    assert [forks.wait(rank) for rank in processes] == [0] * count, forks.log()
    command, rng = [PRETRAIN, *ranks.arguments(shards, tmp_path / "killed", 2, *options)], random.Random(count)
    killed_in_save = 0
    for kill in range(20):
        before = len(rows(tmp_path / "killed"))
        kill_at = rng.randrange(1, 30) if kill % 2 else 0
        processes = forks.start(command, count, kill_at)
        if not kill_at:
            since = time.monotonic()
            while len(rows(tmp_path / "killed")) <= before and is_running(processes[0], since):
                time.sleep(0.01)
            time.sleep(rng.random())
            for rank in processes:
                os.kill(rank, signal.SIGKILL)
        codes = [forks.wait(rank) for rank in processes]
        assert -signal.SIGKILL in codes, (codes, forks.log())
        assert 0 not in codes
        assert "holds only damaged" not in forks.log()
        killed_in_save += bool(kill_at)
    folders = [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()]
    processes = forks.start(command, count)
    assert [forks.wait(rank) for rank in processes] == [0] * count, forks.log()
    assert "skipping checkpoint" not in forks.log()  # an incomplete checkpoint never has a checkpoint's name
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "killed", steps)
    assert not list((tmp_path / "killed" / "checkpoints").glob(".unfinished*")), folders
    record_result(f"20 of 20 resumed without intervention, {killed_in_save} killed inside a save; identical weights")


@pytest.mark.reliability
@pytest.mark.parametrize("failure", ["kill", "stop"])
def test_a_dead_or_hanging_rank_ends_the_job(failure, shards, tmp_path, forks, record_result):
    """One of two ranks is killed, or hangs (SIGSTOP), watchdog timeout 15 s: the other exits, and both resume."""
    options = (*FP32, "--train.steps", "4000", "--train.save_every", "50", "--train.watchdog_timeout_s", "15")
    command = [PRETRAIN, *ranks.arguments(shards, tmp_path / "run", 1, *options)]
    processes, since = forks.start(command, 2), time.monotonic()
    while len(rows(tmp_path / "run")) < 60:
        assert is_running(processes[0], since), forks.log()
        time.sleep(0.05)
    os.kill(processes[1], signal.SIGKILL if failure == "kill" else signal.SIGSTOP)
    since = time.monotonic()
    code = forks.wait(processes[0])
    waited = time.monotonic() - since
    if failure == "stop":
        assert code == 70, forks.log()
        assert "ddae: rank 0 on" in forks.log()
        assert "made no progress for 15 s" in forks.log()
        assert "train.py" in (tmp_path / "run" / "heartbeats" / "rank_00000.txt").read_text()
        beat = json.loads((tmp_path / "run" / "heartbeats" / "rank_00000.json").read_text())
        assert beat["step"] >= 50
        assert beat["pid"] == processes[0]
        trace = pickle.loads((tmp_path / "run" / "heartbeats" / "collectives_0").read_bytes())
        last = trace["entries"][-1]  # the one that rank 1 has not joined: a step reduces gradients, gathers weights
        assert last["profiling_name"] in ("gloo:all_reduce", "gloo:all_gather", "gloo:_allgather_base")
        assert any(frame["filename"].endswith("train.py") for frame in last["frames"])
        os.kill(processes[1], signal.SIGKILL)
    else:  # the kernel closes a dead rank's connections; if this goes unnoticed, the watchdog ends the other rank
        assert code == 70, forks.log()
        assert "the connection to another rank is lost" in forks.log() or "made no progress" in forks.log()
        assert "Traceback" not in forks.log()
    forks.wait(processes[1])
    processes, since = forks.start(command, 2), time.monotonic()
    while "steps" not in forks.log():
        assert is_running(processes[0], since), forks.log()
        time.sleep(0.05)
    assert "steps 50 to 4000" in forks.log() or "steps 100 to 4000" in forks.log()
    for rank in processes:
        os.kill(rank, signal.SIGTERM)
    assert [forks.wait(rank) for rank in processes] == [75, 75]
    record_result(f"the other exited {waited:.0f} s later with code {code}; both resumed")


DAMAGE = {
    "`latest` is empty": lambda folder: (folder / "latest").write_text(""),
    "`latest` is gone": lambda folder: (folder / "latest").unlink(),
    "`latest` names a missing folder": lambda folder: (folder / "latest").write_text("step_00009999"),
    "a file of slices is truncated": lambda folder: os.truncate(newest(folder) / "rank_00001.safetensors", 1000),
    "a file of slices is missing": lambda folder: (newest(folder) / "rank_00000.safetensors").unlink(),
    "one bit of a file of slices is flipped": lambda folder: flip(newest(folder) / "rank_00001.safetensors"),
    "one bit of the state is flipped": lambda folder: flip(newest(folder) / "state.pt"),
    "the manifest is empty": lambda folder: (newest(folder) / "manifest.json").write_text(""),
    "all files are truncated": lambda folder: [os.truncate(each, 9) for each in folder.glob("step_*/rank_00000*")],
}


def newest(folder):
    """Return the newest checkpoint of a folder."""
    return max(folder.glob("step_*"))


def flip(file):
    """Flip one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture(scope="module")
def saved(shards, tmp_path_factory):
    """Return a run of two ranks with checkpoints of steps 8, 16 and 24 of 32, as after a kill, and its arguments."""
    run = tmp_path_factory.mktemp("saved") / "run"
    options = (*FP32, "--train.steps", "32", "--train.save_every", "8", "--train.keep", "4")
    args = ranks.arguments(shards, run, 2, *options)
    ranks.run_all(2, [args])
    shutil.rmtree(run / "checkpoints" / "step_00000032")
    (run / "checkpoints" / "latest").write_text("step_00000024")
    (run / "finished.json").unlink()
    return run, args


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.replace("`", ""))
def test_damaged_checkpoints_are_detected(damage, saved, tmp_path, forks, record_result):
    """A damaged checkpoint."""
    run, args = saved
    shutil.copytree(run, tmp_path / "run")
    DAMAGE[damage](tmp_path / "run" / "checkpoints")
    processes = forks.start([PRETRAIN, *args, "--run_dir", str(tmp_path / "run")], 2)
    codes = [forks.wait(rank) for rank in processes]
    log = forks.log()
    if damage.startswith("all"):
        assert codes == [2, 2], log
        assert "holds only damaged checkpoints" in log
        assert not (tmp_path / "run" / "finished.json").exists()
        record_result("refused with exit code 2: only damaged checkpoints, --allow_restart trains from the start")
        return
    assert codes == [0, 0], log
    assert rows(tmp_path / "run") == rows(run)
    if "latest" in damage:
        assert "steps 24 to 32" in log
        record_result("resumed from step 24, the newest complete one; same losses")
    else:
        (reason,) = re.findall(r"skipping checkpoint \S+: (.*)", log)
        assert "steps 16 to 32" in log
        record_result(f"resumed from step 16, because in step 24 {reason}; same losses")


@pytest.mark.faults
@pytest.mark.parametrize(
    "more, message",
    [
        (["--model.width", "64"], "was started with model.width = 32, not 64"),
        (["--dynamic.rescale_grad", "detach"], "was started with dynamic.rescale_grad"),
        (["--data.train", "{other}"], "was trained on other shards than data.train"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(more, message, saved, tmp_path, forks, record_result):
    """A run directory of another model, preset or data set."""
    from conftest import make_shards

    run, args = saved
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "other").mkdir()
    make_shards(tmp_path / "other", start=500)
    more = [each.format(other=tmp_path / "other") for each in more]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").rglob("*")}
    processes = forks.start([PRETRAIN, *args, "--run_dir", str(tmp_path / "run"), *more], 2)
    assert [forks.wait(rank) for rank in processes] == [2, 2], forks.log()
    assert message in forks.log()
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").rglob("*")}
    record_result(f"refused with exit code 2: {message}")


@pytest.mark.faults
def test_memory_and_open_files_do_not_grow(shards, tmp_path, forks, record_result):
    """300 steps with a save every 10: resident memory, open files and shared memory do not grow."""
    options = ("--train.steps", "400", "--train.save_every", "10", "--data.workers", "1", *FP32)
    processes = forks.start([PRETRAIN, *ranks.arguments(shards, tmp_path / "run", 2, *options)], 2)
    process, usage = psutil.Process(processes[0]), {}
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        step = len(rows(tmp_path / "run"))
        if step // 20 not in usage and 80 <= step <= 390:
            shared = sum(each.stat().st_size for each in Path("/dev/shm").iterdir() if each.is_file())
            usage[step // 20] = (process.memory_info().rss / 2**20, process.num_fds(), shared / 2**20)
        time.sleep(0.02)
    assert [forks.wait(rank) for rank in processes] == [0, 0], forks.log()
    assert len(usage) >= 14
    values = torch.tensor([usage[key] for key in sorted(usage)])
    early, late = (half.median(0).values.tolist() for half in values.tensor_split([len(values) // 2]))
    memory, files, shared = (after - before for before, after in zip(early, late, strict=True))
    assert memory < 8, usage  # MiB
    assert files <= 1, usage  # a save in progress has some open
    assert abs(shared) < 1, usage  # MiB
    record_result(
        f"resident memory {memory:+.1f} MiB of {early[0]:.0f}, open files {files:+.0f}, shared memory {shared:+.1f} MiB"
    )


@pytest.mark.faults
def test_size_and_duration_of_a_checkpoint(shards, tmp_path, forks, record_result):
    """Size and duration of a checkpoint of ViT-S (two ranks, ZeRO-2, bf16)."""
    options = ("--train.steps", "8", "--train.save_every", "2", "--train.keep", "1")
    args = ranks.arguments(shards, tmp_path / "run", 2, *options)
    settings = (
        "--preset ddae_vit_s16_100e --model.image_size 32 --data.batch_size 4 --data.backend pillow --data.workers 0"
    )
    settings += " --tracker.kind jsonl --train.no_report --train.log_every 1"
    processes = forks.start([PRETRAIN, *settings.split(), *args[len(ranks.NANO) :]], 2)
    assert [forks.wait(rank) for rank in processes] == [0, 0], forks.log()
    seconds = sorted(row["time/save"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["time/save"])
    (folder,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    median = seconds[len(seconds) // 2]
    record_result(f"{size:.0f} MiB on disk, training pauses for {median:.1f} s: {size / median:.0f} MiB/s")


def missing_namespaces():
    """Return why network namespaces cannot be created here; "" if they can."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    process = subprocess.run(["ip", "netns", "add", "ddae_probe"], capture_output=True, text=True, check=False)
    if process.returncode:
        return f"network namespaces cannot be created: {process.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", "ddae_probe"], check=False)
    return ""


@pytest.fixture
def hosts():
    """Create two network namespaces with one address each, connected by a veth pair. Return their names."""
    if reason := missing_namespaces():
        pytest.skip(reason)

    def ip(*args):
        subprocess.run(["ip", *args], check=True)

    names = [f"ddae{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "ddae0", "netns", names[0], "type", "veth", "peer", "name", "ddae0", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "ddae0")
            ip("-n", name, "link", "set", "ddae0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for process in listed.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.mark.faults
def test_a_cut_link_between_two_hosts(hosts, shards, tmp_path, record_result):
    """Two hosts (network namespaces), deepspeed --hostfile --no_ssh: the link is cut, both exit, both resume."""
    limit = 15
    (tmp_path / "hosts").write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    options = (*FP32, "--train.steps", "3000", "--train.save_every", "20", "--train.watchdog_timeout_s", str(limit))
    args = ranks.arguments(shards, tmp_path / "run", 2, *options)
    env = os.environ | {
        "GLOO_SOCKET_IFNAME": "ddae0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ranks.ROOT}:{ranks.ROOT / 'kernels'}",
    }

    def start():
        launchers = []
        for number, host in enumerate(hosts):
            node = ["--hostfile", tmp_path / "hosts", "--no_ssh", "--node_rank", str(number)]
            rendezvous = ["--master_addr", "10.77.0.1", "--master_port", "29577"]
            command = ["ip", "netns", "exec", host, "deepspeed", *node, *rendezvous, "launch/pretrain.py", *args]
            with open(tmp_path / f"host_{number}.log", "w") as log:
                launchers.append(subprocess.Popen(command, env=env, cwd=ranks.ROOT, stdout=log, stderr=log))
        return launchers

    def wait_for_rows(count, launchers):
        deadline = time.monotonic() + 400
        while len(rows(tmp_path / "run")) < count:
            assert all(each.poll() is None for each in launchers), (tmp_path / "host_0.log").read_text()[-3000:]
            assert time.monotonic() < deadline, (tmp_path / "host_0.log").read_text()[-3000:]
            time.sleep(0.1)

    launchers = start()
    wait_for_rows(50, launchers)
    processes = [rank for each in launchers for rank in ranks.rank_processes(each.pid)]
    assert len(processes) == 2, processes
    subprocess.run(["ip", "-n", hosts[1], "link", "set", "ddae0", "down"], check=True)
    since = time.monotonic()
    _, alive = psutil.wait_procs(processes, timeout=120)
    assert not alive, (tmp_path / "host_0.log").read_text()[-3000:]
    ranks_exited = time.monotonic() - since
    codes = [each.wait(timeout=120) for each in launchers]
    launchers_exited = time.monotonic() - since
    assert 0 not in codes
    num_rows = len(rows(tmp_path / "run"))
    subprocess.run(["ip", "-n", hosts[1], "link", "set", "ddae0", "up"], check=True)
    launchers = start()
    wait_for_rows(num_rows + 5, launchers)
    assert f"steps {num_rows // 20 * 20} to 3000" in (tmp_path / "host_0.log").read_text()
    for each in launchers:
        for rank in ranks.rank_processes(each.pid):
            rank.send_signal(signal.SIGTERM)
    for each in launchers:
        each.wait(timeout=120)
    assert json.loads((tmp_path / "run" / "stopped.json").read_text())["step"] > num_rows
    steps = [row["step"] for row in rows(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))
    exits = f"ranks exited {ranks_exited:.0f} s after the cut, launchers {launchers_exited:.0f} s"
    record_result(f"timeout {limit} s: {exits}; resumed")
