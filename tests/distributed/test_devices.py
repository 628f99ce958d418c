"""A GPU that torch cannot use is reported; the CPU is used where there is none, or on purpose."""

import pytest
import ranks
import torch

from ddae.distributed import comm
from ddae.errors import UserError

DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"


@pytest.fixture
def unusable_gpu(tmp_path, monkeypatch):
    """Simulate a machine with a GPU for which torch is built for another driver."""
    (tmp_path / "nvidia0").touch()
    (tmp_path / "version").write_text(DRIVER)
    monkeypatch.setattr(comm, "GPU_FILES", str(tmp_path / "nvidia[0-9]*"))
    monkeypatch.setattr(comm, "DRIVER_FILE", str(tmp_path / "version"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "cuda, reason",
    [
        (
            "13.0",
            r"torch is built for CUDA 13\.0, which needs driver 580 or newer, .* has driver 550\.54\.15",
        ),
        ("14.1", r"torch is built for CUDA 14\.1, which needs driver of a later version"),
        (None, r"torch \S+ is built without CUDA, and the machine has driver 550\.54\.15"),
    ],
)
def test_a_gpu_that_torch_cannot_use(cuda, reason, unusable_gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(UserError, match=rf"has a GPU that cannot be used: {reason}.*--engine\.device cpu"):
        comm.device()
    (unusable_gpu / "version").unlink()
    with pytest.raises(UserError, match="has a GPU that cannot be used"):
        comm.device()


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_that_is_hidden_is_not_missed(hidden, unusable_gpu, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert comm.device() == torch.device("cpu")


def test_a_machine_without_gpu(unusable_gpu):
    (unusable_gpu / "nvidia0").unlink()
    assert comm.device() == torch.device("cpu")


def test_pretrain_and_doctor_refuse(shards, tmp_path):
    (tmp_path / "nvidia0").touch()
    patch = f"from ddae.distributed import comm; comm.GPU_FILES = {str(tmp_path / 'nvidia[0-9]*')!r}; "
    patch += "import os; os.environ.pop('CUDA_VISIBLE_DEVICES', None); import runpy, sys; sys.argv.pop(0); "
    patch += "sys.path.insert(0, 'launch'); "
    patch += "runpy.run_path(sys.argv[0], run_name='__main__')"
    (tmp_path / "patched.py").write_text(patch)
    args = ["launch/pretrain.py", *ranks.arguments(shards, tmp_path / "run", 2, "--train.steps", "2")]
    code, output = ranks.run_command(str(tmp_path / "patched.py"), *args)
    assert (code, "has a GPU that cannot be used" in output) == (2, True), output
    assert not (tmp_path / "run").exists()
    code, output = ranks.run_command(str(tmp_path / "patched.py"), *args, "--engine.device", "cpu")
    assert code == 0, output
    doctor = ("launch/doctor.py", "--folder", str(tmp_path / "doctor"))
    code, output = ranks.run_command(str(tmp_path / "patched.py"), *doctor)
    assert code != 0
    assert "has a GPU that cannot be used" in output
