"""What the sharder found: report.json for programs, report.txt for people."""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from ddae.data.shard_writer import replace_text


class OddImage(NamedTuple):
    """An image that was not a plain RGB JPEG, or not the only one of its key or its bytes."""

    source: str  # where it came from
    key: str  # in the shards
    kinds: list[str]
    action: str  # converted, kept or left_out
    same_as: str | None  # source of the first image with the same bytes


def write_report(out: Path, read: int, written: int, odd: list[OddImage], passed_over: list[str]) -> None:
    """Write both files; every image read was written or left out."""
    left_out = sum(image.action == "left_out" for image in odd)
    assert read == written + left_out, (read, written, left_out)
    images = []
    for image in odd:
        entry = image._asdict()
        if image.same_as is None:
            del entry["same_as"]
        images.append(entry)
    kinds = Counter(kind for image in odd for kind in image.kinds)
    content = {"input": read, "written": written, "left_out": left_out, "kinds": dict(kinds.most_common())}
    replace_text(
        out / "report.json", json.dumps(content | {"images": images, "passed_over": passed_over}, indent=1) + "\n"
    )
    lines = [f"{read} images read, {written} written, {left_out} left out", ""]
    lines += [f"{count:8d}  {kind}" for kind, count in kinds.most_common()]
    rows = [("image", "key", "what", "action")]
    rows += [(image.source, image.key, ", ".join(image.kinds) + _same(image), image.action) for image in odd]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    if odd:
        lines.append("")
        lines += [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
        ]
    if passed_over:
        lines += ["", f"{len(passed_over)} files that are no images were passed over:", *passed_over]
    replace_text(out / "report.txt", "\n".join(lines) + "\n")


def _same(image: OddImage) -> str:
    return f" of {image.same_as}" if image.same_as else ""
