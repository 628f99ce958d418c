"""Progress bars on a terminal, and progress lines elsewhere."""

import atexit
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ddae.errors import say

REDRAW_S = 0.1  # shortest time between two drawings of a bar
LINE_S = 10.0  # time between two lines where there is no terminal

T = TypeVar("T")


class Bar:
    """A bar at the bottom of a terminal; what is printed meanwhile goes above it.

    No thread draws it, so that processes can be forked at any time. A terminal that is gone ends nothing.
    """

    def __init__(self, stream: TextIO, total: int, done: int = 0):
        console = Console(file=stream)
        columns = BarColumn(30), TextColumn("{task.percentage:>3.0f} %"), TextColumn("{task.description}", markup=False)
        self._progress = Progress(*columns, console=console, auto_refresh=False)
        self._task = self._progress.add_task("", total=max(1, total), completed=done)
        self._drawn_at = 0.0
        atexit.register(self.close)
        with suppress(OSError):
            self._progress.start()
            console.show_cursor()  # which a killed process would leave hidden

    def update(self, done: int, text: str | None = None) -> None:
        """Show that `done` of the total is done, and the text beside the bar, unless it was drawn just now."""
        with suppress(OSError):
            self._progress.update(self._task, completed=done, description=text)
            if time.monotonic() > self._drawn_at + REDRAW_S:
                self._progress.refresh()
                self._drawn_at = time.monotonic()

    def close(self) -> None:
        """Draw the bar a last time, and leave it above what is printed next."""
        atexit.unregister(self.close)
        with suppress(OSError):
            self._progress.refresh()
            self._progress.stop()


class ImageProgress(AbstractContextManager):
    """Progress through `total` images, on standard error: a bar, or without a terminal a line every LINE_S seconds."""

    def __init__(self, total: int, done: int = 0, enabled: bool = True):
        self.done, self._total, self._first, self._enabled = done, total, done, enabled
        self._start = self._line_at = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> "ImageProgress":
        if self._enabled and is_terminal(sys.stderr):
            self._bar = Bar(sys.stderr, self._total, self.done)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._bar is not None:
            self._bar.update(self.done, self._text())
            self._bar.close()
        elif self._enabled and kind is None:
            say(self._text(), sys.stderr)

    def update(self, done: int) -> None:
        """Report that `done` images are done."""
        self.done = done
        if self._bar is not None:
            self._bar.update(done, self._text())
        elif self._enabled and time.monotonic() > self._line_at + LINE_S:
            say(self._text(), sys.stderr)
            self._line_at = time.monotonic()

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, one for each image, and report each."""
        for done, item in enumerate(items, self.done + 1):
            self.update(done)
            yield item

    def _text(self) -> str:
        seconds, done = time.monotonic() - self._start, self.done - self._first
        text = f"{self.done:,} of {self._total:,} images  {done / max(seconds, 1e-3):,.0f} images/s"
        is_running = 0 < done < self._total - self._first
        return text + (f"  {clock((self._total - self.done) * seconds / done)} left" if is_running else "")


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal on which a bar can be drawn."""
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    except ValueError:  # it is closed
        return False


def clock(seconds: float) -> str:
    """Return a duration as hours:minutes:seconds."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
