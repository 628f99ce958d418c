"""Read tars without unpacking them: scan the headers for the position of each file's bytes.

Nothing is written to a path that an archive names. An archive with links, devices, or paths outside its folder is
rejected as a whole.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ddae.data.shard_writer import BLOCK
from ddae.errors import UserError


class Member(NamedTuple):
    """A file in an archive, or in an archive nested in it."""

    name: str  # OUTER.tar/NAME in a nested archive
    offset: int  # of its bytes in the outermost archive
    length: int  # bytes


def members(path: Path) -> Iterator[Member]:
    """Yield the files of a tar and of the tars directly inside it, in the archive's order.

    Raise UserError if the file is not a complete, uncompressed tar, or has an unsafe member.
    """
    try:
        with open(path, "rb", buffering=4096) as file:
            # Headers are far apart, so the kernel's read-ahead would be wasted.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for outer in _files(archive, path):
                    if not outer.name.endswith(".tar") or PurePosixPath(outer.name).name.startswith("."):
                        yield Member(outer.name, outer.offset_data, outer.size)
                        continue
                    with tarfile.open(fileobj=archive.extractfile(outer), mode="r:") as nested:
                        for inner in _files(nested, path):
                            offset = outer.offset_data + inner.offset_data
                            yield Member(f"{outer.name}/{inner.name}", offset, inner.size)
    except tarfile.TarError as error:
        expected = "Expected a complete, uncompressed tar. Download it again."
        raise UserError(f"{path} cannot be read as a tar ({error}). {expected}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Check its name and permissions.") from None


def _files(archive: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of an open tar. The archive keeps no list of them, so memory use is constant."""
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]
        parts = PurePosixPath(member.name).parts
        if member.name.startswith("/") or ".." in parts:
            raise UserError(f"{path} contains {member.name!r}, a path outside its folder. Do not trust this archive.")
        if not (member.isfile() or member.isdir()):
            raise UserError(f"{path} contains {member.name!r}, a link or a device. Pack it again with regular files.")
        if member.isfile():
            yield member
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    end = archive.fileobj.read(2 * BLOCK)
    if len(end) < BLOCK or end.strip(b"\0"):  # tarfile mistakes a damaged header for the end of the archive
        raise tarfile.ReadError(f"neither a file nor the end of the archive at byte {archive.offset}")


def read_at(path: Path, offset: int, length: int) -> bytes:
    """Return `length` bytes of a file from `offset` on. Raise UserError if the file is shorter."""
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), length, offset)
    if len(data) < length:
        raise UserError(f"{path} ends at byte {offset + len(data)}, within a file it contains. Download it again.")
    return data
