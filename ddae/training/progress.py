"""Progress of training on the terminal: a bar, or a line at each log step where there is no terminal."""

import logging
import sys

from ddae.distributed.comm import is_main, world_size
from ddae.progress import Bar, clock, is_terminal

logger = logging.getLogger(__name__)


class TrainingProgress:
    """Progress of a run on rank 0, from step `start` to `num_steps`."""

    def __init__(self, start: int, num_steps: int):
        self._num_steps, self._has_rate, self._text = num_steps, False, f"step {start}/{num_steps}"
        self._bar = Bar(sys.stdout, num_steps, start) if is_main() and is_terminal(sys.stdout) else None

    def step_done(self, done: int) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(done, self._text)

    def log(self, row: dict[str, float]) -> None:
        """Show a log step's row: epoch, step, loss, images/s, MFU, share of time spent waiting for data, time left.

        With several ranks also the slowest one's time per step, and the largest share of waiting.
        """
        self._text = describe(row, self._num_steps, self._has_rate)
        self._has_rate = True  # the first row contains the first step, which takes longer
        if self._bar is None:
            logger.info("%s", self._text)
            return
        self._bar.update(int(row["step"]), self._text)
        if is_unusual(row):
            logger.info("%s", self._text)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def describe(row: dict[str, float], num_steps: int, has_rate: bool) -> str:
    """Return a log step's row as text; has_rate: its time per step is that of the steps to come."""
    step, seconds = int(row["step"]), row["time/step"]
    mfu = f"  MFU {row['throughput/mfu']:.0%}" if "throughput/mfu" in row else ""
    wait, ranks = f"{row['time/data_wait'] / seconds:.0%}", ""
    if world_size() > 1:
        wait += f" (largest {row['time/data_wait_max'] / row['time/step_max']:.0%})"
        ranks = f"  slowest rank {row['time/step_max']:.3g} s/step"
    left = f"  left {clock((num_steps - step) * seconds)}" if has_rate else ""
    marks = f"{'  SPIKE' if row['loss/spike'] else ''}{'  COLLAPSE' if row.get('collapse/warning') else ''}"
    return (
        f"epoch {row['epoch']:.4g}  step {step}/{num_steps}  loss {row['loss/total']:.4f}  "
        f"{row['throughput/images_per_s']:.0f} images/s{mfu}  data wait {wait}{ranks}{left}{marks}"
    )


def is_unusual(row: dict[str, float]) -> bool:
    """Return whether a log step's row has a spike or a warning."""
    return bool(row["loss/spike"] or row.get("collapse/warning"))
