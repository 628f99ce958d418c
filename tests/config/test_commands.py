"""Mistakes in how a command is started: another Python, a pattern that the shell has expanded."""

import errno
import os
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


@pytest.mark.parametrize("command", ["launch/pretrain.py --help", "launch/pretrain.py --show", "launch/knn.py --help"])
def test_output_to_a_command_that_has_ended(command):
    finished = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} {command} | true"],
        capture_output=True,
        text=True,
        cwd=ranks.ROOT,
    )
    assert (finished.returncode, finished.stderr) == (0, "")


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "2>/dev/full", ">/dev/full", ">&- 2>&-"])
@pytest.mark.parametrize("command", ["launch/pretrain.py --bad 1", "launch/knn.py --encoder x --data y --k 0.5"])
def test_exit_code_without_an_output(command, redirection):
    finished = subprocess.run(["bash", "-c", f"{sys.executable} {command} {redirection}"], cwd=ranks.ROOT)
    assert finished.returncode == 2


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8 but RANK is not set"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; expected a number of at least 1"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS is 2 but SLURM_LOCALID is not set"),
        ({"SLURM_STEP_NUM_TASKS": "0"}, "SLURM_STEP_NUM_TASKS is '0'; expected a number of at least 1"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "", "SLURM_LOCALID": "0"}, "but SLURM_PROCID is not set"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "without MASTER_ADDR and MASTER"),
        ({"RANK": "one"}, "RANK is 'one'; expected a number"),
    ],
)
def test_variables_of_launchers(variables, message):
    command = [sys.executable, "launch/pretrain.py", "--preset", "demo"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ranks.ROOT, env=os.environ | variables)
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert message in line


def test_a_command_of_one_process_refuses_several(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(SystemExit) as end:
        run_command("knn", lambda: None)
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "knn: WORLD_SIZE is 8, but this command is one process. Start it without a launcher.\n"
    )
    with pytest.raises(SystemExit) as end:
        run_command("doctor", lambda: None, ranks=True)
    assert not end.value.code


class OutOfMemoryError(RuntimeError):
    """As torch's."""


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(errno.ENOSPC, "No space left on device", "x.npz"), "x.npz cannot be used (No space left on device)"),
        (PermissionError(errno.EACCES, "Permission denied", "x.npz"), "x.npz cannot be used (Permission denied)"),
        (OutOfMemoryError("CUDA out of memory"), "memory ran out (CUDA out of memory). Pass a smaller --batch"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "memory ran out"),
    ],
)
def test_failures_of_the_machine_are_sentences(error, message, capsys):
    def fail():
        raise error

    with pytest.raises(SystemExit) as end:
        run_command("knn", fail)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_other_errors_keep_their_traceback():
    def fail():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_command("knn", fail)


def test_every_command_is_tested():
    assert Path("launch/pretrain.py") in COMMANDS
    assert Path("data_prep/shard_imagenet.py") in COMMANDS
