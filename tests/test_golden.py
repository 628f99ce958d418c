"""Golden curves: every method, ZeRO stage and rank count gives the recorded losses, norms, betas and sample keys.

`pytest tests/test_golden.py --write-golden` records them again; explain the change in CHANGELOG.md.
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
    """Return the folder of an untrained tokenizer with a random codebook."""
    model = Tokenizer(ModelConfig(width=32, depth=2, heads=2, image_size=32, patch_size=4), 24, 8)
    generator = torch.Generator().manual_seed(0)
    initialise(model, generator)
    model.codebook.copy_(torch.nn.functional.normalize(torch.randn(24, 8, generator=generator), dim=-1))
    folder = tmp_path_factory.mktemp("golden") / "tokenizer"
    write_tokenizer(model.state_dict(), model, folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder of shards: 100 training images in three shards, and 16 validation images."""
    return make_shards(make_shards(tmp_path_factory.mktemp("images")), (16,), "val", 100)


@pytest.fixture(scope="module")
def train(images, encoder_folder, tokenizer, tmp_path_factory):
    """Return a function train(precision, steps, stages) -> {"METHOD/RANKS/STAGE": curves}."""

    def run(precision: str, steps: int, all_stages: dict[int, tuple[int, ...]]) -> dict[str, dict]:
        folder, results = tmp_path_factory.mktemp("golden"), {}
        for count, stages in all_stages.items():
            lines = []
            for stage in stages:
                zero = ["--ds_config", str(ranks.ROOT / "ds_configs" / f"zero{stage}.json")]
                for method in golden.METHODS:
                    name, args = f"{method}/{count}/{stage}", golden.arguments(method, tokenizer, precision, steps)
                    data = ["--data.train", str(images), "--run_dir", str(folder / name)]
                    lines.append([name, "pretrain", *args, *zero, *data])
                name, args = f"finetune/{count}/{stage}", golden.finetune_arguments(precision, steps)
                data = ["--data.train", str(images), "--run_dir", str(folder / name), "--encoder", str(encoder_folder)]
                lines.append([name, "finetune", *args, *zero, *data])
            results |= parse_curves(ranks.run_program(count, [PROGRAM], lines))
        return results

    return run


@pytest.fixture(scope="module")
def recorded(request):
    """Return the recorded curves; {} with --write-golden."""
    return {} if request.config.getoption("--write-golden") else json.loads(golden.FILE.read_text())


def parse_curves(output: str) -> dict[str, dict]:
    """Return the curves that golden.py printed, by name of the run."""
    return dict(json.loads(line.removeprefix("GOLDEN ")) for line in output.splitlines() if line.startswith("GOLDEN "))


def check(measured: dict[str, dict], recorded: dict, section: str, tolerance: float, capsys) -> None:
    """Compare runs "METHOD/RANKS/STAGE" with the recorded "METHOD/RANKS", or record those of stage 0."""
    if not recorded:
        document = json.loads(golden.FILE.read_text()) if golden.FILE.exists() else {}
        runs = {name.rpartition("/")[0]: rounded(run) for name, run in measured.items() if name.endswith("/0")}
        golden.FILE.write_text(json.dumps(document | {section: runs}, indent=1) + "\n")
        return
    assert {name.rpartition("/")[0] for name in measured} == recorded[section].keys()
    deviations: dict[str, float] = {}
    for name, run in measured.items():
        expected = recorded[section][name.rpartition("/")[0]]
        assert run.keys() == expected.keys()
        assert run["keys"] == expected["keys"], f"{name}: other samples, or in another order"
        for column in run.keys() - {"keys"}:
            deviations[f"{name} {column}"] = deviation(run[column], expected[column])
    curve = max(deviations, key=lambda name: deviations[name])
    with capsys.disabled():
        largest = f"largest deviation {deviations[curve]:.1e} ({curve}), tolerance {tolerance:.0e}"
        print(f"\ngolden curves, {section}: {largest}")
    assert {name: value for name, value in deviations.items() if not value <= tolerance} == {}


def deviation(measured: list[float], expected: list[float]) -> float:
    """Return the largest |measured - expected| / (1 + |expected|); infinite if the lengths differ."""
    if len(measured) != len(expected):
        return float("inf")
    return float((np.abs(np.subtract(measured, expected)) / (1 + np.abs(expected))).max())


def rounded(run: dict) -> dict:
    """Return the curves rounded to eight digits, more than fp32 has."""
    return {key: curve if key == "keys" else [float(f"{each:.8g}") for each in curve] for key, curve in run.items()}


def test_curves_of_every_method(train, recorded, capsys):
    """On one and two ranks, at each ZeRO stage on one of them."""
    check(train("fp32", golden.STEPS, golden.QUICK_STAGES), recorded, "fp32", golden.TOLERANCE, capsys)


@pytest.mark.slow
def test_curves_of_every_method_zero_stage_and_rank_count(train, recorded, capsys):
    check(train("fp32", golden.STEPS, golden.STAGES), recorded, "fp32", golden.TOLERANCE, capsys)


@pytest.mark.slow
def test_curves_in_bf16(train, recorded, capsys):
    check(train("bf16", golden.BF16_STEPS, golden.STAGES), recorded, "bf16", golden.BF16_TOLERANCE, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_curves_of_ddae_with_every_option(images, tmp_path, recorded, count, capsys):
    """At ZeRO-2: each option of the engine by itself, all of them, and none."""
    lines = []
    for option, args in golden.OPTIONS.items():
        base = golden.arguments("ddae", tmp_path, "fp32", golden.STEPS)
        args = [*base, *args.split(), "--ds_config", "zero2", "--data.train", str(images)]
        lines.append(
            [f"ddae/{count}/{option}", "pretrain", *args, "--run_dir", str(tmp_path / option.replace(" ", "_"))]
        )
    measured = parse_curves(ranks.run_program(count, [PROGRAM], lines))
    assert len(measured) == len(golden.OPTIONS)
    of_ddae = {"fp32": {f"ddae/{count}": recorded["fp32"][f"ddae/{count}"]}}
    check(measured, of_ddae, "fp32", golden.TOLERANCE, capsys)


def test_curves_of_the_demo(recorded, tmp_path, capsys):
    """50 steps of the demo, on the photographs of data_prep/sample_photos.py."""
    assert ranks.run_command("data_prep/sample_photos.py", "--out", str(tmp_path / "demo"))[0] == 0
    args = ["--preset", "demo", "--train.steps", str(golden.DEMO_STEPS), "--train.log_every", "1", "--data.workers"]
    args += ["0", "--data.backend", "pillow", "--tracker.kind", "jsonl", "--train.no_report"]
    args += ["--data.train", str(tmp_path / "demo"), "--run_dir", str(tmp_path / "run")]
    args += ["--ds_config", str(ranks.ROOT / "ds_configs" / "zero2.json")]
    output = ranks.run_program(1, [PROGRAM], [["demo/1/0", "pretrain", *args]])
    check(parse_curves(output), recorded, "demo", golden.TOLERANCE, capsys)
