"""launch/doctor.py: what works is told, what does not is told too, by exit codes as well."""

import pytest
import ranks

from ddae.tools import doctor

TRIED = ("versions", "ranks", "deepspeed", "loss", "images", "disk", "checkpoint", "all-reduce", "gloo")


def test_two_ranks_are_well(tmp_path):
    """With a JSON of the run's own batch, which is not the doctor's to mind."""
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 64}')
    words = ["--folder", str(tmp_path / "runs"), "--ds_config", str(tmp_path / "ds.json")]
    forks = ranks.forks()
    assert forks.wait_all(forks.start(["launch/doctor.py", *words], 2), 300) == [0, 0], forks.log()
    said = forks.log(0), forks.log(1)
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
    code, said = ranks.run_command("launch/doctor.py", "--folder", str(tmp_path), *words)
    assert code == 2
    assert message in said
    assert "Traceback" not in said
