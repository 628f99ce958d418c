"""What a run folder knows of its own past."""

import json
from dataclasses import replace

import pytest

from ddae.config.base import TrainConfig
from ddae.config.pretrain import PretrainConfig
from ddae.errors import UserError
from ddae.training.run_dir import check, check_history


def folder_of(path, last, save_every=10, more=()):
    config = PretrainConfig(run_dir=str(path), train=TrainConfig(save_every=save_every))
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    (path / "metrics.jsonl").write_text("".join(json.dumps({"step": n}) + "\n" for n in range(1, last + 2)))
    for name in more:
        (path / name).touch()
    return config


def test_a_new_run_may_begin(tmp_path):
    check_history(PretrainConfig(run_dir=str(tmp_path)))


def test_a_run_from_before_a_field_existed_has_what_was_done_then(tmp_path):
    """The feature target was a LayerNorm alone before feature.target_norm: another one is another run."""
    config = PretrainConfig(run_dir=str(tmp_path))
    before = config.to_dict()
    del before["feature"]["target_norm"]
    (tmp_path / "config.json").write_text(json.dumps(before))
    with pytest.raises(UserError, match=r"was started with feature\.target_norm = layer, not instance_layer"):
        check(config)
    check(replace(config, feature=replace(config.feature, target_norm="layer")))


@pytest.mark.parametrize("last", [0, 3, 10])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(last, tmp_path):
    check_history(folder_of(tmp_path, last))


@pytest.mark.parametrize("last, more", [(11, ()), (500, ()), (3, ("stopped.json",)), (3, ("finished.json",))])
def test_checkpoints_that_are_gone_are_missed(last, more, tmp_path):
    config = folder_of(tmp_path, last, more=more)
    with pytest.raises(UserError, match="holds no checkpoint: bring back its checkpoints/"):
        check_history(config)
    check_history(replace(config, allow_restart=True))
