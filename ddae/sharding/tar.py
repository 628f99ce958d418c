"""Reading tars without unpacking them: where each file's bytes lie, by a scan of the headers alone.

Nothing is ever written to a path that an archive names. An archive that holds links, devices or paths that would leave
its folder is refused whole.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ddae.data.shard_writer import BLOCK
from ddae.errors import UserError


class Member(NamedTuple):
    """A file in an archive, or in an archive within it."""

    name: str  # OUTER.tar/NAME within a nested archive
    offset: int  # of its bytes in the outermost archive
    length: int  # bytes


def members(path: Path) -> Iterator[Member]:
    """The files of a tar and of the tars directly within it, in the archive's order; UserError where it is no tar."""
    try:
        with open(path, "rb", buffering=4096) as file:
            # Headers lie far apart: what the system would read ahead of each is thrown away.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for outer in _files(archive, path):
                    if not outer.name.endswith(".tar") or PurePosixPath(outer.name).name.startswith("."):
                        yield Member(outer.name, outer.offset_data, outer.size)
                        continue
                    with tarfile.open(fileobj=archive.extractfile(outer), mode="r:") as nested:
                        for inner in _files(nested, path):
                            yield Member(
                                f"{outer.name}/{inner.name}", outer.offset_data + inner.offset_data, inner.size
                            )
    except tarfile.TarError as error:
        raise UserError(
            f"{path} cannot be read as a tar ({error}): it is compressed, cut or another file, get it again"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its name and rights") from None


def _files(archive: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """The regular files of an open tar, each forgotten by the archive once it is past."""
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]
        parts = PurePosixPath(member.name).parts
        if member.name.startswith("/") or ".." in parts:
            raise UserError(f"{path} holds {member.name!r}, a path that leaves its folder: do not trust this archive")
        if not (member.isfile() or member.isdir()):
            raise UserError(f"{path} holds {member.name!r}, a link or a device: images are expected, make it again")
        if member.isfile():
            yield member
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    end = archive.fileobj.read(2 * BLOCK)
    if len(end) < BLOCK or end.strip(b"\0"):  # tarfile takes a broken header for the end
        raise tarfile.ReadError(f"no file and no end at {archive.offset} bytes")


def read_at(path: Path, offset: int, length: int) -> bytes:
    """So many bytes of a file; UserError where it ends before."""
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), length, offset)
    if len(data) < length:
        raise UserError(f"{path} ends at {offset + len(data)} bytes, before a file it lists: get it again")
    return data
