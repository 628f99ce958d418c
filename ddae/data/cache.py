"""Files at URLs, downloaded once into a folder that all processes of a machine share.

CACHE/4f1d0c2a9b7e/train-000000.tar.9f86d081 the folder stands for the one it comes from, the ending for the sha256
CACHE/4f1d0c2a9b7e/.train-000000.tar.9f86d081.lock    held by the process that opens, downloads or removes it
CACHE/4f1d0c2a9b7e/.train-000000.tar.9f86d081.7.part  process 7 downloads it, and holds a lock on this meanwhile
CACHE/4f1d0c2a9b7e/.manifest.json.keep       manifest.json is never removed
CACHE/.lock                                  held while files are counted, removed and put in place
"""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ddae.config.base import ShardsConfig
from ddae.errors import UserError, redact_url

WAITS = (1.0, 5.0, 25.0)  # seconds before the second, third and fourth attempt
TIMEOUT = 60.0  # seconds without a connection or a byte before an attempt over http(s) has failed
CHUNK = 4 << 20  # bytes
# fsspec's file systems, kept: a forked process that dropped its parent's would close them, and wait for it.
_used = set()


def is_url(where: str) -> bool:
    """Whether this names something to download: 'https://...', 's3://...', but no path, pattern or 'pipe:...'."""
    return re.match(r"(?!pipe:)[A-Za-z][\w+.-]*://", where) is not None


def join(folder_url: str, name: str) -> str:
    """The URL of a file in a folder."""
    if "?" in folder_url:
        raise UserError(
            f"{redact_url(folder_url)} goes on with a query: name the folder alone, up to the question mark"
        )
    return f"{folder_url.rstrip('/')}/{name}"


def parent(url: str) -> str:
    """The URL of the folder that a file is in."""
    return url.partition("?")[0].rpartition("/")[0]


def name(url: str) -> str:
    """The last part of a file's URL, without a query."""
    return url.partition("?")[0].rpartition("/")[2]


@dataclass(frozen=True)
class Cache:
    """A folder of downloaded files that all processes of a machine share, at most `cap` bytes of them.

    A file on its way counts in full from the start if its size is known, else as far as it has come. Neither such
    files nor those of fetch_fresh are removed for others: where they alone are more than the cap, it is passed.
    """

    folder: Path
    cap: int  # bytes

    def fetch(self, url: str, size: int | None = None, sha256: str | None = None) -> Path:
        """The local copy of url, downloaded if it is missing or of another size or hash; it may be removed at any
        time."""
        os.close(self.open(url, size, sha256))
        return self._local(url, sha256)

    def fetch_fresh(self, url: str) -> Path:
        """The local copy of url, always downloaded anew and never removed; if that fails, an older one stays."""
        os.close(self.open(url, fresh=True))
        return self._local(url)

    def open(self, url: str, size: int | None = None, sha256: str | None = None, fresh: bool = False) -> int:
        """As fetch (or fetch_fresh), but a descriptor to read from: on Linux it outlives the removal of the file."""
        path = self._local(url, sha256)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(_beside(path, "lock")):
                if fresh:
                    _beside(path, "keep").touch()
                if fresh or not path.exists() or size not in (None, path.stat().st_size):
                    self._download(url, path, size, sha256)
                os.utime(path)  # the time of last use
                return os.open(path, os.O_RDONLY)
        except OSError as error:  # of the disk: _download lets none of the network's out
            mend = "make room there, lower --data.cache_gib, or name another folder"
            raise UserError(f"the cache {self.folder} cannot be written ({error.strerror}): {mend}") from None

    def _local(self, url: str, sha256: str | None = None) -> Path:
        if name(url)[:1] in ("", "."):  # the cache has names with a dot in front for itself
            raise UserError(f"{redact_url(url)} does not name a file: give its whole address")
        folder = hashlib.sha256((parent(url) + url.partition("?")[2]).encode()).hexdigest()[:12]
        return self.folder / folder / (name(url) + (f".{sha256[:8]}" if sha256 else ""))

    def _download(self, url: str, path: Path, size: int | None, sha256: str | None) -> None:
        """Put a file that the caller holds the lock of in its place."""
        self._check_cap(url, size or 0)
        part, lock = _beside(path, f"{os.getpid()}.part"), self.folder / ".lock"
        try:
            with _locked(lock):
                file = open(part, "wb")  # noqa: SIM115
                fcntl.flock(file, fcntl.LOCK_EX)
                file.truncate(size or 0)  # to be counted: the disk gives the space as it is written
                self._make_room()
            with file:
                for wait in (*WAITS, None):
                    problem = self._attempt(file, url, size, sha256)
                    if problem is None:
                        break
                    if wait is None:
                        raise UserError(f"{redact_url(url)} {problem}")
                    time.sleep(wait)
                with _locked(lock):
                    self._make_room()  # for a size that was not known before
                    os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def _attempt(self, file: IO[bytes], url: str, size: int | None, sha256: str | None) -> str | None:
        """Download into the file; what is wrong with what came, if anything is."""
        digest = hashlib.sha256()
        file.seek(0)
        try:
            for chunk in _stream(url):
                self._check_cap(url, file.tell() + len(chunk))
                digest.update(chunk)
                file.write(chunk)
        except ConnectionError as error:
            return f"did not arrive whole ({error}): see to the network and the server"
        file.truncate()
        for what, wanted, got in (("size in bytes", size, file.tell()), ("sha256", sha256, digest.hexdigest())):
            if wanted not in (None, got):
                return f"has {got} as its {what} where {wanted} was expected: upload it and its manifest again"
        return None

    def _check_cap(self, url: str, size: int) -> None:
        if size > self.cap:
            raise UserError(
                f"{redact_url(url)} does not fit into a cache of {self.cap / 2**30:.3g} GiB: raise --data.cache_gib"
            )

    def _make_room(self) -> None:
        """Remove the least recently used files until the rest is within the cap; the caller holds the cache's lock."""
        total, removable = 0, []
        for path in self.folder.glob("*/*"):
            with suppress(FileNotFoundError):  # a part whose download failed meanwhile
                if path.name.startswith(".") and path.suffix == ".part":
                    with suppress(BlockingIOError), _locked(path, fcntl.LOCK_NB):
                        path.unlink()  # its process was killed, else this were locked
                status = path.stat()
                total += status.st_size
                if not path.name.startswith(".") and not _beside(path, "keep").exists():
                    removable.append((status.st_mtime_ns, path, status.st_size))
        for _, path, size in sorted(removable):
            if total > self.cap:
                with suppress(BlockingIOError), _locked(_beside(path, "lock"), fcntl.LOCK_NB):
                    path.unlink(missing_ok=True)  # whoever has it open can read on
                    total -= size


def open_cache(config: ShardsConfig) -> Cache:
    """Return the cache that data.cache and data.cache_gib describe."""
    return Cache(Path(config.cache), int(config.cache_gib * 2**30))


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


@contextmanager
def _locked(path: Path, how: int = 0) -> Iterator[None]:
    """Hold the lock of this name, which the system takes from a process that dies."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | how)
        try:
            yield
        finally:  # closing is not enough: a process forked meanwhile has it open, too
            fcntl.flock(file, fcntl.LOCK_UN)


def _stream(url: str) -> Iterator[bytes]:
    """The bytes at url; ConnectionError where another attempt may fare better, UserError where it cannot."""
    import fsspec  # here, as it and aiohttp take 0.3 s

    scheme = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        package = getattr(error.__cause__, "name", None) or f"fsspec's driver of {scheme}://"
        raise UserError(f"{redact_url(url)} needs a driver ({error}): pip install {package}, or use https://") from None
    options, how = {}, {}
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)  # default: 5 min in all
        client = {"timeout": timeout, "trust_env": True, "read_bufsize": CHUNK}  # the environment names a proxy
        client["headers"] = {"Accept-Encoding": "identity"}  # the bytes that were hashed, not others for the way
        # Block size 0 asks for all at once; any size spares a request for it, whose failures would all read as 404.
        options, how = {"client_kwargs": client}, {"block_size": 0, "size": 1}
    try:
        system, path = fsspec.url_to_fs(url, **options)
        _used.add(system)
        with system.open(path, "rb", **how) as source:
            while chunk := source.read(CHUNK):
                yield chunk
    except Exception as error:  # every driver has its own; their words may hold the query, so only the kind is told
        kinds = {FileNotFoundError: 404, PermissionError: 403}
        status = kinds.get(type(error)) or getattr(error, "status", 0)
        if 400 <= status < 500 and status not in (408, 425, 429):  # time-out, too early, too many requests
            raise UserError(f"{redact_url(url)} is refused ({status}): mend the address or the credentials") from None
        raise ConnectionError(f"status {status}" if status else type(error).__name__) from None
