"""The paper's tables: which fields each row changes, what a table says, and one at the smallest scale, run."""

import json
import runpy

import pytest
import ranks

from ddae.ablation.format import best, markdown, page
from ddae.ablation.tables import SCALES, TABLES, rows
from ddae.config.base import flatten
from ddae.config.pretrain import check
from ddae.errors import UserError

DIFFERENCES = {  # from each table's base, as METHOD.md's reading of the tables has them
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
def test_rows_differ_from_their_base_in_what_the_paper_says(scale):
    seen = set()
    for table in ("3", "4", "6", "7"):
        found = rows(table, scale)
        (base,) = [row for row in found if not DIFFERENCES[table, row.name]]
        for row in found:
            assert differences(base.config, row.config) == DIFFERENCES[table, row.name]
            seen.add((table, row.name))
    assert seen == DIFFERENCES.keys()


def test_the_same_experiment_has_the_same_number_in_every_table():
    """D-MAE is one tap of Table 6, and so on: what shows that the tables share a base."""
    papers = {}
    for table in ("3", "6", "7"):
        for row in rows(table, "paper"):
            assert papers.setdefault(json.dumps(row.config.to_dict()), row.paper) == row.paper, row.name


def differences(before, after):
    before, after = flatten(before.to_dict()), flatten(after.to_dict())
    return {key: after[key] for key in after if after[key] != before[key]}


@pytest.mark.parametrize("scale", SCALES)
def test_methods_gain_deep_dynamic_supervision_and_nothing_else(scale):
    """Table 2: DDS-BEiT-v2 is BEiT-v2 with four taps and weights; DDS-MAE has a third of MAE's epochs, too."""
    mae, dds_mae, beitv2, dds_beitv2 = (row.config for row in rows("2", scale))
    deep = {"taps": [3, 6, 9, 12], "tap_weights": [0.75, 0.75, 0.75, 1.0], "dynamic": True}
    length = {"train.epochs": 100, "optim.warmup_epochs": 20} if scale == "paper" else {}
    assert differences(mae, dds_mae) == {f"pixel.{name}": value for name, value in deep.items()} | length
    assert differences(beitv2, dds_beitv2) == {f"token.{name}": value for name, value in deep.items()}


def test_own_rows_change_one_thing():
    first, *others = rows("own", "paper")
    both = [{f"{branch}.{option}": True for branch in ("pixel", "feature")} for option in OPTIONS]
    wanted = [
        {"mask.kind": "beit_block"},
        {"mask.kind": "random"},
        {"feature.warmup_fraction": 0.0},
        {"feature.warmup_fraction": 1.0},
        *both,
    ]
    assert [differences(first.config, row.config) for row in others[:-1]] == wanted
    assert others[-1].name == "BootMAE"


OPTIONS = ("per_tap_norm", "per_tap_head", "cross_attention")


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_row_can_be_run(table, scale):
    for row in rows(table, scale):
        check(row.config)


def test_nothing_is_claimed_within_noise():
    def row(name, *values):
        mean = sum(values) / len(values)
        deviation = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else None
        seeds = {str(n): v for n, v in enumerate(values)}
        return {"row": name, "paper": 78.7, "mean": mean, "deviation": deviation, "seeds": seeds}

    clear = [row("a", 50.0, 50.2, 49.8), row("b", 48.0, 48.2, 47.8)]
    assert best(clear) == "a"
    assert best([row("a", 50.0, 51.0, 49.0), row("b", 49.5, 50.5, 48.5)]).startswith(
        "none: the best rows do not differ"
    )
    assert best([row("a", 50.0), row("b", 48.0)]).startswith("not said: more than one seed")
    assert best([row("a", 50.0, 50.0), row("b", 50.0, 50.0)]).startswith("none")
    results = {"table": "3", "scale": "nano", "judged": "top-1", "rows": clear, "best": "a", "left_out": []}
    assert "| a | 50.00 ± 0.20 | not measured | 3 | 78.7 |" in markdown(results)
    clear[0] |= {"untrained": 40.0, "untrained_deviation": 0.5}
    results["baselines"] = {"raw_pixels": 30.0, "chance": 10.0}
    for text in (markdown(results), page(results).replace("</td><td>", " | ")):
        assert "a | 50.00 ± 0.20 | 40.00 ± 0.50 | 3 | 78.7" in text
        assert "raw pixels, nearest neighbours | 30.00 |" in text
        assert "chance | 10.00 |" in text


def ablate(out, *more):
    words = ["--table", "3", "--scale", "nano", "--out", str(out), *more, "--tracker", "jsonl"]
    return ranks.run_command("launch/ablate.py", *words)


def test_a_table_is_run_and_gone_on_with(tmp_path):
    code, said = ablate(tmp_path / "t", "--only", "DDS-MAE")
    assert code == 0, said[-2000:]
    first = json.loads((tmp_path / "t" / "results.json").read_text())["rows"]
    assert "| chance | " in said
    assert first[3]["untrained"] > 30
    assert [row["mean"] is None for row in first] == [True, True, True, False]
    code, said = ablate(tmp_path / "t", "--only", "DDS-MAE", "MAE")
    assert code == 0, said[-2000:]
    assert "row_3_seed_0 is complete: 60 of 60 steps" in said
    again = json.loads((tmp_path / "t" / "results.json").read_text())["rows"]
    assert [row["mean"] is None for row in again] == [False, True, True, False]
    assert again[3] == first[3]
    for row in (again[0], again[3]):
        assert row["mean"] > 30  # of digits; ten classes
        assert row["deviation"] is None
    assert (tmp_path / "t" / "table.md").read_text() in said
    assert "<td>DDS-MAE</td>" in (tmp_path / "t" / "table.html").read_text()
    more = "--seeds 1 2 --parallel 2 --steps 30 --only MAE".split()
    code, said = ablate(tmp_path / "t", *more)
    assert code == 0, said[-2000:]
    shorter = json.loads((tmp_path / "t" / "results.json").read_text())
    assert [list(row["seeds"]) for row in shorter["rows"]] == [["1", "2"], [], [], []]
    assert shorter["left_out"] == ["row_0_seed_0", "row_3_seed_0"]
    assert "Left out, of other steps, on other data or without baselines: row_0_seed_0" in said
    assert shorter["rows"][0]["deviation"] > 0
    assert "step 30/30" in (tmp_path / "t" / "row_0_seed_1.log").read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        (("--table", "5"), "there is no table '5': the nearest is"),
        (("--scale", "mikro"), "there is no scale 'mikro': the nearest is 'micro'"),
        (("--only", "MEA"), "table 3 has no row 'MEA': there are 'MAE', 'D-MAE', 'DS-MAE', 'DDS-MAE'"),
        (("--scale", "tiny"), "the scale tiny wants --data with shards that have classes"),
        (("--steps", "-1"), "--steps is -1: give 1 or more"),
        (("--scale", "paper", "--data", "d", "--steps", "5"), "--steps is for small runs"),
        (("--data", "nowhere", "--parallel", "2"), "nowhere"),
        (("--table", "2", "--parallel", "2"), "the row 'BEiT-v2, 100 epochs' wants --tokenizer here"),
        (("--table", "2", "--scale", "paper", "--data", "d"), "the row 'BEiT-v2, 100 epochs' wants --tokenizer here"),
    ],
)
def test_mistakes_are_told(words, message, tmp_path, monkeypatch):
    out = tmp_path / "t"
    monkeypatch.setattr(
        "sys.argv", ["ablate", "--table", "3", "--scale", "nano", "--out", str(out), "--tracker", "jsonl", *words]
    )
    with pytest.raises(UserError) as error:
        runpy.run_path(str(ranks.ROOT / "launch" / "ablate.py"))["main"]()
    assert message in str(error.value)
    assert not out.exists()


def test_a_mistake_is_one_sentence(tmp_path):
    code, said = ablate(tmp_path / "t", "--table", "5")
    assert code == 2
    (line,) = [line for line in said.splitlines() if line.startswith("ablate:")]
    assert "there is no table '5': the nearest is" in line


def test_tables_that_do_not_exist():
    with pytest.raises(UserError, match="there are 2, 3, 4, 6, 7, gradient_variants, own"):
        rows("9", "nano")
