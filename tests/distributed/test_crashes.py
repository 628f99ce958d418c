"""What is done to a run from outside, and what becomes of it: kills at any instant, damage, a rank that dies or hangs,
a link that is cut, a long life. Most are long: make test-faults."""

import contextlib
import json
import os
import random
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


def runs_on(process, seconds=120, since=None):
    """Whether a rank is still there; a failure where it has been waited for too long."""
    assert since is None or time.monotonic() < since + seconds, "waited too long"
    return psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE


def rows(run_dir, without=("time/", "throughput/", "system/")):
    return [
        {key: value for key, value in row.items() if not key.startswith(without)}
        for row in read_metrics(run_dir / "metrics.jsonl")
    ]


def state(run_dir, step):
    """All slices of a checkpoint, by file and name."""
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
def test_kill_9_twenty_times(count, shards, tmp_path, forks, record_result):
    """kill -9 at 20 instants, every other one inside a save, then resume: weights of an uninterrupted run."""
    steps, saves = 700, 7
    options = (*FP32, "--train.steps", str(steps), "--train.save_every", str(saves), "--train.watchdog_timeout_s", "20")
    whole = forks.start([PRETRAIN, *ranks.arguments(shards, tmp_path / "whole", 2, *options)], count)
    assert [forks.wait(rank) for rank in whole] == [0] * count, forks.log()
    words, chance, inside = ranks.arguments(shards, tmp_path / "killed", 2, *options), random.Random(count), 0
    for kill in range(20):
        before = len(rows(tmp_path / "killed"))
        kill_at = chance.randrange(1, 30) if kill % 2 else 0
        started = forks.start([PRETRAIN, *words], count, kill_at)
        if not kill_at:
            since = time.monotonic()
            while len(rows(tmp_path / "killed")) <= before and runs_on(started[0], since=since):
                time.sleep(0.01)
            time.sleep(chance.random())
            for rank in started:
                os.kill(rank, signal.SIGKILL)
        codes = [forks.wait(rank) for rank in started]
        assert -signal.SIGKILL in codes, (codes, forks.log())
        assert 0 not in codes
        assert "holds only damaged" not in forks.log()
        inside += bool(kill_at)
    left = [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()]
    started = forks.start([PRETRAIN, *words], count)
    assert [forks.wait(rank) for rank in started] == [0] * count, forks.log()
    assert "skipping checkpoint" not in forks.log()  # nothing half-written ever had a checkpoint's name
    assert_same_run(tmp_path / "whole", tmp_path / "killed", steps)
    assert not list((tmp_path / "killed" / "checkpoints").glob(".unfinished*")), left
    record_result(f"20 of 20 resumed without intervention, {inside} killed inside a save; identical weights")


@pytest.mark.reliability
@pytest.mark.parametrize("whom", ["kill", "stop"])
def test_one_rank_that_is_gone_ends_all(whom, shards, tmp_path, forks, record_result):
    """One of two ranks is killed, or hangs (SIGSTOP), watchdog timeout 15 s: the other exits, and both resume."""
    options = (*FP32, "--train.steps", "4000", "--train.save_every", "50", "--train.watchdog_timeout_s", "15")
    words = ranks.arguments(shards, tmp_path / "run", 1, *options)
    started, since = forks.start([PRETRAIN, *words], 2), time.monotonic()
    while len(rows(tmp_path / "run")) < 60:
        assert runs_on(started[0], since=since), forks.log()
        time.sleep(0.05)
    os.kill(started[1], signal.SIGKILL if whom == "kill" else signal.SIGSTOP)
    since = time.monotonic()
    code = forks.wait(started[0])
    waited = time.monotonic() - since
    if whom == "stop":
        assert code == 70, forks.log()
        assert "ddae: rank 0 on" in forks.log()
        assert "made no progress for 15 s" in forks.log()
        assert "train.py" in (tmp_path / "run" / "heartbeats" / "rank_00000.txt").read_text()
        beat = json.loads((tmp_path / "run" / "heartbeats" / "rank_00000.json").read_text())
        assert beat["step"] >= 50
        assert beat["pid"] == started[0]
        os.kill(started[1], signal.SIGKILL)
    else:  # the kernel closes a dead rank's connections; where nobody tells, it is as with one that hangs
        assert (code == 1 and "by peer" in forks.log()) or code == 70, forks.log()
    forks.wait(started[1])
    started, since = forks.start([PRETRAIN, *words], 2), time.monotonic()
    while "steps" not in forks.log():
        assert runs_on(started[0], since=since), forks.log()
        time.sleep(0.05)
    assert "steps 50 to 4000" in forks.log() or "steps 100 to 4000" in forks.log()
    for rank in started:
        os.kill(rank, signal.SIGTERM)
    assert [forks.wait(rank) for rank in started] == [75, 75]
    record_result(f"the other exited {waited:.0f} s later with code 70 and its stacks; both resumed")


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
    return max(folder.glob("step_*"))


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture(scope="module")
def saved(shards, tmp_path_factory):
    """A run of two ranks with checkpoints after 8, 16 and 24 of 32 steps, as a kill leaves it, and its words."""
    run = tmp_path_factory.mktemp("saved") / "run"
    options = (*FP32, "--train.steps", "32", "--train.save_every", "8", "--train.keep", "4")
    words = ranks.arguments(shards, run, 2, *options)
    ranks.run_all(2, [words])
    shutil.rmtree(run / "checkpoints" / "step_00000032")
    (run / "checkpoints" / "latest").write_text("step_00000024")
    (run / "finished.json").unlink()
    return run, words


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.replace("`", ""))
def test_damage_is_seen(damage, saved, tmp_path, forks, record_result):
    """A damaged checkpoint."""
    run, words = saved
    shutil.copytree(run, tmp_path / "run")
    DAMAGE[damage](tmp_path / "run" / "checkpoints")
    words = [str(tmp_path / "run") if word == str(run) else word for word in words]
    started = forks.start([PRETRAIN, *words], 2)
    codes = [forks.wait(rank) for rank in started]
    said = forks.log()
    if damage.startswith("all"):
        assert codes == [2, 2], said
        assert "holds only damaged checkpoints" in said
        assert not (tmp_path / "run" / "finished.json").exists()
        record_result("refused with exit code 2: only damaged checkpoints, --allow_restart trains from the start")
        return
    assert codes == [0, 0], said
    assert rows(tmp_path / "run") == rows(run)
    if "latest" in damage:
        assert "steps 24 to 32" in said
        record_result("resumed from step 24, the newest complete one; same losses")
    else:
        (reason,) = [line.split(": ", 1)[1] for line in said.splitlines() if "skipping checkpoint" in line]
        assert "steps 16 to 32" in said
        record_result(f"resumed from step 16, because in step 24 {reason}; same losses")


@pytest.mark.faults
@pytest.mark.parametrize(
    "more, refusal",
    [
        (["--model.width", "64"], "was started with model.width = 32, not 64"),
        (["--preset", "demo", "--dynamic.rescale_grad", "detach"], "was started with dynamic.rescale_grad"),
        (["--data.train", "{other}"], "was trained on other shards than data.train"),
    ],
)
def test_another_runs_checkpoint_is_refused(more, refusal, saved, tmp_path, forks, record_result):
    """A run directory of another model, preset or data set."""
    from conftest import make_shards

    run, words = saved
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "other").mkdir()
    make_shards(tmp_path / "other", start=500)
    words = [str(tmp_path / "run") if word == str(run) else word for word in words]
    if more[0] == "--preset":
        words = words[2:]
    elif more[0] == "--model.width":
        at = words.index("--model.width")
        words = words[:at] + words[at + 2 :]
    elif more[0] == "--data.train":
        at = words.index("--data.train")
        words = words[:at] + words[at + 2 :]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").rglob("*")}
    started = forks.start([PRETRAIN, *words, *(each.format(other=tmp_path / "other") for each in more)], 2)
    assert [forks.wait(rank) for rank in started] == [2, 2], forks.log()
    assert refusal in forks.log()
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").rglob("*")}
    record_result(f"refused with exit code 2: {refusal}")


@pytest.mark.faults
def test_three_hundred_steps_keep_nothing(shards, tmp_path, forks, record_result):
    """300 steps with a save every 10: resident memory, open files and shared memory do not grow."""
    options = ("--train.steps", "400", "--train.save_every", "10", "--data.workers", "1", *FP32)
    started = forks.start([PRETRAIN, *ranks.arguments(shards, tmp_path / "run", 2, *options)], 2)
    process, seen = psutil.Process(started[0]), {}
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        step = len(rows(tmp_path / "run"))
        if step // 20 not in seen and 80 <= step <= 390:
            shared = sum(each.stat().st_size for each in Path("/dev/shm").iterdir() if each.is_file())
            seen[step // 20] = (process.memory_info().rss / 2**20, process.num_fds(), shared / 2**20)
        time.sleep(0.02)
    assert [forks.wait(rank) for rank in started] == [0, 0], forks.log()
    assert len(seen) >= 14
    early, late = (torch.tensor([seen[key] for key in keys]).median(0).values.tolist() for keys in halves(seen))
    memory, files, shared = (after - before for before, after in zip(early, late, strict=True))
    assert memory < 8, seen
    assert files <= 1, seen  # a save under way has some open
    assert abs(shared) < 1, seen
    record_result(
        f"resident memory {memory:+.1f} MiB of {early[0]:.0f}, open files {files:+.0f}, shared memory {shared:+.1f} MiB"
    )


def halves(seen):
    keys = sorted(seen)
    return keys[: len(keys) // 2], keys[len(keys) // 2 :]


@pytest.mark.faults
def test_what_a_save_costs(shards, tmp_path, forks, record_result):
    """Size and duration of a checkpoint of ViT-S (two ranks, ZeRO-2, bf16)."""
    words = ranks.arguments(
        shards, tmp_path / "run", 2, "--train.steps", "8", "--train.save_every", "2", "--train.keep", "1"
    )
    size = "--preset ddae_vit_s16_100e --model.image_size 32 --data.batch_size 4 --data.backend pillow --data.workers 0"
    own = "--tracker.kind jsonl --train.no_report --train.log_every 1".split()
    kept = words[words.index("--data.train") :]
    started = forks.start([PRETRAIN, *size.split(), *own, *kept], 2)
    assert [forks.wait(rank) for rank in started] == [0, 0], forks.log()
    seconds = sorted(row["time/save"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["time/save"])
    (folder,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    size_of = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    median = seconds[len(seconds) // 2]
    record_result(f"{size_of:.0f} MiB on disk, training pauses for {median:.1f} s: {size_of / median:.0f} MiB/s")


def needs_namespaces():
    """Why two hosts cannot be made here; empty where they can."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    done = subprocess.run(["ip", "netns", "add", "ddae_probe"], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"no network namespace can be made: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", "ddae_probe"], check=False)
    return ""


@pytest.fixture
def hosts():
    """Two network namespaces with an address each, joined by a cable."""
    if reason := needs_namespaces():
        pytest.skip(reason)

    def ip(*words):
        subprocess.run(["ip", *words], check=True)

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
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for process in found.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.mark.faults
def test_two_hosts_whose_link_is_cut(hosts, shards, tmp_path, record_result):
    """Two hosts (network namespaces), deepspeed --hostfile --no_ssh: the link is cut, both exit, both resume."""
    limit = 15
    (tmp_path / "hosts").write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    options = (*FP32, "--train.steps", "3000", "--train.save_every", "20", "--train.watchdog_timeout_s", str(limit))
    words = ranks.arguments(shards, tmp_path / "run", 2, *options)
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": "ddae0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ranks.ROOT}:{ranks.ROOT / 'kernels'}",
    }

    def start():
        both = []
        for number, host in enumerate(hosts):
            where = ["--hostfile", tmp_path / "hosts", "--no_ssh", "--node_rank", str(number)]
            meet = ["--master_addr", "10.77.0.1", "--master_port", "29577"]
            command = ["ip", "netns", "exec", host, "deepspeed", *where, *meet, "launch/pretrain.py", *words]
            log = open(tmp_path / f"host_{number}.log", "w")  # noqa: SIM115 - its process holds it
            both.append(subprocess.Popen(command, env=environment, cwd=ranks.ROOT, stdout=log, stderr=log))
        return both

    def wait_for(count, both):
        deadline = time.monotonic() + 400
        while len(rows(tmp_path / "run")) < count:
            assert all(each.poll() is None for each in both), (tmp_path / "host_0.log").read_text()[-3000:]
            assert time.monotonic() < deadline, (tmp_path / "host_0.log").read_text()[-3000:]
            time.sleep(0.1)

    both = start()
    wait_for(50, both)
    trained = [rank for each in both for rank in ranks.rank_processes(each.pid)]
    assert len(trained) == 2, trained
    subprocess.run(["ip", "-n", hosts[1], "link", "set", "ddae0", "down"], check=True)
    since = time.monotonic()
    _, alive = psutil.wait_procs(trained, timeout=120)
    assert not alive, (tmp_path / "host_0.log").read_text()[-3000:]
    ended = time.monotonic() - since
    codes = [each.wait(timeout=120) for each in both]
    waited = time.monotonic() - since
    assert 0 not in codes
    done = len(rows(tmp_path / "run"))
    subprocess.run(["ip", "-n", hosts[1], "link", "set", "ddae0", "up"], check=True)
    both = start()
    wait_for(done + 5, both)
    assert f"steps {done // 20 * 20} to 3000" in (tmp_path / "host_0.log").read_text()
    for each in both:
        for rank in ranks.rank_processes(each.pid):
            rank.send_signal(signal.SIGTERM)
    for each in both:
        each.wait(timeout=120)
    assert json.loads((tmp_path / "run" / "stopped.json").read_text())["step"] > done
    steps = [row["step"] for row in rows(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))
    record_result(f"timeout {limit} s: ranks exited {ended:.0f} s after the cut, launchers {waited:.0f} s; resumed")
