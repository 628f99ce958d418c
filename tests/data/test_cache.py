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

from ddae.data import cache as remote
from ddae.data.cache import Cache, is_url, join, name, parent
from ddae.errors import UserError

FORK = multiprocessing.get_context("fork")  # as the data loader's workers
BODY = bytes(range(256)) * 40
SHA = hashlib.sha256(BODY).hexdigest()
NAME = f"x.tar.{SHA[:8]}"  # of x.tar where its hash is known


class Handler(http.server.BaseHTTPRequestHandler):
    """Each path is served as its first part says: /flaky/2/x.tar fails twice."""

    def do_GET(self):
        server, (kind, *more) = self.server, self.path.partition("?")[0].strip("/").split("/")
        server.hits[self.path] += 1
        hit = server.hits[self.path]
        match kind:
            case "status":
                return self.answer(int(more[0]))
            case "flaky":
                return self.answer(503) if hit <= int(more[0]) else self.answer(200, BODY)
            case "cut":
                return self.answer(200, BODY[:-100], len(BODY))
            case "packed":
                return self.answer(500 if "gzip" in self.headers.get("Accept-Encoding", "gzip") else 200, BODY)
            case "double":
                return self.answer(200, 2 * BODY)
            case "shrinking":
                return self.answer(200, BODY + b"more" if hit == 1 else BODY)
            case "changing":
                return self.answer(200, f"version {hit}".encode())
            case "slow":  # half of it, the rest when the test says so
                self.answer(200, BODY[:5000], len(BODY))
                server.go_on.wait(10)
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
    monkeypatch.setattr(remote, "WAITS", (0, 0, 0))
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.hits, server.go_on = Counter(), threading.Event()
        server.handle_error = lambda *_: None  # a client that was killed
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.go_on.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", 10 * len(BODY))


def files(cache):
    """Names of the files in the cache that are whole or on their way."""
    return sorted(path.name for path in cache.folder.glob("*/*") if path.suffix not in (".lock", ".keep"))


def until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that in 10 seconds")


def read(descriptor):
    with open(descriptor, "rb") as file:
        return file.read()


@pytest.mark.parametrize("where", ["https://h/imagenet", "s3://bucket/a/train-*.tar", "gs://b/x.tar"])
def test_urls(where):
    assert is_url(where)


@pytest.mark.parametrize(
    "where", ["", "/data/imagenet", "data/train-*.tar", "pipe:curl https://h/x", "pipe://x", "a:b"]
)
def test_no_urls(where):
    assert not is_url(where)


def test_urls_are_taken_apart_and_joined():
    assert join("https://h/imagenet", "manifest.json") == join("https://h/imagenet/", "manifest.json")
    assert join("https://h/imagenet", "manifest.json") == "https://h/imagenet/manifest.json"
    assert parent("s3://b/a/x.tar") == "s3://b/a"
    assert name("https://h/a/x.tar?token=1/2") == "x.tar"
    with pytest.raises(UserError, match="https://h/a goes on with a query"):
        join("https://h/a?token=secret", "x.tar")


@pytest.mark.parametrize("url", ["https://h/a/", "https://h/a/..", "https://h/a/.x.lock", "https://h/a/?x.tar"])
def test_a_folder_is_no_file(url, cache):
    with pytest.raises(UserError, match="does not name a file"):
        cache.fetch(url)


def test_a_file_is_downloaded_once(server, cache):
    url = f"{server.url}/a/x.tar"
    path = cache.fetch(url, len(BODY), SHA)
    assert path.name == NAME
    assert path.read_bytes() == BODY
    assert cache.fetch(url, len(BODY), SHA) == path
    assert read(cache.open(url, len(BODY), SHA)) == BODY
    assert server.hits == {"/a/x.tar": 1}
    assert files(cache) == [NAME]


def test_a_file_of_the_same_size_and_another_hash_is_another(server, cache, monkeypatch):
    url, other = f"{server.url}/a/x.tar", BODY[::-1]
    cache.fetch(url, len(BODY), SHA)
    monkeypatch.setattr(f"{__name__}.BODY", other)
    assert cache.fetch(url, len(other), hashlib.sha256(other).hexdigest()).read_bytes() == other


def test_files_lie_beside_one_another_as_at_their_source(server, cache):
    shard, index = cache.fetch(f"{server.url}/a/x.tar"), cache.fetch_fresh(f"{server.url}/a/x.idx")
    assert shard.with_suffix(".idx") == index
    assert cache.fetch(f"{server.url}/b/x.tar") != shard
    assert cache.fetch(f"{server.url}/a/x.tar?file=2") != shard
    assert server.hits["/a/x.tar?file=2"] == 1


def test_a_file_of_another_size_is_downloaded_again(server, cache):
    path = cache.fetch(f"{server.url}/a/x.tar", len(BODY))
    path.write_bytes(BODY[:-1])
    assert cache.fetch(f"{server.url}/a/x.tar", len(BODY)).read_bytes() == BODY
    assert server.hits["/a/x.tar"] == 2


@pytest.mark.parametrize(
    "path, size, sha, words, hits",
    [
        ("/a/x.tar", len(BODY), "0" * 64, f"x.tar has {SHA} as its sha256 where 000.* was expected: upload it", 4),
        ("/a/x.tar", len(BODY) + 7, SHA, f"x.tar has {len(BODY)} as its size in bytes where {len(BODY) + 7} was", 4),
        ("/a/x.tar", len(BODY) - 7, SHA, f"x.tar has {len(BODY)} as its size in bytes where {len(BODY) - 7} was", 4),
        ("/cut/x.tar", len(BODY), None, r"x.tar did not arrive whole \(ClientPayloadError\)", 4),
        ("/cut/x.tar", None, None, r"x.tar did not arrive whole \(ClientPayloadError\)", 4),
        ("/status/500/x.tar", None, None, "status 500", 4),
        ("/status/429/x.tar", None, None, "status 429", 4),
        ("/status/404/x.tar", None, None, r"x.tar is refused \(404\)", 1),
        ("/status/403/x.tar", None, None, r"x.tar is refused \(403\).*credentials", 1),
    ],
)
def test_what_does_not_arrive_is_named_and_leaves_nothing(path, size, sha, words, hits, server, cache):
    with pytest.raises(UserError, match=words):
        cache.fetch(server.url + path, size, sha)
    assert server.hits == {path: hits}
    assert files(cache) == []


def test_a_server_that_recovers_is_asked_again(server, cache):
    assert cache.fetch(f"{server.url}/flaky/2/x.tar", len(BODY), SHA).read_bytes() == BODY
    assert server.hits == {"/flaky/2/x.tar": 3}
    assert cache.fetch(f"{server.url}/flaky/3/x.tar", len(BODY), SHA).read_bytes() == BODY
    with pytest.raises(UserError, match="status 503"):
        cache.fetch(f"{server.url}/flaky/4/x.tar")


def test_a_second_attempt_leaves_nothing_of_the_first(server, cache):
    assert cache.fetch(f"{server.url}/shrinking/x.tar", len(BODY), SHA).read_bytes() == BODY
    assert server.hits["/shrinking/x.tar"] == 2


def test_bytes_are_asked_for_as_they_are(server, cache):
    assert cache.fetch(f"{server.url}/packed/x.tar", len(BODY), SHA).read_bytes() == BODY


def test_the_waits_grow(server, cache, monkeypatch):
    waits = []
    monkeypatch.setattr(remote, "WAITS", (1, 2, 3))
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    cache.fetch(f"{server.url}/flaky/3/x.tar")
    assert waits == [1, 2, 3]


def test_a_server_that_falls_silent_is_given_up(server, cache, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT", 0.1)
    with pytest.raises(UserError, match=r"did not arrive whole \(\w*Timeout\w*\)"):
        cache.fetch(f"{server.url}/slow/x.tar", len(BODY))
    assert server.hits["/slow/x.tar"] == 4


def test_nobody_listens(server, cache):
    server.server_close()
    with pytest.raises(UserError, match=r"did not arrive whole \(ClientConnector\w+\): see to the network"):
        cache.fetch(f"{server.url}/a/x.tar")


def test_fresh_files_are_downloaded_anew_and_outlive_a_failure(server, cache):
    url = f"{server.url}/changing/manifest.json"
    assert cache.fetch_fresh(url).read_text() == "version 1"
    assert cache.fetch_fresh(url).read_text() == "version 2"
    server.RequestHandlerClass = type("Broken", (Handler,), {"do_GET": lambda self: self.answer(200, b"ver", 9)})
    with pytest.raises(UserError, match="did not arrive whole"):
        cache.fetch_fresh(url)
    assert cache.fetch(url).read_text() == "version 2"
    assert files(cache) == ["manifest.json"]


def test_the_least_recently_used_make_room(server, tmp_path):
    cache = Cache(tmp_path, 4 * len(BODY))
    urls = [f"{server.url}/a/{i}.tar" for i in range(5)]
    cache.fetch_fresh(f"{server.url}/a/manifest.json")
    paths = [cache.fetch(url, len(BODY)) for url in urls[:3]]
    for age, path in enumerate([*paths, next(tmp_path.glob("*/manifest.json"))]):
        os.utime(path, (1000 - age, 1000 - age))  # the manifest longest ago, then 2, 1 and 0
    cache.fetch(urls[2])
    for number, left in ((3, ["0", "2", "3"]), (4, ["2", "3", "4"])):
        cache.fetch(urls[number], len(BODY))
        assert files(cache) == [f"{i}.tar" for i in left] + ["manifest.json"]
        assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= cache.cap


def test_room_is_made_for_a_file_of_unknown_size(server, tmp_path):
    cache = Cache(tmp_path, 2 * len(BODY))
    for i in range(3):
        os.utime(cache.fetch(f"{server.url}/a/{i}.tar"), (i, i))
    assert files(cache) == ["1.tar", "2.tar"]


@pytest.mark.parametrize("size", [2 * len(BODY), None])
def test_what_is_larger_than_the_cache_is_refused_and_removes_nothing(size, server, tmp_path):
    cache = Cache(tmp_path, 2 * len(BODY) - 1)
    cache.fetch(f"{server.url}/a/1.tar", len(BODY))
    with pytest.raises(UserError, match=r"2.tar does not fit .*raise --data.cache_gib"):
        cache.fetch(f"{server.url}/double/2.tar", size)
    assert files(cache) == ["1.tar"]
    assert server.hits["/double/2.tar"] == (0 if size else 1)


def test_files_on_their_way_count_in_full_from_the_start(server, tmp_path):
    cache = Cache(tmp_path, 3 * len(BODY) - 1)
    for i in range(2):
        os.utime(cache.fetch(f"{server.url}/a/{i}.tar", len(BODY)), (i, i))
    slow = FORK.Process(target=cache.fetch, args=(f"{server.url}/slow/2.tar", len(BODY)))
    slow.start()
    until(lambda: server.hits["/slow/2.tar"])
    assert files(cache) == [f".2.tar.{slow.pid}.part", "1.tar"]
    cache.fetch(f"{server.url}/a/3.tar", len(BODY))
    assert files(cache) == [f".2.tar.{slow.pid}.part", "3.tar"]
    server.go_on.set()
    slow.join()
    assert files(cache) == ["2.tar", "3.tar"]


def test_a_file_that_is_just_being_opened_is_not_removed(server, tmp_path):
    cache = Cache(tmp_path, len(BODY))
    path = cache.fetch(f"{server.url}/a/1.tar", len(BODY))
    with remote._locked(path.with_name(".1.tar.lock")):
        cache.fetch(f"{server.url}/a/2.tar", len(BODY))
        assert files(cache) == ["1.tar", "2.tar"]
    cache.fetch(f"{server.url}/a/3.tar", len(BODY))
    assert files(cache) == ["3.tar"]


def test_a_file_stays_readable_when_another_process_removes_it(server, tmp_path):
    cache = Cache(tmp_path, len(BODY))
    descriptor = cache.open(f"{server.url}/a/1.tar", len(BODY), SHA)
    other = FORK.Process(target=cache.fetch, args=(f"{server.url}/a/2.tar", len(BODY)))
    other.start()
    other.join()
    assert files(cache) == ["2.tar"]
    assert read(descriptor) == BODY


def open_often(cache, urls, turns):
    for turn in range(turns):
        assert read(cache.open(urls[turn % len(urls)], len(BODY), SHA)) == BODY


def test_opening_never_fails_while_others_make_room(server, tmp_path):
    cache = Cache(tmp_path, 2 * len(BODY))
    urls = [f"{server.url}/a/{i}.tar" for i in range(4)]
    processes = [FORK.Process(target=open_often, args=(cache, urls[i:] + urls[:i], 40)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sum(server.hits.values()) > 10  # or nothing was ever removed


def test_processes_that_ask_at_once_download_once(server, cache):
    cache.fetch(f"{server.url}/a/y.tar")  # the parent has used fsspec before it forks
    url = f"{server.url}/slow/x.tar"
    processes = [FORK.Process(target=open_often, args=(cache, [url], 1)) for _ in range(4)]
    for process in processes:
        process.start()
    until(lambda: server.hits["/slow/x.tar"])
    time.sleep(0.2)  # for the others to ask, too
    server.go_on.set()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert server.hits["/slow/x.tar"] == 1


def fetch_and_clear(cache, url, parents):
    cache.fetch(url)
    gc.collect()
    assert all(system() is not None for system in parents)


def test_a_forked_process_keeps_its_parents_connections(server, cache):
    """Dropped there, each would wait a second for a thread that only the parent has."""
    cache.fetch(f"{server.url}/a/x.tar")
    parents = [weakref.ref(system) for system in HTTPFileSystem._cache.values()]
    assert parents
    child = FORK.Process(target=fetch_and_clear, args=(cache, f"{server.url}/a/y.tar", parents))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert files(cache) == ["x.tar", "y.tar"]


@pytest.mark.parametrize("asked", ["slow/x.tar", "a/y.tar"])
def test_a_killed_process_leaves_no_trouble(asked, server, cache):
    victim = FORK.Process(target=cache.fetch, args=(f"{server.url}/slow/x.tar", len(BODY), SHA))
    victim.start()
    until(lambda: server.hits["/slow/x.tar"])
    until(lambda: files(cache) == [f".{NAME}.{victim.pid}.part"])
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert files(cache) == [f".{NAME}.{victim.pid}.part"]
    server.go_on.set()
    assert cache.fetch(f"{server.url}/{asked}", len(BODY), SHA).read_bytes() == BODY
    assert files(cache) == [f"{name(asked)}.{SHA[:8]}"]


def test_other_drivers_are_read(cache):
    with fsspec.open("memory://bucket/x.tar", "wb") as file:
        file.write(BODY)
    assert cache.fetch("memory://bucket/x.tar", len(BODY), SHA).read_bytes() == BODY
    with pytest.raises(UserError, match=r"memory://bucket/y.tar is refused \(404\)"):
        cache.fetch("memory://bucket/y.tar")


def test_an_unknown_scheme(cache):
    with pytest.raises(UserError, match=r"zzz://b/x.tar needs a driver .*pip install fsspec's driver of zzz://"):
        cache.fetch("zzz://b/x.tar")


def test_a_missing_driver(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"s3://b/x.tar needs a driver .*pip install s3fs,"):
        cache.fetch("s3://b/x.tar")


@pytest.mark.parametrize("path", ["/status/404", "/status/403", "/status/500", "/cut", "/a", "/a/.."])
def test_credentials_are_never_printed(path, server, cache):
    url = server.url.replace("://", "://me:hush1@") + path + "/x.tar?token=hush2"
    with pytest.raises(UserError) as raised:
        cache.fetch(url, sha256="0" * 64)
    assert "hush" not in str(raised.value)
    assert f"{server.url}{path}/x.tar" in str(raised.value)
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


@pytest.mark.parametrize("number, words", [(errno.ENOSPC, "No space left"), (errno.EDQUOT, "quota")])
def test_a_full_disk_is_named(number, words, server, cache, monkeypatch):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Cache, "_make_room", full)
    with pytest.raises(UserError, match=f"(?i){cache.folder}.*{words}.*--data.cache_gib"):
        cache.fetch(f"{server.url}/a/x.tar")


def test_a_cache_that_cannot_be(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/cache cannot be written"):
        Cache(tmp_path / "file" / "cache", 10**6).fetch(f"{server.url}/a/x.tar")


def test_a_lock_is_free_again_though_a_child_has_it_open(tmp_path):
    with remote._locked(tmp_path / "lock"):
        child = FORK.Process(target=time.sleep, args=(30,))
        child.start()
    with open(tmp_path / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    child.kill()
    child.join()
