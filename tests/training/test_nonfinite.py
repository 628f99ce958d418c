"""Non-finite gradients in a supervised task: the same exit code and dump as in pretraining (test_whole_runs.py)."""

import json

import golden
import pytest
import ranks
from conftest import make_shards

PROBE = (
    "--preset demo --tracker.kind jsonl --train.no_report --data.workers 0 --data.batch_size 16 --data.backend pillow"
)
COMMANDS = {
    "finetune": [*golden.finetune_arguments("fp32", 10), "--ds_config", str(ranks.ROOT / "ds_configs" / "zero3.json")],
    "linear_probe": [*PROBE.split(), "--train.steps", "10"],
}


@pytest.mark.parametrize("task", COMMANDS)
def test_a_supervised_task_leaves_a_dump_and_exits_with_1(task, encoder_folder, tmp_path):
    (tmp_path / "images").mkdir()
    images = make_shards(make_shards(tmp_path / "images"), (16,), "val", 100)
    run = tmp_path / "run"
    paths = ["--run_dir", str(run), "--data.train", str(images), "--encoder", str(encoder_folder)]
    code, log = ranks.run_command(f"launch/{task}.py", *COMMANDS[task], "--optim.lr", "1e38", *paths)
    assert code == 1, log
    assert "NonFiniteError: non-finite gradients in 3 consecutive steps" in log
    (dump,) = (run / "dumps").glob("step_*")
    assert f"python launch/replay.py {dump}" in log
    recorded = json.loads((dump / "layers_00000.json").read_text())
    assert len(recorded["samples"]) == 16
    assert recorded["layers"]
    assert all(layer.keys() == {"output", "gradient"} for layer in recorded["layers"].values())
    code, report = ranks.run_command("launch/replay.py", str(dump))
    assert code == 1, report
    assert "recorded by the run, not computed again" in report
    assert "<-- non-finite" in report
