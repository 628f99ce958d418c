"""ResultsFile: what is recorded of a run, and files of versions with fewer columns."""

import json

from ddae.ablation.results import ResultsFile, RunKey
from ddae.config.presets import preset

KEY = RunKey("3", "micro", "MAE", 1, 20, "a1b2", "c3d4")
CONFIG = preset("demo")


def write_run(folder, warnings):
    """Write the metrics of a run with a log step per warning (None: no monitor) and betas that fall."""
    rows = [{"step": 10 * n, "beta/pixel/block_02": -0.1 * n} for n in range(len(warnings))]
    for row, warning in zip(rows, warnings, strict=True):
        if warning is not None:
            row["collapse/warning"] = warning
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_run_is_found_again_with_its_betas_and_its_first_warning(tmp_path):
    results = ResultsFile(tmp_path / "results.csv")
    for seed, warnings in enumerate([(0.0, 1.0, 1.0), (0.0, 0.0), (None, None)]):
        key = KEY._replace(seed=seed)
        results.add(key, {"accuracy": 12.345, "chance": 1}, write_run(tmp_path / str(seed), warnings), CONFIG, 2.0)
    found = [results.find(KEY._replace(seed=seed, table="4", row="another name")) for seed in range(4)]
    assert [row and (row["accuracy"], row["warned_at"]) for row in found] == [
        ("12.35", "10"),
        ("12.35", "never"),
        ("12.35", ""),
        None,
    ]
    betas = results.betas.read_text().splitlines()
    assert betas[0].endswith(",after_steps,beta_first,beta_last")
    assert betas[3].endswith(",20,-0.2,-0.2")


def test_an_older_file_gets_the_new_columns(tmp_path):
    results = ResultsFile(tmp_path / "results.csv")
    results.add(KEY, {"accuracy": 10}, write_run(tmp_path / "run", (1.0,)), CONFIG, 2.0)
    new = results.path.read_text()
    older = [line.rsplit(",", 1)[0] for line in new.splitlines()]
    assert older[0].endswith(",minutes")
    results.path.write_text("".join(line + "\n" for line in older))
    results.add(KEY._replace(seed=2), {"accuracy": 11}, tmp_path / "run", CONFIG, 3.0)
    first, second = results.rows()
    assert (first["accuracy"], first["minutes"], first["warned_at"]) == ("10", "2", "")
    assert (second["accuracy"], second["seed"], second["warned_at"]) == ("11", "2", "0")
    results.add(KEY._replace(seed=3), {}, tmp_path / "run", CONFIG, 3.0)
    assert results.path.read_text().splitlines()[0] == new.splitlines()[0]
    assert results.path.read_text().count("warned_at") == 1
    assert len(results.rows()) == 3
