"""The paper's tables: the fields that each row changes, the formatted table, and a run at the smallest scale."""

import csv
import json
import runpy
from itertools import product

import pytest
import ranks
from conftest import sample

from ddae.ablation.format import best_row, to_html, to_markdown
from ddae.ablation.results import ResultsFile
from ddae.ablation.run import AblationSettings, _check
from ddae.ablation.tables import TABLES, TUNED_SCALES, table_rows
from ddae.config.base import flatten
from ddae.config.pretrain import check
from ddae.config.scales import SCALES
from ddae.data.shard_writer import write_manifest, write_shard
from ddae.errors import UserError

DIFFERENCES = {  # of each row from its table's base, as METHOD.md describes the tables
    ("3", "MAE"): {"pixel.taps": [12], "pixel.tap_weights": [1.0], "pixel.dynamic": False},
    ("3", "D-MAE"): {"pixel.taps": [12], "pixel.tap_weights": [1.0]},
    ("3", "DS-MAE"): {"pixel.dynamic": False},
    ("3", "DDS-MAE"): {},
    ("4", "neither"): {
        "pixel.taps": [12],
        "pixel.tap_weights": [1.0],
        "pixel.dynamic": False,
        "feature.taps": [12],
        "feature.tap_weights": [1.0],
        "feature.dynamic": False,
    },
    ("4", "features"): {"pixel.taps": [12], "pixel.tap_weights": [1.0], "pixel.dynamic": False},
    ("4", "pixels"): {"feature.taps": [12], "feature.tap_weights": [1.0], "feature.dynamic": False},
    ("4", "both (DDAE)"): {},
    ("6", "1 taps"): {"pixel.taps": [12], "pixel.tap_weights": [1.0]},
    ("6", "2 taps"): {"pixel.taps": [6, 12], "pixel.tap_weights": [0.75, 1.0]},
    ("6", "4 taps"): {},
    ("6", "6 taps"): {"pixel.taps": [2, 4, 6, 8, 10, 12], "pixel.tap_weights": [0.75] * 5 + [1.0]},
    ("7", "fixed, 0"): {"pixel.dynamic": False},
    ("7", "fixed, -0.5"): {"dynamic.learnable": False},
    ("7", "learnable, 0"): {"dynamic.beta_init": [0.0]},
    ("7", "learnable, -0.1 to -0.7"): {"dynamic.beta_init": [-0.1, -0.3, -0.5, -0.7]},
    ("7", "learnable, -0.7 to -0.1"): {"dynamic.beta_init": [-0.7, -0.5, -0.3, -0.1]},
    ("7", "learnable, -0.5"): {},
}


@pytest.mark.parametrize("scale", SCALES)
def test_rows_differ_from_their_base_as_in_the_paper(scale):
    compared = set()
    for table in ("3", "4", "6", "7"):
        rows = table_rows(table, scale)
        (base,) = [row for row in rows if not DIFFERENCES[table, row.name]]
        for row in rows:
            expected = DIFFERENCES[table, row.name].items()
            expected = {key: at_depth(value, scale) if key.endswith("taps") else value for key, value in expected}
            if scale in TUNED_SCALES and row.lr_factor != base.lr_factor:
                expected["optim.lr"] = pytest.approx(SCALES[scale].lr * row.lr_factor)
            assert differences(base.config, row.config) == expected
            compared.add((table, row.name))
    assert compared == DIFFERENCES.keys()


def test_equal_experiments_have_equal_numbers_in_all_tables():
    """D-MAE is Table 6 with one tap, and so on: the tables have a common base."""
    papers = {}
    for table in ("1", "3", "4", "6", "7"):
        for row in table_rows(table, "paper"):
            assert papers.setdefault(json.dumps(row.config.to_dict()), row.paper) == row.paper, row.name


def test_a_small_run_serves_all_tables():
    """Rows with the same meaning have the same settings at a small scale, so that the results file has one run."""
    configs = {
        (table, row.name): row.config
        for table in ("1", "3", "4", "factors", "gradient_variants", "own", "tuning")
        for row in table_rows(table, "micro")
    }
    assert configs["4", "both (DDAE)"] == configs["1", "DDAE"] == configs["factors", "learning rate x 3"]  # tuned
    ddae, same = configs["factors", "DDAE"], [("gradient_variants", "anchored"), ("own", "DDAE")]
    assert all(configs[each] == ddae for each in same)
    for factor in ("/ 3", "x 3"):
        assert (
            configs["tuning", f"both (DDAE), learning rate {factor}"] == configs["factors", f"learning rate {factor}"]
        )
        assert configs["tuning", f"MAE, learning rate {factor}"] == configs["factors", f"MAE, learning rate {factor}"]
    assert configs["3", "MAE"] == configs["factors", "MAE"]
    assert configs["1", "BootMAE"] == configs["own", "BootMAE"]


def at_depth(taps, scale):
    """Return taps of 12 blocks at the same relative depth of a scale's model."""
    return taps if SCALES[scale] is None else [round(tap * SCALES[scale].depth / 12) for tap in taps]


def differences(before, after):
    before, after = flatten(before.to_dict()), flatten(after.to_dict())
    return {key: after[key] for key in after if after[key] != before[key]}


@pytest.mark.parametrize("scale", SCALES)
def test_table_2_adds_deep_dynamic_supervision_alone(scale):
    """DDS-BEiT-v2 is BEiT-v2 with four taps and weights; DDS-MAE also has a third of MAE's epochs."""
    mae, dds_mae, beitv2, dds_beitv2 = (row.config for row in table_rows("2", scale))
    deep = {"taps": at_depth([3, 6, 9, 12], scale), "tap_weights": [0.75, 0.75, 0.75, 1.0], "dynamic": True}
    length = {"train.epochs": 100, "optim.warmup_epochs": 20} if scale == "paper" else {}
    assert differences(mae, dds_mae) == {f"pixel.{name}": value for name, value in deep.items()} | length
    assert differences(beitv2, dds_beitv2) == {f"token.{name}": value for name, value in deep.items()}


def test_own_rows_change_one_field():
    first, *others = table_rows("own", "paper")
    both = [{f"{branch}.{option}": True for branch in ("pixel", "feature")} for option in OPTIONS]
    expected = [
        {"mask.kind": "beit_block"},
        {"mask.kind": "random"},
        {"feature.warmup_fraction": 0.0},
        {"feature.warmup_fraction": 1.0},
        *both,
    ]
    assert [differences(first.config, row.config) for row in others[:-1]] == expected
    assert others[-1].name == "BootMAE"


OPTIONS = ("per_tap_norm", "per_tap_head", "cross_attention")


# The rows of compute count FLOPs, which takes 20 s a scale; micro stands for the others.
@pytest.mark.parametrize(
    "scale, table", [each for each in product(SCALES, TABLES) if each[1] != "compute" or each[0] in ("micro", "paper")]
)
def test_every_row_has_a_valid_config(scale, table):
    for row in table_rows(table, scale):
        check(row.config)


def test_no_row_is_best_within_noise():
    def row(name, *values):
        mean = sum(values) / len(values)
        deviation = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else None
        seeds = {str(n): v for n, v in enumerate(values)}
        return {"row": name, "paper": 78.7, "mean": mean, "deviation": deviation, "seeds": seeds}

    clear = [row("a", 50.0, 50.2, 49.8), row("b", 48.0, 48.2, 47.8)]
    assert best_row(clear) == "a"
    within_noise = [row("a", 50.0, 51.0, 49.0), row("b", 49.5, 50.5, 48.5)]
    assert best_row(within_noise).startswith("none; the best rows do not differ")
    assert best_row([row("a", 50.0), row("b", 48.0)]).startswith("unknown; it needs two rows and more than one seed")
    assert best_row([row("a", 50.0, 50.0), row("b", 50.0, 50.0)]).startswith("none")
    results = {"table": "3", "scale": "nano", "judged": "top-1", "rows": clear, "best": "a", "left_out": []}
    assert "| a | 50.00 ± 0.20 | not measured | not measured | not measured | 3 | 78.7 |" in to_markdown(results)
    clear[0] |= {"untrained": 40.0, "untrained_deviation": 0.5}
    results["baselines"] = {"raw_pixels": 30.0, "chance": 10.0}
    for text in (to_markdown(results), to_html(results).replace("</td><td>", " | ")):
        assert "a | 50.00 ± 0.20 | 40.00 ± 0.50 | not measured | not measured | 3 | 78.7" in text
        assert "raw pixels, nearest neighbours | 30.00 |" in text
        assert "chance | 10.00 |" in text


def ablate(out, *more):
    args = ["--table", "3", "--scale", "nano", "--steps", "28", "--out", str(out), *more, "--tracker", "jsonl"]
    return ranks.run_command("launch/ablate.py", *args)


def test_a_table_runs_and_resumes(tmp_path):
    code, output = ablate(tmp_path / "t", "--only", "DDS-MAE")
    assert code == 0, output[-2000:]
    first = json.loads((tmp_path / "t" / "results.json").read_text())["rows"]
    assert "| chance | " in output
    assert first[3]["untrained"] > 30
    assert [row["mean"] is None for row in first] == [True, True, True, False]
    code, output = ablate(tmp_path / "t", "--only", "DDS-MAE", "MAE")
    assert code == 0, output[-2000:]
    assert f"DDS-MAE, seed 0: its results are in {tmp_path / 't' / 'results.csv'}" in output
    (trained,) = [row for row in ResultsFile(tmp_path / "t" / "results.csv").rows() if row["row"] == "DDS-MAE"]
    assert float(trained["pixel_error"]) > 0
    assert trained["feature_error"] == ""  # there is no feature branch
    assert float(trained["selection_accuracy"]) > 30
    with open(tmp_path / "t" / "results_betas.csv", newline="") as file:
        betas = list(csv.DictReader(file))
    assert {row["row"] for row in betas} == {"DDS-MAE"}  # MAE has none
    assert [betas[0]["after_steps"], betas[-1]["after_steps"]] == ["1", "28"]
    assert float(betas[0]["beta_first"]) == pytest.approx(-0.5, abs=0.05)
    results = str(tmp_path / "t" / "results.csv")
    code, of_table_6 = ablate(tmp_path / "t6", "--table", "6", "--only", "4 taps", "--results", results)
    assert code == 0, of_table_6[-2000:]
    assert "4 taps, seed 0: its results are in" in of_table_6  # the same run as DDS-MAE
    again = json.loads((tmp_path / "t" / "results.json").read_text())["rows"]
    assert [row["mean"] is None for row in again] == [False, True, True, False]
    assert again[3] == first[3]
    for row in (again[0], again[3]):
        assert row["mean"] > 30  # digits: ten classes
        assert row["deviation"] is None
    assert (tmp_path / "t" / "table.md").read_text() in output
    page = (tmp_path / "t" / "table.html").read_text()
    assert "<td>DDS-MAE</td>" in page
    for figure in ("knn_curves.png", "beta_curves.png"):
        assert f'src="{figure}"' in page
        assert (tmp_path / "t" / figure).exists()
    assert [images for images, _ in again[3]["knn_curves"]["0"]] == [224 * quarter for quarter in range(5)]


@pytest.mark.slow
def test_several_seeds_in_parallel_and_rows_of_other_settings(tmp_path):
    assert ablate(tmp_path / "t", "--only", "DDS-MAE")[0] == 0
    more = "--seeds 1 2 --parallel 2 --steps 12 --only MAE".split()
    code, output = ablate(tmp_path / "t", *more)
    assert code == 0, output[-2000:]
    shorter = json.loads((tmp_path / "t" / "results.json").read_text())
    assert [list(row["seeds"]) for row in shorter["rows"]] == [["1", "2"], [], [], []]
    assert shorter["left_out"] == ["DDS-MAE, seed 0, 28 steps"]
    assert "Left out because of other settings or other data: DDS-MAE, seed 0, 28 steps" in output
    assert shorter["rows"][0]["deviation"] > 0
    assert "step 12/12" in (tmp_path / "t" / "row_0_seed_1.log").read_text()


@pytest.mark.parametrize(
    "args, message",
    [
        (("--table", "5"), "unknown table '5'; the nearest is"),
        (("--scale", "mikro"), "unknown scale 'mikro'; the nearest is 'micro'"),
        (("--only", "MEA"), "table 3 has no row 'MEA'. Its rows are 'MAE', 'D-MAE', 'DS-MAE', 'DDS-MAE'"),
        (("--scale", "tiny"), "--data is missing; the scale tiny needs shards with classes"),
        (("--steps", "-1"), "--steps is -1; expected a number >= 1"),
        (("--scale", "paper", "--data", "d", "--steps", "5"), "--steps is for small scales"),
        (("--data", "nowhere", "--parallel", "2"), "nowhere"),
        (("--table", "2", "--parallel", "2"), "--tokenizer is missing, which the row 'BEiT-v2, 100 epochs' needs"),
        (
            ("--table", "2", "--scale", "paper", "--data", "d"),
            "--tokenizer is missing, which the row 'BEiT-v2, 100 epochs' needs",
        ),
    ],
)
def test_user_errors(args, message, tmp_path, monkeypatch):
    out = tmp_path / "t"
    monkeypatch.setattr(
        "sys.argv", ["ablate", "--table", "3", "--scale", "nano", "--out", str(out), "--tracker", "jsonl", *args]
    )
    with pytest.raises(UserError) as error:
        runpy.run_path(str(ranks.ROOT / "launch" / "ablate.py"))["main"]()
    assert message in str(error.value)
    assert not out.exists()


def test_data_without_classes_are_refused_before_training(shards, digits, tmp_path):
    """Shards without the split val, and shards whose samples have no classes."""
    unlabelled = tmp_path / "unlabelled"
    unlabelled.mkdir()
    names = ("train-000000.tar", "val-000000.tar")
    write_manifest(unlabelled, {n: write_shard(unlabelled / n, [sample(0)._replace(label=None)]) for n in names})
    rows = table_rows("3", "nano")
    settings = AblationSettings(
        "3", "nano", (0,), (), "", "ds.json", "jsonl", None, "", parallel=1, write_table=True, results=""
    )
    _check(rows, settings._replace(data=str(digits)))
    for data, reason in ((shards, "no shards of split 'val'"), (unlabelled, "have no classes")):
        with pytest.raises(UserError, match=reason):
            _check(rows, settings._replace(data=str(data)))


def test_a_user_error_takes_one_line(tmp_path):
    code, output = ablate(tmp_path / "t", "--table", "5")
    assert code == 2
    (line,) = [line for line in output.splitlines() if line.startswith("ablate:")]
    assert "unknown table '5'; the nearest is" in line


def test_an_unknown_table():
    with pytest.raises(UserError, match="Choose from 1, 2, 3, 4, 6, 7, gradient_variants, own, silences"):
        table_rows("9", "nano")
