"""Which checkpoint a run resumes from."""

import errno
import hashlib
import json
import shutil
import threading

import pytest
import ranks
import torch

from ddae import atomic
from ddae.distributed import checkpoint, checkpoint_format
from ddae.distributed.checkpoint import FORMAT, Background, Checkpoints
from ddae.distributed.checkpoint_format import MANIFEST
from ddae.distributed.logs import configure_logging
from ddae.errors import UserError


def make(folder, step, format=FORMAT):
    """Write a complete checkpoint of two files with 100 zero bytes each."""
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    files = ("state.pt", "rank_00000.safetensors")
    for name in files:
        (path / name).write_bytes(bytes(100))
    entry = {"bytes": 100, "sha256": hashlib.sha256(bytes(100)).hexdigest()}
    manifest = {"format": format, "step": step, "ranks": 1, "files": dict.fromkeys(files, entry)}
    (path / MANIFEST).write_text(json.dumps(manifest))
    return path


def test_a_new_run_has_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path / "checkpoints", 3).newest(allow_restart=False) is None


def test_the_newest_checkpoint_is_used(tmp_path):
    for step in (5, 100, 20):
        make(tmp_path, step)
    (tmp_path / ".unfinished_00000200").mkdir()
    newest = Checkpoints(tmp_path, 3).newest(False)
    assert (newest.step, newest.path.name) == (100, "step_00000100")


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda path: (path / "state.pt").unlink(), "state.pt is missing"),
        (lambda path: (path / "state.pt").write_bytes(bytes(40)), "state.pt has 40 of 100 bytes"),
        (lambda path: (path / "state.pt").write_bytes(bytes(99) + b"\1"), "state.pt has changed"),
        (lambda path: (path / MANIFEST).unlink(), "manifest cannot be read"),
        (lambda path: (path / MANIFEST).write_text('{"step": 1'), "manifest cannot be read"),
        (lambda path: (path / MANIFEST).write_text("[]"), "manifest cannot be read"),
        (lambda path: (path / MANIFEST).write_text("{}"), "manifest cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_and_logged(damage, reason, tmp_path, capsys):
    configure_logging()
    make(tmp_path, 10)
    damage(make(tmp_path, 20))
    assert Checkpoints(tmp_path, 3).newest(False).step == 10
    log = capsys.readouterr().out
    assert reason in log
    assert "step_00000020" in log


def test_a_run_with_only_damaged_checkpoints_is_refused(tmp_path):
    (make(tmp_path, 10) / "state.pt").unlink()
    checkpoints = Checkpoints(tmp_path, 3)
    with pytest.raises(UserError, match="--allow_restart"):
        checkpoints.newest(allow_restart=False)
    assert checkpoints.newest(allow_restart=True) is None


def test_a_checkpoint_of_version_0_1_is_refused(tmp_path):
    make(tmp_path, 10, format=None)
    with pytest.raises(UserError, match=r"was written by another version of ddae; this one reads format 2\."):
        Checkpoints(tmp_path, 3).newest(allow_restart=True)


def test_other_folders_beside_checkpoints_are_ignored(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1)
    for name in ("step_00000010_best", "step_x", "steps"):
        (tmp_path / name).mkdir()
    make(tmp_path, 10)
    assert checkpoints.newest(False).step == 10
    checkpoints.quarantine_after(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("broken_step_00000010", "step_00000010_best", "step_x", "steps")
    ]


def test_damaged_checkpoints_do_not_accumulate(tmp_path):
    checkpoints = Checkpoints(tmp_path, 3)
    make(tmp_path, 10)
    for step in (20, 30):
        make(tmp_path, step)
        checkpoints.quarantine_after(10)
        checkpoints.quarantine_after(10)  # by a start that finds nothing more to rename
        assert [path.name for path in tmp_path.glob("broken_*")] == [f"broken_step_{step:08d}"]


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
    make(tmp_path, 10)
    make(tmp_path, 20)
    hashed = checkpoint_format.sha256

    def denied(file):
        if "step_00000020" in str(file):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return hashed(file)

    monkeypatch.setattr(checkpoint_format, "sha256", denied)
    with pytest.raises(UserError, match=r"step_00000020: no permission to read state\.pt\. Give this user permission"):
        Checkpoints(tmp_path, 3).newest(False)


class Weights:
    sharded = False

    def __init__(self, values):
        self.values = torch.tensor(values)

    def local_shards(self):
        return {"weight": [checkpoint_format.TensorShard("x", 0, self.values)]}

    def sync_model_weights(self):
        pass


def test_files_have_the_permissions_of_the_umask(tmp_path):
    checkpoints = Checkpoints(tmp_path, 3)
    assert checkpoints.save(1, {"module": Weights([1.0])})
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "step_00000001").iterdir()}
    assert modes == dict.fromkeys(("rank_00000.safetensors", "state.pt", "manifest.json"), 0o666 & ~atomic.UMASK)


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    checkpoints, parts = Checkpoints(tmp_path, 3), {"module": Weights([1.0, float("nan")])}
    with pytest.raises(UserError, match=r"weight/x is not finite after step 7, so that no checkpoint was written"):
        checkpoints.save(7, parts)
    assert list(tmp_path.iterdir()) == []
    assert checkpoints.save(7, parts, allow_non_finite=True)


class SlowDisk:
    """Writes of slices that wait until they are released; the n-th of `failing` fails."""

    def __init__(self, monkeypatch, failing=()):
        self.write, self.failing, self.count, self.released = checkpoint._write_shards, failing, 0, threading.Event()
        monkeypatch.setattr(checkpoint, "_write_shards", self)

    def __call__(self, file, shards):
        assert self.released.wait(60)
        self.count += 1
        if self.count in self.failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.write(file, shards)


def test_a_save_in_the_background_holds_the_state_of_its_step(tmp_path, monkeypatch):
    disk, weights = SlowDisk(monkeypatch), Weights([1.0, 2.0])
    checkpoints = Checkpoints(tmp_path / "background", 9, background=Background(60))
    assert not checkpoints.save(1, {"module": weights})
    weights.values.fill_(9.0)  # training continues
    assert not list(checkpoints.folder.glob("step_*"))
    checkpoints.raise_if_failed()  # it has not ended
    disk.released.set()
    checkpoints.save(2, {"module": weights})  # waits for the first
    assert (checkpoints.folder / "step_00000001").is_dir()
    checkpoints.wait()
    checkpoints.wait()  # there is none any more
    assert checkpoints.saved_step == 2
    plain = Checkpoints(tmp_path / "plain", 9)
    assert plain.save(1, {"module": Weights([1.0, 2.0])})
    assert plain.save(2, {"module": weights})
    files = [path.relative_to(plain.folder) for path in plain.folder.rglob("*") if path.is_file()]
    assert len(files) == 7
    for file in files:
        assert (checkpoints.folder / file).read_bytes() == (plain.folder / file).read_bytes(), file


def test_buffers_of_the_background_are_reused(tmp_path):
    background = Background(60)
    checkpoints, parts = Checkpoints(tmp_path, 3, background=background), {"module": Weights([1.0])}
    checkpoints.save(1, parts)
    (buffer,) = background.buffers.values()
    checkpoints.save(2, parts)
    assert [id(each) for each in background.buffers.values()] == [id(buffer)]
    checkpoints.wait()


@pytest.mark.parametrize("background", [False, True])
def test_failed_saves_are_logged_and_the_second_in_a_row_ends_the_run(background, tmp_path, monkeypatch, capsys):
    configure_logging()
    disk = SlowDisk(monkeypatch, failing=(1, 3, 4))
    disk.released.set()
    checkpoints = Checkpoints(tmp_path, 3, background=Background(60) if background else None)
    parts = {"module": Weights([1.0])}
    for step, saved in ((1, -1), (2, 2), (3, 2)):
        checkpoints.save(step, parts)
        checkpoints.wait()
        assert checkpoints.saved_step == saved
    log = capsys.readouterr().out
    assert "checkpoint of step 1 failed: No space left on device. The next save retries." in log
    assert "checkpoint of step 3 failed" in log
    with pytest.raises(UserError, match="two checkpoints in a row could not be written"):  # noqa: PT012
        checkpoints.save(4, parts)
        while True:
            checkpoints.raise_if_failed()
    assert [path.name for path in tmp_path.glob("*step*")] == ["step_00000002"]


def test_numbers_that_are_not_finite_end_a_run_that_saves_in_the_background(tmp_path):
    checkpoints = Checkpoints(tmp_path, 3, background=Background(60))
    checkpoints.save(7, {"module": Weights([1.0, float("inf")])})
    with pytest.raises(UserError, match=r"weight/x is not finite after step 7, so that no checkpoint was written"):
        checkpoints.wait()
    assert list(tmp_path.iterdir()) == []


def files_of(run):
    """Return the content of every file of a run's checkpoints, by step and name."""
    folder = run / "checkpoints"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_runs_that_save_in_the_background_resume_bit_by_bit(shards, tmp_path):
    """Two ranks at ZeRO-2: every file is byte for byte that of a run that waits, also after both have resumed.

    The slices are also those before the resumption; torch.save writes equal state that was loaded in other bytes.
    """
    options = ("--train.steps", "20", "--train.save_every", "4", "--train.keep", "9")
    waits = ranks.arguments(shards, tmp_path / "waits", 2, *options)
    background = ranks.arguments(shards, tmp_path / "background", 2, *options, "--train.async_save")
    ranks.run_all(2, [waits, background])
    whole = files_of(tmp_path / "waits")
    assert len(whole) == 1 + 5 * 4
    assert files_of(tmp_path / "background") == whole
    for run in (tmp_path / "waits", tmp_path / "background"):
        for step in (12, 16, 20):
            shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
        (run / "finished.json").unlink()
    output = ranks.run_all(2, [waits, background])
    assert output.count("steps 8 to 20") == 2
    resumed = files_of(tmp_path / "background")
    assert resumed == files_of(tmp_path / "waits")
    assert resumed.keys() == whole.keys()
    assert all(resumed[name] == whole[name] for name in whole if name.endswith(".safetensors"))
