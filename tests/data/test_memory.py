import itertools
import multiprocessing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_loader import BAD, damaged_copy, equal, make_loader, read_batches

from ddae.data import loader as loader_module
from ddae.data import memory
from ddae.distributed.logs import configure_logging
from ddae.errors import UserError


@pytest.mark.parametrize("workers", [0, 2])
def test_images_in_memory_give_the_same_batches(shards, workers):
    """Bitwise those of Pillow, at any step."""
    expected = read_batches(shards, "pillow", step=3, count=8)
    for batch, actual in zip(
        expected, read_batches(shards, "auto", 3, 8, in_memory=True, workers=workers), strict=True
    ):
        assert equal(batch, actual)


def test_bad_samples_in_memory_are_replaced_as_on_disk(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "MAX_BAD_FRACTION", 0.05)
    folder = damaged_copy(shards, tmp_path / "bad", BAD)
    bad, streams = [], []
    for in_memory in (False, True):
        loader = make_loader(folder, "pillow", in_memory=in_memory)
        streams.append(list(itertools.islice(loader.batches(0), 14)))
        bad.append(set(loader.bad))
    assert bad == [set(BAD)] * 2
    assert all(map(equal, *streams))


@pytest.mark.parametrize(("available", "local_ranks"), [(100_000, 1), (9_000_000, 4)])
def test_a_data_set_larger_than_memory_is_decoded_in_every_epoch(shards, monkeypatch, capsys, available, local_ranks):
    """The shards have 100 images of about 100 x 100 pixels: 3 MB."""
    configure_logging()
    monkeypatch.setattr(memory, "available_memory", lambda: available)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    expected = read_batches(shards, "pillow", count=2)
    loader = make_loader(shards, "pillow", in_memory=True)
    loader.select_backend()  # as a run does before it reads
    for batch, actual in zip(expected, itertools.islice(loader.batches(0), 2), strict=True):
        assert equal(batch, actual)
    warning = "data.in_memory is set, but the decoded images of a rank take"
    assert capsys.readouterr().out.count(warning) == 1


def test_available_memory_respects_the_container(tmp_path, monkeypatch):
    limit, use = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(memory, "CGROUP_FILES", [(str(tmp_path / "none"), str(use)), (str(limit), str(use))])
    use.write_text("3000\n")
    for text, expected in {"5000\n": 2000, "2000\n": 0}.items():
        limit.write_text(text)
        assert memory.available_memory() == expected
    limit.write_text("max\n")
    assert memory.available_memory() > 2**20


@pytest.mark.parametrize("backend", ["dali", "synthetic"])
def test_other_backends_do_not_keep_images_in_memory(shards, backend):
    with pytest.raises(UserError, match=rf"data.in_memory is set, but data.backend is {backend}; expected pillow"):
        make_loader(shards, backend, in_memory=True)


def test_decoded_pixels_are_those_of_the_files(shards):
    loader = make_loader(shards, "pillow", in_memory=True)
    loader.select_backend()
    decoded, reader = loader._decoded, loader._reader()
    assert decoded is not None
    for sample in (0, 57, 99):
        box = [0, 0, int(loader.shards.width[sample]), int(loader.shards.height[sample])]
        in_memory = reader.decode(0, sample, box, True)
        reader.decoded = None
        assert torch.equal(torch.from_numpy(in_memory), torch.from_numpy(reader.decode(0, sample, box, True)))
        reader.decoded = decoded


def test_shared_buffers_are_reused_when_nothing_refers_to_them():
    buffers = memory.SharedBuffers(2, 10)
    first, second = buffers.take(), buffers.take()
    assert buffers.take() is None
    child = multiprocessing.get_context("fork").Process(
        target=buffers.write, args=(first, np.arange(7, dtype=np.uint8))
    )
    child.start()
    child.join()
    assert not buffers.write(second, np.zeros(11, np.uint8))
    data = torch.from_numpy(buffers.read(first, 7))
    part = data.numpy()[2:4]
    del data
    assert buffers.take() is None
    assert part.tolist() == [2, 3]
    del part
    assert buffers.take() == first
    buffers.release(second)
    assert buffers.take() == second


def test_too_little_shared_memory_is_reported(shards, monkeypatch):
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    monkeypatch.setenv("LOCAL_SIZE", "2")
    memory.require_shared_memory(32 << 20, 4)
    message = r"/dev/shm needs 134 MB for what 4 workers keep ready, and has 67 MB. Start the container with --shm"
    with pytest.raises(UserError, match=message):
        memory.require_shared_memory(64 << 20, 4)
    memory.require_shared_memory(0, 0)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"for what 2 workers keep ready, and has 0 MB"):
        make_loader(shards, "pillow", workers=2).select_backend()
    make_loader(shards, "pillow", workers=0).select_backend()
    make_loader(shards, "dali", workers=2).select_backend()  # sends no images
