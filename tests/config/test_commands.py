"""Mistakes in how a command is started: another Python, a pattern that the shell has expanded."""

import subprocess
import sys
from pathlib import Path

import pytest
import ranks

from ddae.errors import run_command

COMMANDS = sorted(
    path.relative_to(ranks.ROOT)
    for folder in ("launch", "data_prep")
    for path in (ranks.ROOT / folder).glob("*.py")
    if path.name != "require_packages.py"
)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_python_without_the_packages_is_named(command):
    without_packages = [sys.executable, "-I", "-S"]  # -I also ignores PYTHONPATH, and the script's folder
    start = f"import runpy, sys; sys.argv = [{str(command)!r}]; sys.path.insert(0, {str(command.parent)!r}); "
    start += "runpy.run_path(sys.argv[0], run_name='__main__')"
    finished = subprocess.run([*without_packages, "-c", start], capture_output=True, text=True, cwd=ranks.ROOT)
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith(f"{command}: {sys.executable} lacks the package ddae. Run make venv once;")


@pytest.mark.parametrize(
    "args, is_pattern",
    [(["--data", "a-0.tar", "a-1.tar"], True), (["--data", "a.tar", "--out", "b.tar"], False), (["--wrong"], False)],
)
def test_an_expanded_pattern_is_named(args, is_pattern, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["knn.py", *args])

    def fail():
        sys.exit(2)  # as argparse does for unrecognized arguments

    with pytest.raises(SystemExit):
        run_command("knn", fail)
    assert ("Put it in quotes, as 'train-{000000..000099}.tar'" in capsys.readouterr().err) == is_pattern


def test_every_command_is_tested():
    assert Path("launch/pretrain.py") in COMMANDS
    assert Path("data_prep/shard_imagenet.py") in COMMANDS
