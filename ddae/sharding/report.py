"""Report of a sharder run: report.json (for programs), report.txt (a table) and report.html (with thumbnails)."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ddae import atomic
from ddae.pages import data_url, render
from ddae.sharding.accounting import Accounting, Reasons


class ReportedImage(NamedTuple):
    """An image that is not a plain RGB JPEG, or whose key or bytes are those of another image."""

    source: str  # path in the archive or folder
    key: str  # in the shards
    kinds: tuple[str, ...]
    action: str  # converted, kept or left_out
    same_as: str | None  # source of the first image with the same bytes


class Content(NamedTuple):
    """What a report shows. There may be millions of images: they are not held in memory."""

    accounting: Accounting
    kinds: Counter[str]  # number of images of each kind
    images: Callable[[], Iterable[ReportedImage]]
    thumbnails: list[tuple[ReportedImage, bytes]]  # of some images, as JPEGs
    other_files: Reasons  # files that are not images


def write_report(out: Path, content: Content) -> None:
    """Write the three files."""
    atomic.write_text_durably(out / "report.json", _json(content))
    atomic.write_text_durably(out / "report.txt", _text(content))
    atomic.write_text_durably(out / "report.html", _page(content))


def _json(content: Content) -> Iterator[str]:
    """Yield report.json in pieces: a line per image."""
    accounting, kinds = content.accounting, dict(content.kinds.most_common())
    head = accounting.to_json() | {"left_out": accounting.left_out.to_json(), "kinds": kinds}
    yield json.dumps(head, indent=1).removesuffix("\n}")
    yield ',\n "images": ['
    separator = "\n  "
    for image in content.images():
        entry = image._asdict()
        if image.same_as is None:
            del entry["same_as"]
        yield separator + json.dumps(entry)
        separator = ",\n  "
    yield f'\n ],\n "other_files": {json.dumps(content.other_files.to_json(), indent=1)}\n}}\n'


def _text(content: Content) -> Iterator[str]:
    """Yield report.txt in lines."""
    yield f"{content.accounting}\n\n"
    yield from (f"{count:8d}  {kind}\n" for kind, count in content.kinds.most_common())
    if content.kinds:
        widths = [0, 0, 0]
        for row in _rows(content):
            widths = [max(width, len(cell)) for width, cell in zip(widths, row, strict=False)]
        yield "\n"
        yield from ("  ".join(map(str.ljust, row, (*widths, 0))) + "\n" for row in _rows(content))
    left_out = content.accounting.left_out
    for heading, reasons in (("left out without being read", left_out), ("other files", content.other_files)):
        for reason, count in reasons.counts.most_common():
            names = reasons.names[reason] if reason not in content.kinds else []
            if names:
                yield f"\n{heading}: {count:,} {reason}\n"
                yield from (f"{name}\n" for name in names)
                yield f"and {count - len(names):,} more\n" if count > len(names) else ""


def _rows(content: Content) -> Iterator[tuple[str, str, str, str]]:
    """Yield the rows of the table of images, after its header."""
    yield "image", "key", "kinds", "action"
    for image in content.images():
        kinds = ", ".join(image.kinds) + (f" of {image.same_as}" if image.same_as else "")
        yield image.source, image.key, kinds, image.action


def _page(content: Content) -> str:
    """Return a self-contained HTML page."""
    images = [
        {
            "picture": data_url(jpeg, "jpeg"),
            "kinds": ", ".join(image.kinds),
            "action": image.action,
            "source": image.source,
            "same_as": image.same_as,
        }
        for image, jpeg in content.thumbnails
    ]
    return render("shards", title=str(content.accounting), kinds=content.kinds.most_common(), images=images)
