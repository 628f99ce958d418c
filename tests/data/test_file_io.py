"""System errors are retried and reported as such; they are no bad images."""

import errno
import os
import resource

import pytest
import torch
from conftest import make_shards, sample

from ddae.config.base import ShardsConfig
from ddae.data import file_io
from ddae.data.cache import Cache
from ddae.data.file_io import read_file, read_range, retry_system_errors
from ddae.data.loader import Loader
from ddae.data.reader import RankBatch
from ddae.data.shards import open_shards
from ddae.errors import UserError


@pytest.fixture(autouse=True)
def delays(monkeypatch):
    """Return the delays instead of waiting."""
    waited = []
    monkeypatch.setattr(file_io.time, "sleep", waited.append)
    return waited


class Failing:
    """A function of os that fails a number of times."""

    def __init__(self, monkeypatch, name, number, times):
        self.number, self.remaining, self.original = number, times, getattr(os, name)
        monkeypatch.setattr(os, name, self)

    def __call__(self, *args, **kwargs):
        if self.remaining:
            self.remaining -= 1
            raise OSError(self.number, os.strerror(self.number))
        return self.original(*args, **kwargs)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE, errno.ETIMEDOUT])
@pytest.mark.parametrize("name", ["preadv", "open"])
def test_a_sample_is_read_after_system_errors(name, number, shards, monkeypatch, delays):
    opened = open_shards(str(shards), Cache(shards, 0))
    Failing(monkeypatch, name, number, 3)
    assert opened.read(7) == sample(7).jpeg
    assert delays == [0.1, 1.0, 5.0]


def test_a_stale_file_is_opened_again(shards, monkeypatch):
    opened = open_shards(str(shards), Cache(shards, 0))
    assert opened.read(7) == sample(7).jpeg
    files = opened._open.files
    Failing(monkeypatch, "preadv", errno.ESTALE, 1)
    assert opened.read(7) == sample(7).jpeg
    assert opened._open.files is not files


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE])
def test_an_error_that_persists_is_reported_as_what_it_is(number, shards, monkeypatch, delays):
    opened = open_shards(str(shards), Cache(shards, 0))
    Failing(monkeypatch, "preadv", number, 99)
    message = rf"train-000000.tar cannot be read \({os.strerror(number)}\) in 5 attempts"
    with pytest.raises(UserError, match=message):
        opened.read(7)
    assert len(delays) == 4


def test_a_file_that_is_gone_is_reported_at_once(shards, tmp_path, delays):
    folder = make_shards(tmp_path)
    opened = open_shards(str(folder), Cache(shards, 0))
    (folder / "train-000000.tar").unlink()
    with pytest.raises(UserError, match=r"train-000000.tar cannot be read \(No such file or directory\). Restore"):
        opened.read(7)
    assert delays == []


def test_the_loader_counts_no_bad_images_for_system_errors(shards, monkeypatch):
    config = ShardsConfig(train=str(shards), backend="pillow", workers=0)
    loader = Loader(config, 32, 0, RankBatch(8, 8, 0, 1), torch.device("cpu"))
    Failing(monkeypatch, "preadv", errno.EIO, 2)
    batch = next(loader.batches(0))
    assert batch.images.shape == (8, 3, 32, 32)
    assert loader.bad == {}
    loader.close()
    Failing(monkeypatch, "preadv", errno.EIO, 99)
    with pytest.raises(UserError, match="Input/output error"):
        next(loader.batches(0))
    loader.close()


def test_sources_are_read_after_system_errors(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    path.write_bytes(b"0123456789")
    Failing(monkeypatch, "pread", errno.ESTALE, 2)
    assert read_range(path, 3, 4) == b"3456"
    assert read_file(path) == b"0123456789"


def test_errors_of_decoders_are_not_retried(delays):
    def fail():
        raise OSError("image file is truncated")

    with pytest.raises(OSError, match="truncated"):
        retry_system_errors(fail, "x")
    assert delays == []


def test_the_loader_raises_the_limit_of_open_files(shards):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 200), hard))
    try:
        Loader(ShardsConfig(train=str(shards)), 32, 0, RankBatch(8, 8, 0, 1), torch.device("cpu")).close()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
