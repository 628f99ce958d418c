"""launch/doctor.py: what works is told, what does not is told too, by exit codes as well."""

import subprocess
import sys

import pytest
import ranks

from ddae import doctor

TRIED = ("versions", "ranks", "deepspeed", "loss", "images", "disk", "checkpoint", "all-reduce", "gloo")


def test_two_ranks_are_well(tmp_path):
    """With a JSON of the run's own batch, which is not the doctor's to mind."""
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 64}')
    words = ["--folder", str(tmp_path / "runs"), "--ds_config", str(tmp_path / "ds.json")]
    both = ranks.start(2, ["launch/doctor.py", *words])
    said = [rank.communicate(timeout=300)[0] for rank in both]
    ranks.clean(both[0].port)
    assert [rank.returncode for rank in both] == [0, 0], said
    for name in TRIED:
        assert f"\n{name:12}" in said[0], name
        assert f"\n{name:12}" not in said[1]
    assert "all of it works" in said[0]
    assert "FAILS" not in said[0]
    assert ": 2 x " in said[0]
    assert "ZeRO 1: written in" in said[0]
    assert "GB/s a rank" in said[0]
    assert list((tmp_path / "runs").iterdir()) == []


def test_what_fails_is_named(tmp_path, monkeypatch, capsys):
    def broken():
        raise OSError("no such decoder\nat all")

    for name in ("versions", "ranks_and_devices", "deepspeed_report", "all_reduce", "gloo"):
        monkeypatch.setattr(doctor, name, lambda: "well")
    monkeypatch.setattr(doctor, "checkpoint", lambda *_: "well")
    monkeypatch.setattr(doctor, "disk", lambda *_: "well")
    monkeypatch.setattr(doctor, "start_process_group", lambda: None)
    monkeypatch.setattr(doctor, "decoders", broken)
    assert doctor.examine(tmp_path, "none.json") == 1
    said = capsys.readouterr().out
    assert "images      FAILS on 1 of 1 ranks: OSError: no such decoder at all\n" in said
    assert "1 of the above do not work" in said


@pytest.mark.parametrize(
    "words, message",
    [
        (["--folder", "/proc/nowhere"], "doctor: --folder /proc/nowhere cannot be made or written"),
        (["--ds_config", "nothing.json"], "doctor: --ds_config nothing.json cannot be read"),
    ],
)
def test_its_mistakes_are_one_sentence(words, message, tmp_path):
    command = [sys.executable, "launch/doctor.py", "--folder", str(tmp_path), *words]
    done = subprocess.run(command, cwd=ranks.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
