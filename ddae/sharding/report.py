"""What the sharder found: report.json for programs, report.txt to read, report.html to look at."""

import base64
import html
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
    thumbnail: bytes | None  # a small JPEG; None where there are many others, or nothing can be seen


STYLE = """body{font:14px/1.4 system-ui,sans-serif;color:#222;margin:2em}h1{font-size:20px}
div{display:flex;flex-wrap:wrap;gap:14px}figure{width:150px;margin:0}table{margin:1em 0}td{padding-right:1em}
img{width:128px;height:128px;object-fit:contain;background:#eee}figcaption{font-size:11px;overflow-wrap:anywhere}"""


def write_report(out: Path, read: int, written: int, odd: list[OddImage], passed_over: list[str]) -> None:
    """Write the files; every image read was written or left out."""
    left_out = sum(image.action == "left_out" for image in odd)
    assert read == written + left_out, (read, written, left_out)
    images = []
    for image in odd:
        entry = image._asdict()
        del entry["thumbnail"]
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
    replace_text(out / "report.html", _page(lines[0], kinds, [image for image in odd if image.thumbnail], len(odd)))


def _page(title: str, kinds: Counter, shown: list[OddImage], num_odd: int) -> str:
    """One page that needs nothing beside it."""
    counts = "".join(f"<tr><td>{count}</td><td>{kind}</td></tr>" for kind, count in kinds.most_common())
    figures = ""
    for image in shown:
        picture = base64.b64encode(image.thumbnail or b"").decode()
        figures += (
            f'<figure><img alt="" src="data:image/jpeg;base64,{picture}"><figcaption><b>{", ".join(image.kinds)}</b>, '
            f"{image.action}<br>{html.escape(image.source + _same(image))}</figcaption></figure>"
        )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>shards</title><style>{STYLE}</style></head>'
        f"<body><h1>{title}</h1><table>{counts}</table><p>{len(shown)} of the {num_odd} images that were no "
        "plain RGB JPEGs of their own, as they are when converted; report.txt names all.</p>"
        f"<div>{figures}</div></body></html>\n"
    )


def _same(image: OddImage) -> str:
    return f" of {image.same_as}" if image.same_as else ""
