"""Arguments -> config, and how mistakes are reported: one sentence, exit code 2, no file written."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
import ranks
import torch
from ddae_kernels import implementation

from ddae.config.base import flatten
from ddae.config.cli import PRETRAINING, parse, take_slurm_ranks
from ddae.config.evaluation import FINETUNING, PROBING, FinetuneConfig, ProbeConfig
from ddae.config.help import field_helps, short_help
from ddae.config.presets import preset
from ddae.config.pretrain import PretrainConfig
from ddae.config.segmentation import SEGMENTATION, SegmentConfig
from ddae.config.tokenizer import TOKENIZING
from ddae.errors import UserError
from ddae.training.step import resolve_loss_backend


def test_the_default_is_the_papers_vit_b():
    config = parse([])
    assert config == PretrainConfig()
    assert config.peak_lr == pytest.approx(2.4e-3)
    assert config.folder == "runs/ddae_vit_b16_100e"
    assert config.num_masked == 147
    assert config.num_steps(1281167) == 31278


def test_flags_override_the_preset():
    args = "--preset=demo --data.batch-size 64 --optim.lr=0.5 --teacher.momentum schedule --train.allow_longer"
    args += " --mask.ratio 0.5 --dynamic.beta_init -0.7 -0.5 -0.3 -0.1 --local_rank=3 --deepspeed_config x.json"
    config = parse([*args.split(), "--train.steps", "7"])
    assert config.data.batch_size == 64
    assert config.peak_lr == 0.5
    assert config.teacher.momentum == "schedule"
    assert config.train.allow_longer
    assert config.num_masked == 32
    assert config.dynamic.beta_init == (-0.7, -0.5, -0.3, -0.1)
    assert config.ds_config == "x.json"
    assert config.num_steps(2530) == 7
    assert config.model.width == 96
    assert parse(["--teacher.momentum", "0.5"]).teacher.momentum == 0.5


@pytest.mark.parametrize(
    "args, message",
    [
        ("--preset demmo", "the nearest is 'demo'"),
        ("--preset", "--preset lacks a name"),
        ("--data.bach_size 3", "the nearest is --data.batch_size"),
        ("--model.widht=3", "the nearest is --model.width"),
        ("--data.batch_size abc", "Error parsing --data.batch_size"),
        ("--data.batch_size 0", "data.batch_size is 0; expected a value >= 1"),
        ("--data.backend opencv", "invalid choice 'opencv'"),
        ("stray", "stray"),
        ("--pixel.taps 3 6 9 13", "expected encoder blocks from 1 to 12"),
        ("--pixel.taps 0 6 9 12", "expected encoder blocks from 1 to 12"),
        ("--pixel.taps 6 3 9 12", "ascending"),
        ("--feature.taps 6 12", "feature.tap_weights has 4 numbers; expected 2"),
        ("--model.image_size 225", "expected a multiple of the patch size 16. Pass --model.image_size 224"),
        ("--model.heads 7", "model.heads 7"),
        ("--pixel.decoder_heads 7", "pixel.decoder_heads 7"),
        ("--mask.ratio 1", "mask.ratio is 1.0"),
        ("--mask.ratio 0.001", "mask.ratio is 0.001"),
        ("--teacher.momentum 1.5", "teacher.momentum is 1.5"),
        ("--dynamic.beta_init -0.5 -0.5", "dynamic.beta_init has 2 numbers; expected 1, or 4"),
        ("--pixel.no_enabled --feature.no_enabled", "Enable at least one branch"),
        ("--data.crop_scale 0.5 0.2", "data.crop_scale"),
        ("--data.workers -1", "data.workers is -1"),
        ("--model.patch_size 0", "model.patch_size is 0"),
        ("--pixel.decoder_heads 0", "pixel.decoder_heads is 0"),
        ("--mask.ratio nan", "mask.ratio is nan"),
        ("--dynamic.beta_init nan", "dynamic.beta_init is nan"),
        ("--optim.lr -1", "optim.lr is -1.0"),
        ("--train.epochs 0", "train.epochs is 0.0"),
        ("--dynamic.clamp 3 -16", "expected the smaller number first"),
        ("--preset demo --preset mae_vit_b16_100e", "more than once"),
    ],
)
def test_mistakes_are_one_sentence(args, message):
    with pytest.raises(UserError) as caught:
        parse(args.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [FINETUNING, PROBING, SEGMENTATION], ids=lambda kind: kind.config.TASK)
def test_fields_without_effect_are_refused(kind):
    known = flatten(kind.config().to_dict())
    for name in kind.config.UNUSED:
        assert name in known
        with pytest.raises(UserError, match=f"--{name} has no effect here"):
            parse(["--encoder", "runs/demo", f"--{name}", "1"], kind)
    assert parse(["--encoder", "runs/demo", "--preset", "demo"], kind).folder == f"runs/demo/{kind.config.TASK}"


@pytest.mark.parametrize(
    "args, message",
    [
        ("", "no encoder is given. Pass --encoder runs/demo"),
        ("--encoder a --engine.precision bf16", "bf16 weights are unsupported with BatchNorm"),
        ("--encoder a --data.backend dali", "data.backend is dali, which reads no masks"),
        ("--encoder a --seg.scale 2 1", "expected the smaller number first"),
        ("--encoder a --seg.stride 1.5", "seg.stride is 1.5; expected a value from"),
        ("--encoder a --preset papper", "unknown recipe 'papper'; the nearest is 'paper'"),
    ],
)
def test_mistakes_of_a_segmentation(args, message):
    with pytest.raises(UserError) as caught:
        parse(args.split(), SEGMENTATION)
    assert message in str(caught.value)


@pytest.mark.parametrize("config", [PretrainConfig, FinetuneConfig, ProbeConfig, SegmentConfig])
def test_every_field_is_read_by_code(config):
    """Each field is read somewhere, as an attribute of an object named after its section."""
    read = set()
    for path in (ranks.ROOT / "ddae").rglob("*.py"):
        if path.name == "presets.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
                read.add((owner, node.attr))
    known_as = {
        "": {"config", "self"},
        "pixel": {"pixel", "branch"},
        "feature": {"feature", "branch"},
        "model": {"model", "shape"},
    }
    for name in flatten(config().to_dict()):
        section, _, field = name.rpartition(".")
        owners = known_as.get(section, {section, "config"})
        assert any((owner, field) in read for owner in owners), name


def pretrain(tmp_path, *args, world=1):
    """launch/pretrain.py as the ranks of a launcher, from an empty folder; exit code, stdout and stderr of each."""
    command = [sys.executable, str(ranks.ROOT / "launch" / "pretrain.py"), *args]
    started = []
    for number in range(world):
        environment = os.environ | {"RANK": str(number), "WORLD_SIZE": str(world), "LOCAL_RANK": str(number)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # no rank gets as far as connecting
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, env=environment, cwd=tmp_path, text=True, **pipes))
    return [(*process.communicate(timeout=120), process.returncode) for process in started]


def test_show_prints_the_config_and_leaves(tmp_path):
    ((shown, _, code),) = pretrain(tmp_path, "--preset", "demo", "--show", "--optim.lr", "0.25")
    assert code == 0
    assert json.loads(shown)["optim"]["lr"] == 0.25
    assert json.loads(shown)["peak_lr"] == 0.25
    assert list(tmp_path.iterdir()) == []


def test_one_rank_prints_the_help_of_the_preset(tmp_path):
    (text, _, code), (silence, errors, other) = pretrain(tmp_path, "--preset", "demo", "--help", world=2)
    assert (code, other) == (0, 0), errors
    assert silence == ""
    assert re.search(r"--optim.lr +0.003 ", text)
    assert "--optim.adam_betas" not in text
    ((text, _, code),) = pretrain(tmp_path, "--preset", "demo", "--help-all")
    assert code == 0
    assert "--optim.adam_betas" in text
    assert re.search(r"peak learning rate;[^-]*\(default: 0.003\)", text)


@pytest.mark.parametrize("experiment", [PRETRAINING, FINETUNING, PROBING, SEGMENTATION, TOKENIZING])
def test_every_field_has_a_help_text(experiment):
    start = experiment.preset(experiment.config.preset)
    assert flatten(start.to_dict()).keys() == field_helps(experiment.config).keys()
    text = short_help(experiment, start, "program")
    assert all(f"--{name} " not in text for name in experiment.config.UNUSED)
    assert 15 <= len(re.findall(r"^--\w", text, re.MULTILINE)) <= 30


def test_help_of_preset_own_marks_what_follows_from_the_data():
    text = short_help(PRETRAINING, preset("own"), "ddae pretrain")
    assert "usage: ddae pretrain PHOTOS --out DIR" in text
    assert re.search(r"--train.steps +by the data", text)
    assert re.search(r"--mask.ratio +0.75", text)


@pytest.mark.parametrize(
    "args, message",
    [
        ("--preset demo --ds_config {zero}", "data.train is 'data/demo', which does not exist"),
        ("--preset demo --ds_confg {zero}", "the nearest is --ds_config"),
    ],
)
def test_one_rank_reports_and_no_file_is_written(args, message, tmp_path):
    args = args.format(zero=ranks.ROOT / "ds_configs" / "zero2.json").split()
    (_, reported, code), (silent_out, silent, other_code) = pretrain(tmp_path, *args, world=2)
    assert (code, other_code) == (2, 2)
    lines = [line for line in reported.splitlines() if line.startswith("ddae:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in reported
    assert "ddae:" not in silent + silent_out
    assert list(tmp_path.iterdir()) == []


LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS")


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8 but RANK is not set. Start the ranks with"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set but MASTER_ADDR and MASTER_PORT are not."),
        ({"RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1", "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; expected a"),
        ({"RANK": "0"}, None),
        ({"RANK": "", "WORLD_SIZE": "", "SLURM_STEP_NUM_TASKS": ""}, None),
        ({"MASTER_ADDR": "h", "MASTER_PORT": "29500"}, None),  # srun --pty in an allocation's shell
        ({}, None),
    ],
)
def test_incomplete_variables_of_launchers(variables, message, monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if message is None:
        take_slurm_ranks()
        assert "" not in [os.environ.get(name) for name in LAUNCHER_VARIABLES]
    else:
        with pytest.raises(UserError, match=re.escape(message)):
            take_slurm_ranks()


@pytest.mark.parametrize(
    "flag, nearest",
    [
        ("--train.lr", "--optim.lr"),
        ("--lr", "--optim.lr"),
        ("--data.seed", "--train.seed"),
        ("--optim.batch_size", "--data.batch_size"),
        ("--no_report", "--train.no_report"),
        ("--optim.lrr", "--optim.lr"),
    ],
)
def test_the_nearest_flag_may_be_in_another_section(flag, nearest):
    with pytest.raises(UserError, match=rf"unknown flag {flag}; the nearest is {nearest}\."):
        parse(["--preset", "demo", flag, "1"])


def test_quoted_home_folders_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert parse(["--preset", "demo", "--run_dir", "~/x"]).folder == f"{tmp_path}/x"
    assert parse(["--preset", "demo", "--run_dir=~/x"]).folder == f"{tmp_path}/x"
    (tmp_path / "~" / "x").mkdir(parents=True)
    assert parse(["--preset", "demo", "--run_dir", "~/x"]).folder == "~/x"


def test_the_largest_seed():
    assert parse(["--preset", "demo", "--train.seed", str(2**63 - 1)]).train.seed == 2**63 - 1
    with pytest.raises(UserError, match=r"train.seed is 18446744073709551615; expected a value from 0 to 9.22"):
        parse(["--preset", "demo", "--train.seed", str(2**64 - 1)])


def test_a_momentum_of_one_is_refused():
    with pytest.raises(UserError, match=r"teacher.momentum is 1.0; expected a value from 0 to 1, which is excluded"):
        parse(["--preset", "demo", "--teacher.momentum", "1.0"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_triton_without_a_gpu_is_refused(monkeypatch):
    asked = parse(["--preset", "demo", "--engine.loss_backend", "triton"])
    assert resolve_loss_backend(asked) == "triton"  # in the interpreter, which conftest.py asks for
    monkeypatch.setattr(implementation, "INTERPRETED", False)
    assert resolve_loss_backend(parse(["--preset", "demo"])) == "reference"
    with pytest.raises(UserError, match=r"engine.loss_backend is triton: impl='triton' cannot serve"):
        resolve_loss_backend(asked)
