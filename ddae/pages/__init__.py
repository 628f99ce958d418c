"""HTML pages: templates, and the function that fills them. A page is one file, with its figures embedded."""

import base64
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

_environment = Environment(
    loader=PackageLoader("ddae.pages", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


class Picture(NamedTuple):
    """A figure of a page."""

    name: str
    source: str  # data URL
    caption: str


def render(template: str, **values: Any) -> str:
    """Return a template, NAME of NAME.html, filled with values; text is escaped."""
    return _environment.get_template(f"{template}.html").render(**values)


def data_url(image: bytes, kind: str = "png") -> str:
    """Return the content of an image file as a data URL. kind: png or jpeg."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def picture(file: Path, caption: str) -> Picture:
    """Return a PNG file as a figure."""
    return Picture(file.stem, data_url(file.read_bytes()), caption)
