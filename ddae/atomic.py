"""Atomic writes: a file or folder appears under its name complete, or not at all."""

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STALE_AFTER_S = 3600.0  # of a partial file whose process must have died
os.umask(UMASK := os.umask(0))  # it can only be read by setting it: once, before there are threads


def write_text(path: Path, text: str) -> None:
    """Write a file beside `path` and rename it. OSError as the file system raises it; the partial file is removed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_stale_partial_files(*folders: Path) -> None:
    """Remove what killed processes left of write_text() and new_folder() in these folders, if older than an hour."""
    for folder in folders:
        for partial in folder.glob(".*.[0-9]*.part"):
            with suppress(FileNotFoundError):
                if time.time() - partial.stat().st_mtime > STALE_AFTER_S:
                    shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def write_text_durably(path: Path, text: str | Iterable[str]) -> None:
    """Write a file as write_text() does, and flush it to the disk before the renaming: it survives a power failure.

    text: as a whole or in pieces. Characters that UTF-8 cannot encode (of file names in archives) are written as
    backslash escapes.
    """
    with durable_file(path) as partial, open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines([text] if isinstance(text, str) else text)


@contextmanager
def durable_file(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write; at the end it is flushed to the disk and gets its name."""
    partial = path.with_name(path.name + ".part")
    try:
        yield partial
        fsync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: object, indent: int | None = 2) -> None:
    """Write a JSON document as write_text() does."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; at the end it replaces `path`, or what `path` links to.

    Its files get the umask's permissions. OSError as the file system raises it; the partial folder is removed.
    """
    path = Path(os.path.realpath(path))
    remove_stale_partial_files(path.parent)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            share(file)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def share(file: Path) -> None:
    """Give a file the permissions that the umask allows: safetensors writes for its owner alone."""
    file.chmod(0o666 & ~UMASK)


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
