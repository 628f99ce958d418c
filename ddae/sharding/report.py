"""Report of a sharder run: report.json (for programs), report.txt (a table) and report.html (with thumbnails)."""

import base64
import html
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from ddae import atomic
from ddae.sharding.accounting import Accounting, Reasons


class ReportedImage(NamedTuple):
    """An image that is not a plain RGB JPEG, or whose key or bytes are those of another image."""

    source: str  # path in the archive or folder
    key: str  # in the shards
    kinds: list[str]
    action: str  # converted, kept or left_out
    same_as: str | None  # source of the first image with the same bytes
    thumbnail: bytes | None  # JPEG; None if the image cannot be decoded, or enough of its kind have one


STYLE = """body{font:14px/1.4 system-ui,sans-serif;color:#222;margin:2em}h1{font-size:20px}
div{display:flex;flex-wrap:wrap;gap:14px}figure{width:150px;margin:0}table{margin:1em 0}td{padding-right:1em}
img{width:128px;height:128px;object-fit:contain;background:#eee}figcaption{font-size:11px;overflow-wrap:anywhere}"""


def write_report(out: Path, accounting: Accounting, images: list[ReportedImage], other_files: Reasons) -> None:
    """Write the three files. other_files: those that are not images."""
    kinds = Counter(kind for image in images for kind in image.kinds)
    content = {**accounting.to_json(), "kinds": dict(kinds.most_common())}
    content["left_out"] = accounting.left_out.to_json()
    content |= {"images": [_json_entry(image) for image in images], "other_files": other_files.to_json()}
    atomic.write_text_durably(out / "report.json", json.dumps(content, indent=1) + "\n")
    title = str(accounting)
    lines = [title, "", *(f"{count:8d}  {kind}" for kind, count in kinds.most_common())]
    if images:
        rows = [("image", "key", "kinds", "action")]
        rows += [(image.source, image.key, ", ".join(image.kinds) + _same_as(image), image.action) for image in images]
        widths = [*(max(len(row[column]) for row in rows) for column in range(3)), 0]
        lines += ["", *("  ".join(map(str.ljust, row, widths)) for row in rows)]
    for heading, reasons in (("left out without being read", accounting.left_out), ("other files", other_files)):
        for reason, count in reasons.counts.most_common():
            if names := reasons.names[reason] if reason not in kinds else []:
                more = [f"and {count - len(names):,} more"] if count > len(names) else []
                lines += ["", f"{heading}: {count:,} {reason}", *names, *more]
    atomic.write_text_durably(out / "report.txt", "\n".join(lines) + "\n")
    atomic.write_text_durably(out / "report.html", _page(title, kinds, images))


def _json_entry(image: ReportedImage) -> dict[str, object]:
    """Return the image's entry in report.json."""
    omitted = ("thumbnail",) if image.same_as else ("thumbnail", "same_as")
    return {name: value for name, value in image._asdict().items() if name not in omitted}


def _page(title: str, kinds: Counter, images: list[ReportedImage]) -> str:
    """Return a self-contained HTML page."""
    counts = "".join(f"<tr><td>{count}</td><td>{kind}</td></tr>" for kind, count in kinds.most_common())
    figures = [
        f'<figure><img alt="" src="data:image/jpeg;base64,{base64.b64encode(image.thumbnail).decode()}">'
        f"<figcaption><b>{', '.join(image.kinds)}</b>, {image.action}<br>"
        f"{html.escape(image.source + _same_as(image))}</figcaption></figure>"
        for image in images
        if image.thumbnail
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>shards</title><style>{STYLE}</style></head>'
        f"<body><h1>{title}</h1><table>{counts}</table><p>{len(figures)} of the {len(images)} images that are not "
        "plain RGB JPEGs or are duplicates, after conversion; report.txt lists all.</p>"
        f"<div>{''.join(figures)}</div></body></html>\n"
    )


def _same_as(image: ReportedImage) -> str:
    return f" of {image.same_as}" if image.same_as else ""
