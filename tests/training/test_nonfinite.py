"""Non-finite gradients in a supervised task: the same exit code and dump as in pretraining (test_whole_runs.py)."""

import json

import golden
import ranks
from conftest import make_shards


def test_fine_tuning_leaves_a_dump_and_exits_with_1(encoder_folder, tmp_path):
    (tmp_path / "images").mkdir()
    images = make_shards(make_shards(tmp_path / "images"), (16,), "val", 100)
    run = tmp_path / "run"
    command = ["launch/finetune.py", *golden.finetune_arguments("fp32", 10), "--optim.lr", "1e36"]
    command += ["--run_dir", str(run)]
    command += ["--data.train", str(images), "--encoder", str(encoder_folder)]
    command += ["--ds_config", str(ranks.ROOT / "ds_configs" / "zero1.json")]
    code, log = ranks.run_command(*command)
    assert code == 1, log
    assert "NonFiniteError: non-finite gradients in 3 consecutive steps" in log
    (dump,) = (run / "dumps").glob("step_*")
    assert f"python launch/replay.py {dump}" in log
    recorded = json.loads((dump / "layers_00000.json").read_text())
    assert len(recorded["samples"]) == 16
    code, report = ranks.run_command("launch/replay.py", str(dump))
    assert code == 1, report
    assert "recorded by the run, not computed again" in report
    assert "<-- non-finite" in report
