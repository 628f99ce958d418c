"""Failures that end a rank in a sentence: out of memory, a connection that is lost."""

import os
import signal
import subprocess
import time

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.utils import cpp_extension

from ddae.config.deepspeed import load
from ddae.config.presets import preset
from ddae.distributed.failures import explained, operators_may_be_built
from ddae.distributed.logs import configure_logging
from ddae.errors import RankError, UserError
from ddae.training.gpu_memory import GIB, explain_memory

REPORT = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1 GiB is free. "
    "If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True."
)
OUT_OF_MEMORY = f"""
import torch
from ddae.training.step import ForwardPass
from ddae.config.cli import PRETRAINING, launch

def fail(*_):
    raise torch.OutOfMemoryError({REPORT!r})

ForwardPass.__call__ = fail
launch(PRETRAINING, "ddae.train:pretrain")
"""


def test_out_of_memory_ends_with_the_memory_by_part(shards, tmp_path):
    code, output = ranks.run_command("-c", OUT_OF_MEMORY, *ranks.arguments(shards, tmp_path / "run", 2))
    assert code == 2, output
    (message,) = [line for line in output.splitlines() if line.startswith("ddae: rank 0 on ")]
    assert "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB" in message
    assert "expandable_segments" not in message
    assert "Planned for a micro-batch of 16 at ZeRO 2, in GiB: weights 0.00, gradients" in message
    assert "Traceback" not in output


def test_the_plan_names_the_micro_batch_that_fits():
    config, settings = preset("ddae_vit_l16_800e"), load("ds_configs/zero2.json")
    on_gpu_of = {gib: explain_memory(config, settings, 8, 512, gib * GIB) for gib in (1, 40, 80)}
    assert "at ZeRO 2, in GiB: weights 0.63, gradients" in on_gpu_of[40]
    assert "Set train_micro_batch_size_per_gpu to 256 in the DeepSpeed JSON, which fits" in on_gpu_of[40]
    assert "No micro-batch fits" in on_gpu_of[1]
    assert "By the plan this fits" in on_gpu_of[80]


@pytest.mark.parametrize(
    "error, code, message",
    [
        (torch.OutOfMemoryError(REPORT), 2, "the GPU is out of memory (CUDA out of memory. Tried to allocate 2.00 GiB"),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:5"), 70, "closed by peer"),
        (OSError(28, "No space left on device", "/runs/a"), 2, "/runs/a cannot be written (No space left on device)"),
        (dist.DistBackendError("NCCL error: remote process exited"), 70, "remote process exited"),
    ],
)
def test_a_failure_is_a_sentence_with_an_exit_code(error, code, message):
    with pytest.raises(RankError) as caught, explained():
        raise error
    assert caught.value.code == code
    assert message in str(caught.value)


def test_other_errors_keep_their_traceback():
    for error in (RuntimeError("shapes differ"), FileNotFoundError(2, "No such file")):
        with pytest.raises(type(error)) as caught, explained():
            raise error
        assert not isinstance(caught.value, RankError)


def test_a_failed_compilation_is_a_sentence():
    with pytest.raises(UserError, match=r"cannot be compiled .*gcc: not found"), operators_may_be_built():
        raise RuntimeError("Error building extension 'cpu_adam': gcc: not found")
    with pytest.raises(KeyboardInterrupt), operators_may_be_built():
        raise RuntimeError("Error building extension 'cpu_adam': ninja: build stopped: interrupted by user.")
    with pytest.raises(KeyboardInterrupt), operators_may_be_built():
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("is_built", [False, True])
def test_a_compilation_is_announced(is_built, tmp_path, monkeypatch, capsys):
    configure_logging()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "load", lambda name, sources: f"{name} of {sources}")
    if is_built:
        (tmp_path / "cpu_adam").mkdir()
        (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
    with operators_may_be_built():
        assert cpp_extension.load("cpu_adam", sources="a.cpp") == "cpu_adam of a.cpp"
    assert ("building DeepSpeed's operator cpu_adam for this machine, once" in capsys.readouterr().out) != is_built


@pytest.mark.faults
def test_ctrl_c_while_an_operator_is_compiled(shards, tmp_path, record_result):
    """Ctrl-C to torchrun and two ranks while DeepSpeed's shared-memory operator is compiled."""
    args = ranks.arguments(shards, tmp_path / "run", 2, "--train.steps", "2")
    launch = ["torchrun", "--nproc_per_node", "2", "--master_port", str(ranks.free_port())]
    env = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = f"{ranks.ROOT}:{ranks.ROOT / 'kernels'}"
    with open(tmp_path / "log", "w") as log:
        options = {"stdout": log, "stderr": log, "start_new_session": True}
        launcher = subprocess.Popen([*launch, "launch/pretrain.py", *args], env=env, cwd=ranks.ROOT, **options)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("extensions/*/build.ninja")):
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.1)
    time.sleep(2)
    os.killpg(launcher.pid, signal.SIGINT)
    since = time.monotonic()
    assert launcher.wait(60) != 0
    seconds = time.monotonic() - since
    log = (tmp_path / "log").read_text()
    assert "ddae: interrupted before training began" in log
    assert "Error building extension" not in log
    assert not (tmp_path / "run").exists()
    record_result(f"all processes exited after {seconds:.1f} s, without a trace of the compilation")
