"""Hooks of MkDocs: pages whose files lie outside docs/, and links between all pages."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OUTSIDE = {  # file in the repository -> page
    "README.md": "index.md",
    "METHOD.md": "METHOD.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "kernels/README.md": "kernels.md",
}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:)([^)#]*)(#[^)]*)?\)")
PICTURE = re.compile(r"(!\[[^\]]*\]\()(?!https?:)([^)]+)\)")


def on_files(files, config):
    """Add the pages from outside docs/."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def titles(nav):
    """Return the title of each page in the navigation."""
    found = {}
    for entry in nav:
        for title, target in entry.items():
            found |= titles(target) if isinstance(target, list) else {target: title}
    return found


def on_page_markdown(markdown, page, config, files):
    """Let links point to pages of the site. A link to another file of the repository becomes its text."""
    sources = {page: source for source, page in OUTSIDE.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def in_site(path: str) -> str | None:
        """Return the page, or the picture in docs/, that a path in the page's source file means."""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path)) if path else source
        if target in OUTSIDE:
            return OUTSIDE[target]
        return (
            target.removeprefix("docs/")
            if target.startswith("docs/") and files.get_file_from_path(target[5:])
            else None
        )

    def link(match: re.Match) -> str:
        text, path, anchor = match[1], match[2], match[3] or ""
        target = in_site(path)
        if target is not None and text.endswith(".md"):  # a page's name in the site instead of its file's
            text = titles(config.nav).get(target, text)
        return text if target is None else f"[{text}]({target if path else ''}{anchor})"

    def picture(match: re.Match) -> str:
        return f"{match[1]}{in_site(match[2])})"

    return PICTURE.sub(picture, LINK.sub(link, markdown))
