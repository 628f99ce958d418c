"""Download cache: files at URLs, stored once in a folder that all processes of a machine share.

CACHE/4f1d0c2a9b7e/train-000000.tar.9f86d081            folder name: hash of the source folder; suffix: sha256
CACHE/4f1d0c2a9b7e/.train-000000.tar.9f86d081.lock      locked while the file is opened, downloaded or removed
CACHE/4f1d0c2a9b7e/.train-000000.tar.9f86d081.7.part    partial download by process 7, which locks it meanwhile
CACHE/4f1d0c2a9b7e/.manifest.json.keep                  marks manifest.json as never to be removed
CACHE/.lock                                             locked while files are counted, removed and renamed
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

RETRY_DELAYS_S = (1.0, 5.0, 25.0)  # before the second, third and fourth attempt
TIMEOUT_S = 60.0  # without a connection or a byte, after which an attempt over http(s) fails
CHUNK_BYTES = 4 << 20
# References to all fsspec file systems in use: a forked process that garbage-collected its parent's would try to close
# their sessions, and wait for an event loop that it does not have.
_file_systems = set()


def is_url(location: str) -> bool:
    """Return whether this is a URL such as https://... or s3://..., not a path, a pattern or webdataset's pipe:..."""
    return re.match(r"(?!pipe:)[A-Za-z][\w+.-]*://", location) is not None


def url_join(folder_url: str, name: str) -> str:
    """Return the URL of a file in a folder. Raise UserError if the folder's URL has a query."""
    if "?" in folder_url:
        raise UserError(f"the URL {redact_url(folder_url)} of a folder has a query. Pass it without '?' and the rest.")
    return f"{folder_url.rstrip('/')}/{name}"


def url_parent(url: str) -> str:
    """Return the URL of the folder that holds a file, without a query."""
    return url.partition("?")[0].rpartition("/")[0]


def url_name(url: str) -> str:
    """Return the file name of a URL, without a query."""
    return url.partition("?")[0].rpartition("/")[2]


@dataclass(frozen=True)
class Cache:
    """A folder of downloaded files that all processes of a machine share, limited to `max_bytes`.

    The least recently used files are removed first. A partial download counts with its final size if that is known,
    otherwise with its current size. Partial downloads and files of fetch_fresh() are never removed to make room; if
    these alone are larger than the limit, it is exceeded.
    """

    folder: Path
    max_bytes: int

    def fetch(self, url: str, size: int | None = None, sha256: str | None = None) -> Path:
        """Return the path of the local copy; download it if it is missing or its size or hash differ.

        The file may be removed at any time; open() keeps it readable. Raise UserError if the download fails.
        """
        os.close(self.open(url, size, sha256))
        return self._local_path(url, sha256)

    def fetch_fresh(self, url: str) -> Path:
        """Download a file again and return its path; it is never removed. If this fails, an older copy remains."""
        os.close(self.open(url, fresh=True))
        return self._local_path(url)

    def open(self, url: str, size: int | None = None, sha256: str | None = None, fresh: bool = False) -> int:
        """Fetch the file (fresh: as fetch_fresh()). Return a read-only descriptor, valid after the file's removal."""
        path = self._local_path(url, sha256)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(_companion(path, "lock")):
                if fresh:
                    _companion(path, "keep").touch()
                if fresh or not path.exists() or size not in (None, path.stat().st_size):
                    self._download(url, path, size, sha256)
                os.utime(path)  # time of last use
                return os.open(path, os.O_RDONLY)
        except OSError as error:  # of the disk: _attempt() handles those of the network
            fix = "Free disk space, lower --data.cache_gib, or pass another folder as --data.cache."
            raise UserError(f"the cache {self.folder} cannot be written ({error.strerror}). {fix}") from None

    def _local_path(self, url: str, sha256: str | None = None) -> Path:
        if url_name(url)[:1] in ("", "."):  # names with a leading dot are the cache's own
            raise UserError(f"{redact_url(url)} does not name a file. Give the complete URL of the file.")
        folder = hashlib.sha256((url_parent(url) + url.partition("?")[2]).encode()).hexdigest()[:12]
        return self.folder / folder / (url_name(url) + (f".{sha256[:8]}" if sha256 else ""))

    def _download(self, url: str, path: Path, size: int | None, sha256: str | None) -> None:
        """Download the file and rename it to `path`, whose lock the caller holds."""
        self._check_fits(url, size or 0)
        partial, lock = _companion(path, f"{os.getpid()}.part"), self.folder / ".lock"
        try:
            with _locked(lock):
                file = open(partial, "wb")  # noqa: SIM115
                fcntl.flock(file, fcntl.LOCK_EX)
                file.truncate(size or 0)  # counted with this size from now on; the disk allocates on writing
                self._make_room()
            with file:
                for delay_s in (*RETRY_DELAYS_S, None):
                    if not (problem := self._attempt(file, url, size, sha256)):
                        break
                    if delay_s is None:
                        raise UserError(f"{redact_url(url)} {problem}")
                    time.sleep(delay_s)
                with _locked(lock):
                    self._make_room()  # again, because the size may not have been known before
                    os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _attempt(self, file: IO[bytes], url: str, size: int | None, sha256: str | None) -> str | None:
        """Download into `file` once. Return what is wrong with the result, or None."""
        digest = hashlib.sha256()
        file.seek(0)
        try:
            for chunk in _stream(url):
                self._check_fits(url, file.tell() + len(chunk))
                digest.update(chunk)
                file.write(chunk)
        except ConnectionError as error:
            return f"was not downloaded completely ({error}). Check the network and the server."
        file.truncate()
        for what, expected, actual in (("size in bytes", size, file.tell()), ("sha256", sha256, digest.hexdigest())):
            if expected not in (None, actual):
                return f"has {what} {actual}; expected {expected}. Upload the file and its manifest again."
        return None

    def _check_fits(self, url: str, size: int) -> None:
        if size > self.max_bytes:
            gib = f"{self.max_bytes / 2**30:.3g} GiB"
            raise UserError(f"{redact_url(url)} is larger than the cache of {gib}. Raise --data.cache_gib.")

    def _make_room(self) -> None:
        """Remove the least recently used files until the rest is within the limit; the caller holds CACHE/.lock."""
        total, removable = 0, []
        for path in self.folder.glob("*/*"):
            with suppress(FileNotFoundError):  # a partial download that has failed meanwhile
                if path.name.startswith(".") and path.suffix == ".part":
                    with suppress(BlockingIOError), _locked(path, fcntl.LOCK_NB):
                        path.unlink()  # not locked, so its process was killed
                status = path.stat()
                total += status.st_size
                if not path.name.startswith(".") and not _companion(path, "keep").exists():
                    removable.append((status.st_mtime_ns, path, status.st_size))
        for _, path, size in sorted(removable):
            if total > self.max_bytes:
                with suppress(BlockingIOError), _locked(_companion(path, "lock"), fcntl.LOCK_NB):
                    path.unlink(missing_ok=True)  # processes that have it open can still read it
                    total -= size


def open_cache(config: ShardsConfig) -> Cache:
    """Return the cache that data.cache and data.cache_gib describe."""
    return Cache(Path(config.cache), int(config.cache_gib * 2**30))


def _companion(path: Path, suffix: str) -> Path:
    """Return the hidden file of this suffix that belongs to a cached file."""
    return path.with_name(f".{path.name}.{suffix}")


@contextmanager
def _locked(path: Path, flags: int = 0) -> Iterator[None]:
    """Hold an exclusive lock on the file, which the kernel releases if the process dies."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
        try:
            yield
        finally:  # closing would not release it: a process forked meanwhile has the file open too
            fcntl.flock(file, fcntl.LOCK_UN)


def _stream(url: str) -> Iterator[bytes]:
    """Yield the bytes at a URL. Raise ConnectionError if a retry may succeed, UserError if it cannot."""
    import fsspec  # here, because it and aiohttp take 0.3 s to import

    scheme = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        package = getattr(error.__cause__, "name", None) or f"fsspec's driver of {scheme}://"
        fix = f"Run pip install {package}, or use an https:// URL."
        raise UserError(f"{redact_url(url)} needs a driver that is not installed ({error}). {fix}") from None
    options, open_options = {}, {}
    if scheme in ("http", "https"):
        import aiohttp

        # aiohttp's default limits the whole transfer to 5 min; trust_env: proxies from environment variables.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_S, sock_read=TIMEOUT_S)
        headers = {"Accept-Encoding": "identity"}  # the sha256 is of the uncompressed bytes
        client = {"timeout": timeout, "trust_env": True, "read_bufsize": CHUNK_BYTES, "headers": headers}
        # Block size 0: one request for the whole file. A given size (any) avoids a separate request for it, whose
        # failures would all be reported as 404.
        options, open_options = {"client_kwargs": client}, {"block_size": 0, "size": 1}
    try:
        file_system, path = fsspec.url_to_fs(url, **options)
        _file_systems.add(file_system)
        with file_system.open(path, "rb", **open_options) as source:
            while chunk := source.read(CHUNK_BYTES):
                yield chunk
    except Exception as error:  # drivers raise their own types
        status = {FileNotFoundError: 404, PermissionError: 403}.get(type(error)) or getattr(error, "status", 0)
        if 400 <= status < 500 and status not in (408, 425, 429):  # timeout, too early, too many requests
            refusal = f"is refused by the server (status {status}). Correct the URL or the credentials."
            raise UserError(f"{redact_url(url)} {refusal}") from None
        # The message may contain the query, so only the type is kept.
        raise ConnectionError(f"status {status}" if status else type(error).__name__) from None
