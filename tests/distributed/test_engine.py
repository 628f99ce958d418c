"""Gradient check, clipping and skipped steps equal plain PyTorch's; DeepSpeed has the expected attributes."""

import json
import subprocess
import sys

import pytest
import ranks

PROGRAM = """
import json, sys
import torch
from deepspeed.utils import groups
from ddae.distributed.comm import device
from ddae.distributed import zero_state
from ddae.distributed.engine import Engine, start_process_group, stop_process_group
from ddae.distributed.zero_state import ZeroState

stage, precision = int(sys.argv[1]), sys.argv[2]
start_process_group(timeout_s=77)
for group in (torch.distributed.group.WORLD, groups._get_data_parallel_group()):  # also DeepSpeed's
    assert group._get_backend(device()).options._timeout.total_seconds() == 77

def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))

def adam(module):
    return torch.optim.AdamW(module.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

class Loss(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
    def forward(self, x, scale):
        return self.inner(x.to(self.inner[0].weight)).float().square().mean() * scale

results = {}
for clip in (0.0, 0.05):
    plain, module = Loss(build()).to(device()), Loss(build())
    start = {name: values.detach().cpu().clone() for name, values in plain.named_parameters()}
    ds_json = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": clip,
               "zero_optimization": {"stage": stage}, "bf16": {"enabled": precision == "bf16"}}
    engine, plain_adam = Engine(module, adam(module), ds_json), adam(plain)
    norms, applied = [], []
    for step, scale in enumerate((1.0, 3.0, float("nan"), 0.5, float("inf"), 1.0)):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        engine.backward(engine(x, scale))
        applied.append(float(engine.step(0.01)))
        plain_adam.zero_grad()
        plain(x, scale).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip or float("inf"))
        if norm.isfinite():
            norms.append((engine.grad_norm(), float(norm)))
            plain_adam.param_groups[0]["lr"] = 0.01
            plain_adam.step()
    weights = engine.weights(engine.module)
    changes = {name: values.detach().cpu() - start[name] for name, values in plain.named_parameters()}
    errors = {name: weights[name] - start[name] - change for name, change in changes.items()}
    error = max(float(errors[name].abs().max() / change.abs().max()) for name, change in changes.items())
    steps = sorted({int(state["step"]) for state in engine.adam.state.values()})
    results[str(clip)] = {"applied": applied, "norms": norms, "error": error, "steps": steps}
zero_state.REQUIRED = {stage: ("renamed_in_this_version",)}
try:
    ZeroState(engine.deepspeed, engine.adam)
except RuntimeError as error:
    results["contract"] = str(error)
print("RESULTS", json.dumps(results))
stop_process_group()
"""


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.faults)])
@pytest.mark.parametrize(
    "stage", [0, pytest.param(1, marks=pytest.mark.faults), 2, pytest.param(3, marks=pytest.mark.faults)]
)
def test_clipping_norms_and_skipped_steps_equal_plain_pytorch(stage, precision):
    command = [sys.executable, "-c", PROGRAM, str(stage), precision]
    process = subprocess.run(command, cwd=ranks.ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    line = next(line for line in process.stdout.splitlines() if line.startswith("RESULTS"))
    tolerance = 1e-4 if precision == "fp32" else 0.1  # relative to a parameter's largest change
    results = json.loads(line.removeprefix("RESULTS"))
    assert ".renamed_in_this_version, which ddae reads; expected deepspeed>=0.19.8,<0.20" in results.pop("contract")
    for result in results.values():
        assert result["applied"] == [1, 1, 0, 1, 0, 1]
        assert result["steps"] == [4]
        assert result["error"] < tolerance
        for norm, expected in result["norms"]:
            assert norm == pytest.approx(expected, rel=max(tolerance, 1e-5))
