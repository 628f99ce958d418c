"""launch/doctor.py: its table of checks and its exit codes, if all checks pass and if one fails."""

import pytest
import ranks

from ddae.tools import doctor

CHECKS = ("versions", "ranks", "deepspeed", "loss", "images", "disk", "checkpoint", "all-reduce", "gloo")


def test_all_checks_pass_on_two_ranks(tmp_path):
    """With a JSON that sets the run's micro-batch, which the doctor ignores."""
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 64}')
    args = ["--folder", str(tmp_path / "runs"), "--ds_config", str(tmp_path / "ds.json")]
    forks = ranks.forks()
    assert forks.wait_all(forks.start(["launch/doctor.py", *args], 2), 300) == [0, 0], forks.log()
    output = forks.log(0), forks.log(1)
    for name in CHECKS:
        assert f"\n{name:12}" in output[0], name
        assert f"\n{name:12}" not in output[1]
    assert "all checks passed" in output[0]
    assert "FAILED" not in output[0]
    assert ": 2 x " in output[0]
    assert "ZeRO 1: written in" in output[0]
    assert "GB/s a rank" in output[0]
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_failed_check_is_reported(tmp_path, monkeypatch, capsys):
    def broken():
        raise OSError("no such decoder\nat all")

    for name in ("versions", "ranks_and_devices", "deepspeed_report", "all_reduce", "gloo"):
        monkeypatch.setattr(doctor, name, lambda: "passed")
    monkeypatch.setattr(doctor, "checkpoint", lambda *_: "passed")
    monkeypatch.setattr(doctor, "disk", lambda *_: "passed")
    monkeypatch.setattr(doctor, "start_process_group", lambda: None)
    monkeypatch.setattr(doctor, "decoders", broken)
    assert doctor.run_checks(tmp_path, "none.json") == 1
    output = capsys.readouterr().out
    assert "images      FAILED on 1 of 1 ranks: OSError: no such decoder at all\n" in output
    assert "1 checks failed" in output


@pytest.mark.parametrize(
    "args, message",
    [
        (["--folder", "/proc/nowhere"], "doctor: --folder /proc/nowhere cannot be created or written"),
        (["--ds_config", "nothing.json"], "doctor: --ds_config nothing.json cannot be read"),
    ],
)
def test_user_errors_have_no_traceback(args, message, tmp_path):
    code, output = ranks.run_command("launch/doctor.py", "--folder", str(tmp_path), *args)
    assert code == 2
    assert message in output
    assert "Traceback" not in output
