"""The benchmark of saves: both ways to save are measured, and no file is left."""

import json

import ranks


def test_both_ways_to_save_are_measured(tmp_path):
    options = ("--preset", "demo", "--rounds", "1", "--json", str(tmp_path / "saves.json"))
    before = set(ranks.ROOT.iterdir())
    code, output = ranks.run_command("launch/benchmark.py", "saves", *options, "--ds_config", "zero2")
    assert code == 0, output
    rows = json.loads((tmp_path / "saves.json").read_text())
    assert [row["saving"] for row in rows] == ["waits", "background"]
    assert all(0 < row["stopped_s"] <= row["complete_s"] for row in rows)
    assert "training stops for" in output
    assert not [path for path in set(ranks.ROOT.iterdir()) - before if path.name.startswith(".saves_")]
