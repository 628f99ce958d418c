"""What became of every file of a source: counts by reason, and the first names of each."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

MAX_NAMES = 20  # per reason


class Reasons:
    """Counts by reason, with the first names of each: bounded, however many files there are."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str | Callable[[], str] = "", count: int = 1) -> None:
        """Count files; name: of the first one, or a function that returns it."""
        if not count:
            return
        self.counts[reason] += count
        names = self.names.setdefault(reason, [])
        if name and len(names) < MAX_NAMES:
            names.append(name if isinstance(name, str) else name())

    def total(self) -> int:
        return sum(self.counts.values())

    def __add__(self, other: "Reasons") -> "Reasons":
        """Return the sum."""
        result = Reasons()
        for each in (self, other):
            result.counts += each.counts
            for reason, names in each.names.items():
                result.names[reason] = [*result.names.get(reason, []), *names][:MAX_NAMES]
        return result

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Return {reason: {"count": n, "first": names}}, the most frequent reason first."""
        return {reason: {"count": n, "first": self.names.get(reason, [])} for reason, n in self.counts.most_common()}

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in self.counts.most_common())


class Tally:
    """The files of a source that are not among the images of a split."""

    def __init__(self, other: "Tally | None" = None):
        """other: a tally to copy."""
        self.left_out = Reasons() if other is None else other.left_out + Reasons()  # images
        self.other_files = Reasons() if other is None else other.other_files + Reasons()  # labels, hidden files, ...


class Accounting(NamedTuple):
    """What became of the images of all splits: found = written + converted + left out."""

    written: int  # unchanged
    converted: int
    left_out: Reasons

    @property
    def found(self) -> int:
        """Number of images of the sources."""
        return self.written + self.converted + self.left_out.total()

    def to_json(self) -> dict[str, Any]:
        """Return the entry of manifest and report."""
        counts = {"found": self.found, "written": self.written, "converted": self.converted}
        return counts | {"left_out": dict(self.left_out.counts.most_common())}

    def __str__(self) -> str:
        reasons = f" ({self.left_out})" if self.left_out.counts else ""
        return (
            f"{self.found:,} images found = {self.written:,} written unchanged + {self.converted:,} converted + "
            f"{self.left_out.total():,} left out{reasons}"
        )
