"""Whether steps were applied: the device decides it, and the host learns it without making the device wait."""

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class Outcomes:
    """Flags on their way from the device. On a GPU that of a step is read after the next one's work is in the queue,
    which is the same moment on all ranks: what they do about it, they do together."""

    def __init__(self) -> None:
        self._coming: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, applied: Tensor) -> None:
        """applied: float32 [], 1 where the step's update was made, else 0."""
        if not applied.is_cuda:
            self._coming.append((step, applied, None))
            return
        there, event = torch.empty((), pin_memory=True), torch.cuda.Event()
        there.copy_(applied, non_blocking=True)
        event.record()
        self._coming.append((step, there, event))

    def known(self, wait: Callable[[], bool] = lambda: False) -> Iterator[tuple[int, bool]]:
        """Steps and whether they were applied, each once, in order; a GPU's last step, too, where wait() says so after
        those before it."""
        while self._coming:
            step, flag, event = self._coming[0]
            if event is not None:
                if len(self._coming) == 1 and not wait():
                    return
                if not event.query():  # the device is a whole step behind: it has enough to do meanwhile
                    event.synchronize()
            self._coming.popleft()
            yield step, bool(flag.numpy())
