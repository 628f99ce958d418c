"""The golden curves hold: every method, ZeRO stage and rank count gives the recorded losses, norms, betas and samples.

`pytest tests/test_golden.py --write-golden` records them anew; CHANGELOG.md then says why they changed.
"""

import json

import golden
import numpy as np
import pytest
import ranks
import torch
from conftest import make_shards

from ddae.config.pretrain import ModelConfig
from ddae.export.encoder import write_tokenizer
from ddae.models.tokenizer import Tokenizer
from ddae.models.vit import initialise

PROGRAM = str(ranks.ROOT / "tests" / "support" / "golden.py")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer before any training, with a random codebook."""
    made = Tokenizer(ModelConfig(width=32, depth=2, heads=2, image_size=32, patch_size=4), 24, 8)
    generator = torch.Generator().manual_seed(0)
    initialise(made, generator)
    made.codebook.copy_(torch.nn.functional.normalize(torch.randn(24, 8, generator=generator), dim=-1))
    folder = tmp_path_factory.mktemp("golden") / "tokenizer"
    write_tokenizer(made.state_dict(), made, folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """100 training images in three shards and 16 for validation."""
    return make_shards(make_shards(tmp_path_factory.mktemp("images")), (16,), "val", 100)


@pytest.fixture(scope="module")
def train(images, encoder_folder, tokenizer, tmp_path_factory):
    """train(precision, steps) -> {"METHOD/RANKS/STAGE": curves}."""

    def run(precision: str, steps: int) -> dict[str, dict]:
        folder, found = tmp_path_factory.mktemp("golden"), {}
        for count in golden.RANKS:
            lines = []
            for stage in golden.STAGES:
                zero = ["--ds_config", str(ranks.ROOT / "ds_configs" / f"zero{stage}.json")]
                for method in golden.METHODS:
                    name, words = f"{method}/{count}/{stage}", golden.arguments(method, tokenizer, precision, steps)
                    data = ["--data.train", str(images), "--run_dir", str(folder / name)]
                    lines.append([name, "pretrain", *words, *zero, *data])
                name, words = f"finetune/{count}/{stage}", golden.finetuning(precision, steps)
                data = ["--data.train", str(images), "--run_dir", str(folder / name), "--encoder", str(encoder_folder)]
                lines.append([name, "finetune", *words, *zero, *data])
            found |= answers(ranks.run_program(count, [PROGRAM], lines))
        return found

    return run


@pytest.fixture(scope="module")
def recorded(request):
    """The recorded curves; {} where they are to be written."""
    return {} if request.config.getoption("--write-golden") else json.loads(golden.FILE.read_text())


def answers(log: str) -> dict[str, dict]:
    return dict(json.loads(line.removeprefix("GOLDEN ")) for line in log.splitlines() if line.startswith("GOLDEN "))


def check(found: dict[str, dict], recorded: dict, section: str, tolerance: float, capsys) -> None:
    """Compare runs "METHOD/RANKS/STAGE" with the recorded "METHOD/RANKS", or record those of stage 0."""
    if not recorded:
        document = json.loads(golden.FILE.read_text()) if golden.FILE.exists() else {}
        runs = {name.rpartition("/")[0]: rounded(run) for name, run in found.items() if name.endswith("/0")}
        golden.FILE.write_text(json.dumps(document | {section: runs}, indent=1) + "\n")
        return
    assert {name.rpartition("/")[0] for name in found} == recorded[section].keys()
    worst: dict[str, float] = {}
    for name, run in found.items():
        expected = recorded[section][name.rpartition("/")[0]]
        assert run.keys() == expected.keys()
        assert run["keys"] == expected["keys"], f"{name} read other samples"
        for column in run.keys() - {"keys"}:
            worst[f"{name} {column}"] = deviation(run[column], expected[column])
    curve = max(worst, key=lambda name: worst[name])
    with capsys.disabled():
        print(f"\ngolden curves, {section}: largest deviation {worst[curve]:.1e} ({curve}), tolerance {tolerance:.0e}")
    assert {name: value for name, value in worst.items() if not value <= tolerance} == {}


def deviation(found: list[float], expected: list[float]) -> float:
    """Return the largest |found - expected| / (1 + |expected|); infinite where the lengths differ."""
    if len(found) != len(expected):
        return float("inf")
    return float((np.abs(np.subtract(found, expected)) / (1 + np.abs(expected))).max())


def rounded(run: dict) -> dict:
    """Eight digits: more would be noise."""
    return {name: of if name == "keys" else [float(f"{each:.8g}") for each in of] for name, of in run.items()}


def test_every_method_stage_and_rank_count(train, recorded, capsys):
    check(train("fp32", golden.STEPS), recorded, "fp32", golden.TOLERANCE, capsys)


@pytest.mark.slow
def test_five_steps_in_bf16(train, recorded, capsys):
    check(train("bf16", golden.BF16_STEPS), recorded, "bf16", golden.BF16_TOLERANCE, capsys)


def test_the_demo(recorded, tmp_path, capsys):
    """Fifty steps of the demo on the photographs that it trains on."""
    assert ranks.run_command("data_prep/sample_photos.py", "--out", str(tmp_path / "demo"))[0] == 0
    words = ["--preset", "demo", "--train.steps", str(golden.DEMO_STEPS), "--train.log_every", "1", "--data.workers"]
    words += ["0", "--data.backend", "pillow", "--tracker.kind", "jsonl", "--train.no_report"]
    words += ["--data.train", str(tmp_path / "demo"), "--run_dir", str(tmp_path / "run")]
    words += ["--ds_config", str(ranks.ROOT / "ds_configs" / "zero2.json")]
    log = ranks.run_program(1, [PROGRAM], [["demo/1/0", "pretrain", *words]])
    check(answers(log), recorded, "demo", golden.TOLERANCE, capsys)
