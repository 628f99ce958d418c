import errno
import fcntl
import gc
import hashlib
import http.server
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections import Counter

import fsspec
import pytest
from fsspec.implementations.http import HTTPFileSystem

from ddae.data import cache as cache_module
from ddae.data.cache import Cache, is_url, url_join, url_name, url_parent
from ddae.errors import UserError

FORK = multiprocessing.get_context("fork")  # the start method of the data loader's workers
BODY = bytes(range(256)) * 40
SHA = hashlib.sha256(BODY).hexdigest()
NAME = f"x.tar.{SHA[:8]}"  # cached name of x.tar with a known hash


class Handler(http.server.BaseHTTPRequestHandler):
    """A server whose behaviour is the first part of the path: /flaky/2/x.tar fails twice."""

    def do_GET(self):
        server, (kind, *arguments) = self.server, self.path.partition("?")[0].strip("/").split("/")
        server.hits[self.path] += 1
        hit = server.hits[self.path]
        match kind:
            case "status":
                return self.answer(int(arguments[0]))
            case "flaky":
                return self.answer(503) if hit <= int(arguments[0]) else self.answer(200, BODY)
            case "cut":
                return self.answer(200, BODY[:-100], len(BODY))
            case "compressible":
                return self.answer(500 if "gzip" in self.headers.get("Accept-Encoding", "gzip") else 200, BODY)
            case "double":
                return self.answer(200, 2 * BODY)
            case "shrinking":
                return self.answer(200, BODY + b"more" if hit == 1 else BODY)
            case "changing":
                return self.answer(200, f"version {hit}".encode())
            case "slow":  # half of the file, then the rest once the test sets `resume`
                self.answer(200, BODY[:5000], len(BODY))
                server.resume.wait(10)
                return self.wfile.write(BODY[5000:])
            case _:
                return self.answer(200, BODY)

    def answer(self, status, body=b"", length=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(cache_module, "RETRY_DELAYS_S", (0, 0, 0))
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.hits, server.resume = Counter(), threading.Event()
        server.handle_error = lambda *_: None  # a client that was killed
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.resume.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", 10 * len(BODY))


def files(cache):
    """Return the names of complete and partial files in the cache."""
    return sorted(path.name for path in cache.folder.glob("*/*") if path.suffix not in (".lock", ".keep"))


def wait_until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("condition not met within 10 s")


def read(descriptor):
    with open(descriptor, "rb") as file:
        return file.read()


@pytest.mark.parametrize("location", ["https://h/imagenet", "s3://bucket/a/train-*.tar", "gs://b/x.tar"])
def test_urls_are_recognised(location):
    assert is_url(location)


@pytest.mark.parametrize(
    "location", ["", "/data/imagenet", "data/train-*.tar", "pipe:curl https://h/x", "pipe://x", "a:b"]
)
def test_paths_and_pipes_are_no_urls(location):
    assert not is_url(location)


def test_urls_are_split_and_joined():
    assert url_join("https://h/imagenet", "manifest.json") == url_join("https://h/imagenet/", "manifest.json")
    assert url_join("https://h/imagenet", "manifest.json") == "https://h/imagenet/manifest.json"
    assert url_parent("s3://b/a/x.tar") == "s3://b/a"
    assert url_name("https://h/a/x.tar?token=1/2") == "x.tar"
    with pytest.raises(UserError, match="https://h/a of a folder has a query"):
        url_join("https://h/a?token=secret", "x.tar")


@pytest.mark.parametrize("url", ["https://h/a/", "https://h/a/..", "https://h/a/.x.lock", "https://h/a/?x.tar"])
def test_url_without_a_file_name_is_rejected(url, cache):
    with pytest.raises(UserError, match="does not name a file"):
        cache.fetch(url)


def test_file_is_downloaded_once(server, cache):
    url = f"{server.url}/a/x.tar"
    path = cache.fetch(url, len(BODY), SHA)
    assert path.name == NAME
    assert path.read_bytes() == BODY
    assert cache.fetch(url, len(BODY), SHA) == path
    assert read(cache.open(url, len(BODY), SHA)) == BODY
    assert server.hits == {"/a/x.tar": 1}
    assert files(cache) == [NAME]


def test_file_of_same_size_and_other_hash_is_downloaded(server, cache, monkeypatch):
    url, other = f"{server.url}/a/x.tar", BODY[::-1]
    cache.fetch(url, len(BODY), SHA)
    monkeypatch.setattr(f"{__name__}.BODY", other)
    assert cache.fetch(url, len(other), hashlib.sha256(other).hexdigest()).read_bytes() == other


def test_files_of_one_source_folder_share_a_cache_folder(server, cache):
    shard, index = cache.fetch(f"{server.url}/a/x.tar"), cache.fetch_fresh(f"{server.url}/a/x.idx")
    assert shard.with_suffix(".idx") == index
    assert cache.fetch(f"{server.url}/b/x.tar") != shard
    assert cache.fetch(f"{server.url}/a/x.tar?file=2") != shard
    assert server.hits["/a/x.tar?file=2"] == 1


def test_file_of_wrong_size_is_downloaded_again(server, cache):
    path = cache.fetch(f"{server.url}/a/x.tar", len(BODY))
    path.write_bytes(BODY[:-1])
    assert cache.fetch(f"{server.url}/a/x.tar", len(BODY)).read_bytes() == BODY
    assert server.hits["/a/x.tar"] == 2


@pytest.mark.parametrize(
    "path, size, sha, message, hits",
    [
        ("/a/x.tar", len(BODY), "0" * 64, f"x.tar has sha256 {SHA}; expected 000.*Upload the file", 4),
        ("/a/x.tar", len(BODY) + 7, SHA, f"x.tar has size in bytes {len(BODY)}; expected {len(BODY) + 7}", 4),
        ("/a/x.tar", len(BODY) - 7, SHA, f"x.tar has size in bytes {len(BODY)}; expected {len(BODY) - 7}", 4),
        ("/cut/x.tar", len(BODY), None, r"x.tar was not downloaded completely \(ClientPayloadError\)", 4),
        ("/cut/x.tar", None, None, r"x.tar was not downloaded completely \(ClientPayloadError\)", 4),
        ("/status/500/x.tar", None, None, "status 500", 4),
        ("/status/429/x.tar", None, None, "status 429", 4),
        ("/status/404/x.tar", None, None, r"x.tar is refused by the server \(status 404\)", 1),
        ("/status/403/x.tar", None, None, r"x.tar is refused by the server \(status 403\).*credentials", 1),
    ],
)
def test_failed_downloads_are_reported_and_leave_no_file(path, size, sha, message, hits, server, cache):
    with pytest.raises(UserError, match=message):
        cache.fetch(server.url + path, size, sha)
    assert server.hits == {path: hits}
    assert files(cache) == []


def test_failed_requests_are_retried(server, cache):
    assert cache.fetch(f"{server.url}/flaky/2/x.tar", len(BODY), SHA).read_bytes() == BODY
    assert server.hits == {"/flaky/2/x.tar": 3}
    assert cache.fetch(f"{server.url}/flaky/3/x.tar", len(BODY), SHA).read_bytes() == BODY
    with pytest.raises(UserError, match="status 503"):
        cache.fetch(f"{server.url}/flaky/4/x.tar")


def test_retry_overwrites_the_first_attempt(server, cache):
    assert cache.fetch(f"{server.url}/shrinking/x.tar", len(BODY), SHA).read_bytes() == BODY
    assert server.hits["/shrinking/x.tar"] == 2


def test_compression_is_not_requested(server, cache):
    assert cache.fetch(f"{server.url}/compressible/x.tar", len(BODY), SHA).read_bytes() == BODY


def test_retry_delays_are_used_in_order(server, cache, monkeypatch):
    delays = []
    monkeypatch.setattr(cache_module, "RETRY_DELAYS_S", (1, 2, 3))
    monkeypatch.setattr(cache_module.time, "sleep", delays.append)
    cache.fetch(f"{server.url}/flaky/3/x.tar")
    assert delays == [1, 2, 3]


def test_silent_server_times_out(server, cache, monkeypatch):
    monkeypatch.setattr(cache_module, "TIMEOUT_S", 0.1)
    with pytest.raises(UserError, match=r"was not downloaded completely \(\w*Timeout\w*\)"):
        cache.fetch(f"{server.url}/slow/x.tar", len(BODY))
    assert server.hits["/slow/x.tar"] == 4


def test_unreachable_server_is_reported(server, cache):
    server.server_close()
    with pytest.raises(UserError, match=r"was not downloaded completely \(ClientConnector\w+\). Check the network"):
        cache.fetch(f"{server.url}/a/x.tar")


def test_fetch_fresh_downloads_again_and_keeps_the_old_copy_on_failure(server, cache):
    url = f"{server.url}/changing/manifest.json"
    assert cache.fetch_fresh(url).read_text() == "version 1"
    assert cache.fetch_fresh(url).read_text() == "version 2"
    server.RequestHandlerClass = type("Broken", (Handler,), {"do_GET": lambda self: self.answer(200, b"ver", 9)})
    with pytest.raises(UserError, match="was not downloaded completely"):
        cache.fetch_fresh(url)
    assert cache.fetch(url).read_text() == "version 2"
    assert files(cache) == ["manifest.json"]


def test_least_recently_used_files_are_removed(server, tmp_path):
    cache = Cache(tmp_path, 4 * len(BODY))
    urls = [f"{server.url}/a/{i}.tar" for i in range(5)]
    cache.fetch_fresh(f"{server.url}/a/manifest.json")
    paths = [cache.fetch(url, len(BODY)) for url in urls[:3]]
    for age, path in enumerate([*paths, next(tmp_path.glob("*/manifest.json"))]):
        os.utime(path, (1000 - age, 1000 - age))  # least recently used first: the manifest, 2, 1, 0
    cache.fetch(urls[2])
    for number, remaining in ((3, ["0", "2", "3"]), (4, ["2", "3", "4"])):
        cache.fetch(urls[number], len(BODY))
        assert files(cache) == [f"{i}.tar" for i in remaining] + ["manifest.json"]
        assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= cache.max_bytes


def test_room_is_made_for_files_of_unknown_size(server, tmp_path):
    cache = Cache(tmp_path, 2 * len(BODY))
    for i in range(3):
        os.utime(cache.fetch(f"{server.url}/a/{i}.tar"), (i, i))
    assert files(cache) == ["1.tar", "2.tar"]


@pytest.mark.parametrize("size", [2 * len(BODY), None])
def test_file_larger_than_the_cache_is_rejected_and_nothing_removed(size, server, tmp_path):
    cache = Cache(tmp_path, 2 * len(BODY) - 1)
    cache.fetch(f"{server.url}/a/1.tar", len(BODY))
    with pytest.raises(UserError, match=r"2.tar is larger than the cache .*Raise --data.cache_gib"):
        cache.fetch(f"{server.url}/double/2.tar", size)
    assert files(cache) == ["1.tar"]
    assert server.hits["/double/2.tar"] == (0 if size else 1)


def test_partial_downloads_count_with_their_final_size(server, tmp_path):
    cache = Cache(tmp_path, 3 * len(BODY) - 1)
    for i in range(2):
        os.utime(cache.fetch(f"{server.url}/a/{i}.tar", len(BODY)), (i, i))
    slow = FORK.Process(target=cache.fetch, args=(f"{server.url}/slow/2.tar", len(BODY)))
    slow.start()
    wait_until(lambda: server.hits["/slow/2.tar"])
    assert files(cache) == [f".2.tar.{slow.pid}.part", "1.tar"]
    cache.fetch(f"{server.url}/a/3.tar", len(BODY))
    assert files(cache) == [f".2.tar.{slow.pid}.part", "3.tar"]
    server.resume.set()
    slow.join()
    assert files(cache) == ["2.tar", "3.tar"]


def test_locked_file_is_not_removed(server, tmp_path):
    cache = Cache(tmp_path, len(BODY))
    path = cache.fetch(f"{server.url}/a/1.tar", len(BODY))
    with cache_module._locked(path.with_name(".1.tar.lock")):
        cache.fetch(f"{server.url}/a/2.tar", len(BODY))
        assert files(cache) == ["1.tar", "2.tar"]
    cache.fetch(f"{server.url}/a/3.tar", len(BODY))
    assert files(cache) == ["3.tar"]


def test_open_file_stays_readable_after_removal_by_another_process(server, tmp_path):
    cache = Cache(tmp_path, len(BODY))
    descriptor = cache.open(f"{server.url}/a/1.tar", len(BODY), SHA)
    other = FORK.Process(target=cache.fetch, args=(f"{server.url}/a/2.tar", len(BODY)))
    other.start()
    other.join()
    assert files(cache) == ["2.tar"]
    assert read(descriptor) == BODY


def open_repeatedly(cache, urls, count):
    for number in range(count):
        assert read(cache.open(urls[number % len(urls)], len(BODY), SHA)) == BODY


def test_open_succeeds_while_other_processes_remove_files(server, tmp_path):
    cache = Cache(tmp_path, 2 * len(BODY))
    urls = [f"{server.url}/a/{i}.tar" for i in range(4)]
    processes = [FORK.Process(target=open_repeatedly, args=(cache, urls[i:] + urls[:i], 40)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sum(server.hits.values()) > 10  # files were removed and downloaded again


def test_concurrent_processes_download_once(server, cache):
    cache.fetch(f"{server.url}/a/y.tar")  # starts fsspec's event loop in the parent
    url = f"{server.url}/slow/x.tar"
    processes = [FORK.Process(target=open_repeatedly, args=(cache, [url], 1)) for _ in range(4)]
    for process in processes:
        process.start()
    wait_until(lambda: server.hits["/slow/x.tar"])
    time.sleep(0.2)  # for the others to wait on the lock
    server.resume.set()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert server.hits["/slow/x.tar"] == 1


def fetch_and_collect(cache, url, references):
    cache.fetch(url)
    gc.collect()
    assert all(reference() is not None for reference in references)


def test_forked_process_keeps_its_parents_file_systems(server, cache):
    """Garbage-collected there, each would wait 1 s for the event loop, whose thread only the parent has."""
    cache.fetch(f"{server.url}/a/x.tar")
    references = [weakref.ref(system) for system in HTTPFileSystem._cache.values()]
    assert references
    child = FORK.Process(target=fetch_and_collect, args=(cache, f"{server.url}/a/y.tar", references))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert files(cache) == ["x.tar", "y.tar"]


@pytest.mark.parametrize("next_path", ["slow/x.tar", "a/y.tar"])
def test_cache_recovers_from_a_killed_process(next_path, server, cache):
    victim = FORK.Process(target=cache.fetch, args=(f"{server.url}/slow/x.tar", len(BODY), SHA))
    victim.start()
    wait_until(lambda: server.hits["/slow/x.tar"])
    wait_until(lambda: files(cache) == [f".{NAME}.{victim.pid}.part"])
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert files(cache) == [f".{NAME}.{victim.pid}.part"]
    server.resume.set()
    assert cache.fetch(f"{server.url}/{next_path}", len(BODY), SHA).read_bytes() == BODY
    assert files(cache) == [f"{url_name(next_path)}.{SHA[:8]}"]


def test_other_fsspec_drivers_work(cache):
    with fsspec.open("memory://bucket/x.tar", "wb") as file:
        file.write(BODY)
    assert cache.fetch("memory://bucket/x.tar", len(BODY), SHA).read_bytes() == BODY
    with pytest.raises(UserError, match=r"memory://bucket/y.tar is refused by the server \(status 404\)"):
        cache.fetch("memory://bucket/y.tar")


def test_unknown_scheme_is_reported(cache):
    with pytest.raises(UserError, match=r"zzz://b/x.tar needs a driver .*pip install fsspec's driver of zzz://"):
        cache.fetch("zzz://b/x.tar")


def test_missing_driver_is_reported(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"s3://b/x.tar needs a driver .*pip install s3fs,"):
        cache.fetch("s3://b/x.tar")


@pytest.mark.parametrize("path", ["/status/404", "/status/403", "/status/500", "/cut", "/a", "/a/.."])
def test_credentials_are_not_shown_in_errors(path, server, cache):
    url = server.url.replace("://", "://me:hush1@") + path + "/x.tar?token=hush2"
    with pytest.raises(UserError) as raised:
        cache.fetch(url, sha256="0" * 64)
    assert "hush" not in str(raised.value)
    assert f"{server.url}{path}/x.tar" in str(raised.value)
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


@pytest.mark.parametrize("number, message", [(errno.ENOSPC, "No space left"), (errno.EDQUOT, "quota")])
def test_full_disk_is_reported(number, message, server, cache, monkeypatch):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Cache, "_make_room", full)
    with pytest.raises(UserError, match=f"(?i){cache.folder}.*{message}.*--data.cache_gib"):
        cache.fetch(f"{server.url}/a/x.tar")


def test_cache_folder_that_cannot_be_created_is_reported(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/cache cannot be written"):
        Cache(tmp_path / "file" / "cache", 10**6).fetch(f"{server.url}/a/x.tar")


def test_lock_is_released_although_a_child_has_the_file_open(tmp_path):
    with cache_module._locked(tmp_path / "lock"):
        child = FORK.Process(target=time.sleep, args=(30,))
        child.start()
    with open(tmp_path / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    child.kill()
    child.join()
