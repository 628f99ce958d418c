"""What is printed, and what goes to the run's log of other packages."""

import logging
import warnings

import pytest

from ddae.distributed import logs


@pytest.fixture
def others(monkeypatch):
    """Return the handler of other packages, new; afterwards the loggers are as before."""
    logging.captureWarnings(False)  # another test may have turned it on, within pytest's own capture
    before = {name: logging.getLogger(name).__dict__.copy() for name in ("ddae", *logs.OTHERS)}
    handler = logs._Others()
    monkeypatch.setattr(logs, "_others", handler)
    yield handler
    logging.captureWarnings(False)
    for name, state in before.items():
        logging.getLogger(name).__dict__.update(state)


def test_other_packages_write_to_the_runs_file(others, tmp_path, capsys):
    logs.configure_logging()
    logger = logging.getLogger("DeepSpeed")
    logger.addHandler(logging.StreamHandler())  # as DeepSpeed does when it is imported
    logs.configure_logging()
    logger.warning("before the folder is known")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("of Python", FutureWarning, stacklevel=1)
    logs.keep_log_of_others(tmp_path / "logs")
    logger.warning("later")
    logger.error("an error")
    text = (tmp_path / "logs" / "rank_00000.txt").read_text()
    positions = [
        text.index(part) for part in ("before the folder is known", "FutureWarning: of Python", "later", "an e")
    ]
    assert positions == sorted(positions)
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.endswith("rank 0] an error")


def test_a_folder_that_cannot_be_written_is_no_error(others, tmp_path):
    logs.configure_logging()
    (tmp_path / "file").write_text("")
    logs.keep_log_of_others(tmp_path / "file" / "logs")
    logging.getLogger("torch").warning("nowhere")


def test_the_memory_before_is_bounded(others):
    logs.configure_logging()
    for number in range(logs.MAX_HELD + 10):
        logging.getLogger("torch").warning("%d", number)
    assert len(others.buffer) == logs.MAX_HELD
    assert others.buffer[-1].getMessage() == str(logs.MAX_HELD + 9)
