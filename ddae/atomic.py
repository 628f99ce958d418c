"""Atomic writes: a file or folder appears under its name complete, or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file beside `path` and rename it. OSError as the file system raises it; the partial file is removed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: object, indent: int | None = 2) -> None:
    """Write a JSON document as write_text() does."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; at the end it replaces `path`. Files become readable for everybody."""
    partial = path.with_name(path.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for file in partial.iterdir():
        file.chmod(0o644)  # safetensors writes for its owner alone
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


def rename_folder(partial: Path, path: Path) -> None:
    """Give a complete folder its name: flush it to the disk, replace `path` by it, flush the parent folder."""
    fsync(partial)
    shutil.rmtree(path, ignore_errors=True)
    os.rename(partial, path)
    fsync(path.parent)


def fsync(*paths: Path) -> None:
    """Flush files or folders to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
