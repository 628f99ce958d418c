"""A run directory's history: which earlier starts it accepts, and which it refuses."""

import errno
import json
import os
from dataclasses import replace

import pytest

from ddae.config.base import FORMAT, TrainConfig
from ddae.config.pretrain import DataConfig, PretrainConfig, PretrainEngineConfig
from ddae.config.tokenizer import TokenizerConfig
from ddae.errors import UserError
from ddae.training.run_dir import check, check_history, finished, lock, previous_decoding
from ddae.training.tracker import read_metrics


def started(path, last, save_every=10, files=(), async_save=False):
    """The config of a run that has logged `last` steps and more."""
    config = PretrainConfig(run_dir=str(path), train=TrainConfig(save_every=save_every, async_save=async_save))
    config.write(path / "config.json")
    (path / "metrics.jsonl").write_text("".join(json.dumps({"step": n}) + "\n" for n in range(1, last + 2)))
    for name in files:
        (path / name).touch()
    return config


@pytest.mark.parametrize("name", ["config.json", "finished.json", "environment.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_files_that_cannot_be_read(name, content, tmp_path):
    config = PretrainConfig(run_dir=str(tmp_path))
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    read = {"config.json": check, "finished.json": finished, "environment.json": previous_decoding}[name]
    with pytest.raises(
        UserError, match=rf"{name} cannot be read \(it is .*\)\. Restore it, or choose another --run_dir"
    ):
        read(config)


@pytest.mark.parametrize(
    "name, content",
    [("finished.json", '{"steps": null}'), ("finished.json", "{}"), ("config.json", '{"format": 2, "data": 3}')],
)
def test_files_with_another_content(name, content, tmp_path):
    config = PretrainConfig(run_dir=str(tmp_path))
    (tmp_path / name).write_text(content)
    read = {"config.json": check, "finished.json": finished}[name]
    with pytest.raises(UserError, match=r"cannot be read \(steps is missing or|was started with "):
        read(config)


@pytest.mark.parametrize("content", [b"\xff\xfe\n", b"[1, 2]\n", b'"x"\n{"step": 3}\n'])
def test_damaged_rows_of_metrics_are_skipped(content, tmp_path):
    config = started(tmp_path, 3)
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert read_metrics(tmp_path / "metrics.jsonl") == ([{"step": 3}] if b"step" in content else [])
    check_history(config)


def test_a_link_above_the_run_that_dangles(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"link, above run_dir, is a link to .*gone, which does not exist"):
        check(PretrainConfig(run_dir=str(tmp_path / "link" / "runs" / "x")))


def test_a_dangling_link_and_a_long_name(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"link is a link to .*gone, which does not exist\. Mount or create it"):
        check(PretrainConfig(run_dir=str(tmp_path / "link")))
    with pytest.raises(UserError, match=r"is unusable \(File name too long\)\. Choose another --run_dir"):
        check(PretrainConfig(run_dir=str(tmp_path / ("x" * 300))))


def test_a_lock_of_another_user(tmp_path, monkeypatch):
    def deny(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", deny)
    with pytest.raises(UserError, match=r"\.lock cannot be opened \(Permission denied\)\. Choose another --run_dir"):
        lock(PretrainConfig(run_dir=str(tmp_path)))


def test_the_device_may_change_on_resume(tmp_path):
    config = PretrainConfig(run_dir=str(tmp_path))
    settings = {"format": FORMAT, **config.to_dict()}
    del settings["engine"]["device"]  # written before the field existed
    (tmp_path / "config.json").write_text(json.dumps(settings))
    check(replace(config, engine=PretrainEngineConfig(device="cpu")))


def test_a_new_run_starts(tmp_path):
    check_history(PretrainConfig(run_dir=str(tmp_path)))


def test_a_run_of_version_0_1_is_refused(tmp_path):
    config = PretrainConfig(run_dir=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(UserError, match=r"was written by another version of ddae; this one reads run format 2\."):
        check(config)


def test_a_run_of_another_kind_is_refused(tmp_path):
    from ddae.config.evaluation import FinetuneConfig

    FinetuneConfig(run_dir=str(tmp_path), encoder="runs/demo").write(tmp_path / "config.json")
    with pytest.raises(UserError, match="was started with augment"):
        check(PretrainConfig(run_dir=str(tmp_path)))


def test_a_small_tables_tokenizer_is_resumed(tmp_path):
    """Its data and engine settings are pretraining's, which have more fields (ablation/run.py)."""
    config = TokenizerConfig(run_dir=str(tmp_path), data=DataConfig(), engine=PretrainEngineConfig())
    config.write(tmp_path / "config.json")
    check(config)


def test_partial_files_of_killed_processes_are_removed(tmp_path):
    """Those of other processes that may still write are kept."""
    (tmp_path / "heartbeats").mkdir()
    old, new = tmp_path / "heartbeats" / ".rank_00003.json.17.part", tmp_path / ".config.json.18.part"
    for partial in (old, new):
        partial.touch()
    os.utime(old, (0, 0))
    lock(PretrainConfig(run_dir=str(tmp_path)))
    assert not old.exists()
    assert new.exists()


@pytest.mark.parametrize("last", [0, 3, 10])
def test_a_run_killed_before_its_first_checkpoint_starts_again(last, tmp_path):
    check_history(started(tmp_path, last))


def test_a_run_killed_during_its_first_save_in_the_background_starts_again(tmp_path):
    check_history(started(tmp_path, 20, async_save=True))
    with pytest.raises(UserError, match=r"holds no checkpoint\. Restore its checkpoints/"):
        check_history(started(tmp_path, 21, async_save=True))


@pytest.mark.parametrize("last, files", [(11, ()), (500, ()), (3, ("stopped.json",)), (3, ("finished.json",))])
def test_missing_checkpoints_are_noticed(last, files, tmp_path):
    config = started(tmp_path, last, files=files)
    with pytest.raises(UserError, match=r"holds no checkpoint\. Restore its checkpoints/"):
        check_history(config)
    check_history(replace(config, allow_restart=True))
