"""Progress of training and of work on images: a bar on a terminal, lines elsewhere."""

import os
import pty
import re
import subprocess
import sys

import pytest

from ddae.distributed.logs import configure_logging
from ddae.progress import ImageProgress, clock
from ddae.training import progress
from ddae.training.progress import TrainingProgress, describe

ROW = {
    "step": 1000,
    "epoch": 2.5,
    "loss/total": 0.75,
    "loss/spike": 0.0,
    "time/step": 0.5,
    "time/step_max": 0.625,
    "time/data_wait": 0.01,
    "time/data_wait_max": 0.25,
    "throughput/images_per_s": 128.4,
}
SHOWN = "epoch 2.5  step 1000/8200  loss 0.7500  128 images/s  data wait 2%"


def on_a_terminal(program: str, environment=()) -> str:
    """Run a program with its output on a pseudo-terminal. Return what it prints, with the terminal's control codes."""
    parent, child = pty.openpty()
    variables = {**os.environ, "TERM": "xterm", "COLUMNS": "150", **dict(environment)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=child, stderr=child, env=variables) as process:
        os.close(child)
        printed = b""
        try:
            while chunk := os.read(parent, 65536):
                printed += chunk
        except OSError:  # the terminal's other end is closed
            pass
    os.close(parent)
    assert process.returncode == 0, printed.decode()
    return printed.decode()


def visible(printed: str) -> list[str]:
    """Return the lines of a terminal's output, without colours, and of a line that was drawn anew its last form."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed)
    return [line.rpartition("\r")[2].rstrip() for line in text.replace("\r\n", "\n").split("\n")]


def test_a_log_step_as_text():
    assert describe(ROW, 8200, has_rate=True) == SHOWN + "  left 1:00:00"
    assert describe(ROW, 8200, has_rate=False) == SHOWN
    marked = describe(ROW | {"loss/spike": 1.0, "collapse/warning": 1.0, "throughput/mfu": 0.41}, 8200, has_rate=False)
    assert marked == SHOWN.replace("images/s", "images/s  MFU 41%") + "  SPIKE  COLLAPSE"


def test_a_log_step_of_several_ranks_shows_the_slowest(monkeypatch):
    monkeypatch.setattr(progress, "world_size", lambda: 2)
    shown = describe(ROW, 8200, has_rate=True)
    assert shown == SHOWN + " (largest 40%)  slowest rank 0.625 s/step  left 1:00:00"


@pytest.mark.parametrize("seconds, shown", [(0, "0:00:00"), (3725.9, "1:02:05"), (100 * 3600, "100:00:00")])
def test_durations(seconds, shown):
    assert clock(seconds) == shown


def test_lines_without_a_terminal(capsys):
    configure_logging()
    shown = TrainingProgress(0, 8200)
    shown.step_done(1)
    shown.log(ROW)
    shown.log(ROW)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("] ")[2] for line in lines] == [SHOWN, SHOWN + "  left 1:00:00"]


def test_a_bar_on_a_terminal():
    """Log lines go above the bar, and a row with a spike is such a line."""
    program = f"""
import logging
from ddae.distributed.logs import configure_logging
from ddae.training.progress import TrainingProgress
configure_logging()
progress = TrainingProgress(0, 8200)
progress.step_done(1)
progress.log({ROW!r})
logging.getLogger("ddae").info("a checkpoint")
progress.log({ROW | {"loss/spike": 1.0}!r})
progress.close()
print("the end")
"""
    lines = visible(on_a_terminal(program))
    assert any(line.endswith("a checkpoint") for line in lines)
    spikes = [line for line in lines if line.endswith("left 1:00:00  SPIKE")]
    assert len(spikes) == 2, lines  # the line and the bar
    assert "━" in spikes[1]
    assert "12 %" in spikes[1]
    assert lines.index("the end") > lines.index(spikes[1])


def test_images(capsys):
    with ImageProgress(100, 20) as progress:
        assert list(progress.track(range(80))) == list(range(80))
    assert re.fullmatch(r"100 of 100 images  [0-9,]+ images/s\n", capsys.readouterr().err)
    with ImageProgress(100, enabled=False) as progress:
        progress.update(3)
    assert capsys.readouterr().err == ""


def test_images_on_a_terminal():
    program = """
from ddae.progress import ImageProgress
with ImageProgress(3) as progress:
    for number in progress.track(range(3)):
        print("image", number)
"""
    lines = visible(on_a_terminal(program))
    assert [line for line in lines if line.startswith("image")] == ["image 0", "image 1", "image 2"]
    assert any("100 % 3 of 3 images" in line for line in lines)
    assert "━" not in "".join(visible(on_a_terminal(program, {"TERM": "dumb"})))
