"""Read tars and zips without unpacking them: scan their directories for the position of each file's bytes.

Nothing is written to a path that an archive names. An archive with links, devices, or paths outside its folder is
rejected as a whole, and so is one that is incomplete. Positions in a compressed tar are those in the tar it contains.
"""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from ddae.data.file_io import read_range
from ddae.data.shard_writer import BLOCK
from ddae.errors import UserError, one_line

RECORD = 20 * BLOCK  # bytes: tars are padded with zeros to a multiple of this
DECOMPRESS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}  # by a file's first bytes
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
ARCHIVE_ENDINGS = (*TAR_ENDINGS, ".zip")
BUFFER_BYTES = 1 << 20  # of decompressed data, within which a tar can be read again
VOLUME_HEADER, INCREMENTAL, CONTINUED = b"V", b"D", b"M"  # GNU tar's types of members: label, list of a folder, rest
ZIP_HEADER = b"PK\3\4"
MAX_MEMBER_BYTES = 1 << 60  # of a file in a tar; larger sizes are damage
MAX_CONTENT_BYTES = 1 << 20  # of a label file


class DamagedMemberError(Exception):
    """The content of one file of a zip is damaged."""


class Member(NamedTuple):
    """A file in an archive, or in a tar nested in it."""

    name: str  # OUTER.tar/NAME in a nested tar
    offset: int  # of its bytes in the outermost tar, or of its header in a zip
    length: int  # bytes
    stored: int  # bytes in the archive; smaller than `length` for a compressed file of a zip
    content: bytes = b""  # of the files that members() reads


def is_compressed(path: Path) -> bool:
    """Return whether this is a file that has to be decompressed before its members can be read at their offsets."""
    return _decompressor(path) is not None


def members(path: Path, read: tuple[str, ...] = ()) -> Iterator[Member]:
    """Yield the files of a tar and of the tars directly inside it, or of a zip, in the archive's order.

    read: endings, in lower case, of files whose content is read, up to MAX_CONTENT_BYTES. Raise UserError if the file
    is neither, or is incomplete, encrypted or unsafe.
    """
    yield from (_zip_members if path.name.lower().endswith(".zip") else _tar_members)(path, read)


def decompress(path: Path, target: Path) -> None:
    """Write the content of a compressed file to `target`. Raise UserError if it is damaged."""
    opener = _decompressor(path)
    assert opener is not None
    try:
        with opener(path) as source, open(target, "wb") as file:
            while chunk := source.read(BUFFER_BYTES):
                file.write(chunk)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # not about the data
            raise
        raise UserError(f"{path} cannot be decompressed ({one_line(error)}). Download it again.") from None


def read_at(path: Path, offset: int, length: int) -> bytes:
    """Return `length` bytes of a file from `offset` on. Raise UserError if the file is shorter."""
    data = read_range(path, offset, length)
    if len(data) < length:
        raise UserError(f"{path} ends at byte {offset + len(data)}, within a file it contains. Download it again.")
    return data


def read_zip_member(path: Path, offset: int, length: int, stored: int) -> bytes:
    """Return the content of a zip's member; see Member. Raise DamagedMemberError."""
    header = read_at(path, offset, 30)
    if header[:4] != ZIP_HEADER:
        raise DamagedMemberError("no header of a zip's member")
    method = int.from_bytes(header[8:10], "little")
    name_and_extra = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    data = read_at(path, offset + 30 + name_and_extra, stored)
    if method == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, length + 1)
        except zlib.error as error:
            raise DamagedMemberError(str(error)) from None
    if len(data) != length:
        raise DamagedMemberError(f"{len(data)} bytes instead of {length}")
    return data


def zip_member_path(info: zipfile.ZipInfo, path: Path) -> str:
    """Return the path of a zip's member, in which some programs write backslashes.

    Raise UserError if it lies outside the zip's folder; path: of the zip, for the message.
    """
    name = info.filename.replace("\\", "/")
    if name.startswith("/") or name[1:2] == ":" or ".." in name.split("/"):
        raise UserError(f"{path} contains {name!r}, a path outside its folder. Do not trust this archive.")
    return name


def _decompressor(path: Path):
    """Return the function that opens a compressed file; None if it is not compressed."""
    with open(path, "rb") as file:
        start = file.read(8)
    return next((opener for magic, opener in DECOMPRESS.items() if start.startswith(magic)), None)


class _Header(tarfile.TarInfo):
    """A tar header; a damaged one is an error, which tarfile takes for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros: the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tarfile_.offset}") from None  # type: ignore[attr-defined]


def _tar_members(path: Path, read: tuple[str, ...]) -> Iterator[Member]:
    try:
        opener = _decompressor(path)
        with open(path, "rb", buffering=4096) if opener is None else _buffered(opener(path)) as file:
            if opener is None:  # headers are far apart, so the kernel's read-ahead would be wasted
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for outer in _files(file, path):
                name = outer.name.rpartition("/")[2]
                if not name.lower().endswith(".tar") or name.startswith("."):
                    yield _member(file, outer.name, outer.offset_data, outer.size, read)
                    continue
                for inner in _files(_Part(file, outer.offset_data, outer.size), path):  # type: ignore[arg-type]
                    offset = outer.offset_data + inner.offset_data
                    yield _member(file, f"{outer.name}/{inner.name}", offset, inner.size, read)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        expected = "Expected a complete tar. Download it again."
        raise UserError(f"{path} cannot be read as a tar ({one_line(error)}). {expected}") from None
    except OSError as error:
        if error.errno is None:  # bz2's, about the data
            raise UserError(f"{path} cannot be read as a tar ({one_line(error)}). Download it again.") from None
        raise UserError(f"{path} cannot be read ({error.strerror}). Check its name and permissions.") from None


def _member(file: IO[bytes], name: str, offset: int, length: int, read: tuple[str, ...]) -> Member:
    """Return a tar's member, with its content if its name has one of the endings `read`."""
    if name.startswith("./") or "//" in name or "/./" in name:
        name = str(PurePosixPath(name))
    content = b""
    if name.lower().endswith(read):
        file.seek(offset)
        content = file.read(min(length, MAX_CONTENT_BYTES))
    return Member(name, offset, length, length, content)


def _buffered(file: IO[bytes]) -> io.BufferedReader:
    return io.BufferedReader(file, BUFFER_BYTES)  # type: ignore[arg-type]


class _Part(io.RawIOBase):
    """A read-only file that is a part of another one."""

    def __init__(self, file: IO[bytes], start: int, length: int):
        self._file, self._start, self._length, self._position = file, start, length, 0

    def read(self, size: int = -1) -> bytes:
        remaining = max(0, self._length - self._position)
        self._file.seek(self._start + self._position)
        data = self._file.read(remaining if size < 0 else min(size, remaining))
        self._position += len(data)
        return data

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET
        self._position = position
        return position

    def tell(self) -> int:
        return self._position


def _files(file: IO[bytes], path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of a tar, and of tars that were appended to it byte by byte."""
    while True:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as archive:
            # The archive keeps no list of its members, so memory use is constant.
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]
                _check_member(member, path)
                if member.isfile():
                    yield member
            end = archive.offset  # type: ignore[attr-defined]
        if not _seek_appended(file, end):
            return


def _check_member(member: tarfile.TarInfo, path: Path) -> None:
    """Raise UserError if a member is not a regular file or a folder, or is unsafe."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise UserError(f"{path} contains {member.name!r}, a path outside its folder. Do not trust this archive.")
    if not 0 <= member.size < MAX_MEMBER_BYTES:
        raise tarfile.ReadError(f"{member.name!r} has {member.size} bytes")
    if member.issparse():
        fix = "Unpack it, and pack it again without --sparse."
        raise UserError(f"{path} contains {member.name!r}, a sparse file, of which only parts are stored. {fix}")
    if member.type == CONTINUED:
        fix = "Pass the archive joined from all volumes, or unpack them."
        raise UserError(f"{path} is one of several volumes: {member.name!r} begins in another one. {fix}")
    if not (member.isfile() or member.isdir() or member.type in (VOLUME_HEADER, INCREMENTAL)):
        raise UserError(f"{path} contains {member.name!r}, a link or a device. Pack it again with regular files.")


def _seek_appended(file: IO[bytes], end: int) -> bool:
    """Move to the tar that follows the end marker at byte `end`. Return whether there is one.

    Raise ReadError if anything else follows, or more zeros than a tar is padded with.
    """
    file.seek(end)
    for position in range(end, end + 2 * BLOCK + RECORD, BLOCK):
        block = file.read(BLOCK)
        if not block:
            if position == end:  # tarfile has found no end marker
                raise tarfile.ReadError(f"neither a file nor the end of the archive at byte {end}")
            return False
        if block.strip(b"\0"):
            if position < end + 2 * BLOCK:  # the end of a tar is marked by two blocks of zeros
                raise tarfile.ReadError(f"a block of zeros instead of a header at byte {end}")
            file.seek(position)
            return True
    if not file.read(1):
        return False
    size = file.seek(0, os.SEEK_END) if isinstance(file, io.BufferedReader) else -1
    of = f" of {size:,}" if size > 0 else ""
    raise tarfile.ReadError(
        f"its last file ends at byte {end:,}{of}, and zeros follow, as in an incomplete download; if it is complete, "
        f"run truncate --size={end + 2 * BLOCK}"
    )


def _zip_members(path: Path, read: tuple[str, ...]) -> Iterator[Member]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos, end = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path} is not a complete zip ({one_line(error)}). Download it again.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Check its name and permissions.") from None
    for info in infos:
        name = zip_member_path(info, path)
        if name.endswith("/"):
            continue
        if not 0 <= info.header_offset <= info.header_offset + info.compress_size <= end:
            raise UserError(f"{path} is damaged: {name} lies outside the file. Download it again.")
        if info.flag_bits & 1:
            raise UserError(f"{path} is encrypted ({name}). Decrypt it first.")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            problem = f"{path} has a compression that is not supported (method {info.compress_type} of {name})"
            raise UserError(f"{problem}. Unpack it, and pass the folder.")
        member = Member(name, info.header_offset, info.file_size, info.compress_size)
        if name.lower().endswith(read) and info.file_size <= MAX_CONTENT_BYTES:
            try:
                member = member._replace(content=read_zip_member(path, *member[1:4]))
            except DamagedMemberError as error:
                raise UserError(f"{path} is damaged in {name} ({error}). Download it again.") from None
        yield member
