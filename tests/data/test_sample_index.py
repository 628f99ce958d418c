"""The sample index: the same data set as from manifest and DALI indexes, opened without parsing them."""

import json
import logging
import shutil
from dataclasses import fields
from functools import partial

import numpy as np
import pytest
import torch
from conftest import make_shards, sample

from ddae.data import shards as shards_module
from ddae.data.cache import Cache
from ddae.data.manifest import read_manifest
from ddae.data.rng import permutation
from ddae.data.sample_index import read_header
from ddae.data.sampling import SHUFFLE_WINDOW, EpochOrder
from ddae.data.shard_writer import write_manifest, write_shard
from ddae.data.shards import open_shards
from ddae.errors import UserError
from ddae.sharding.check import check, make_index, mark_bad
from ddae.tools.bench_index import measure, simulate


def open_(folder, where=None):
    return open_shards(str(where or folder), Cache(folder, 1 << 30))


def without_index(folder, target):
    """Return a copy of the shards as version 0.1 wrote them."""
    shutil.copytree(folder, target)
    for path in target.glob("*.index.*"):
        path.unlink()
    return target


def assert_equal(opened, expected):
    for field in fields(opened):
        if field.name not in ("paths", "cache", "_open", "label"):
            assert np.array_equal(getattr(opened, field.name), getattr(expected, field.name)), field.name
    assert np.array_equal(opened.labels(), expected.labels())
    assert opened.read(7) == expected.read(7)


@pytest.mark.parametrize("pattern", ["", "train-*.tar", "train-00000[02].tar", "train-00000{2,0}.tar"])
def test_the_index_describes_the_same_data_set(pattern, shards, tmp_path):
    old = without_index(shards, tmp_path / "old")
    assert open_(old).label is None
    assert open_(shards).label is not None
    assert_equal(open_(shards, shards / pattern), open_(old, old / pattern))


def test_manifest_and_text_indexes_are_not_read(shards, monkeypatch):
    monkeypatch.setattr(shards_module, "read_manifest", lambda *args: pytest.fail("read the manifest"))
    monkeypatch.setattr(shards_module, "read_index", lambda *args: pytest.fail("read a text index"))
    opened = open_(shards)
    assert isinstance(opened.offset, np.memmap)
    assert opened.labels(np.array([3, 5])).tolist() == [3, 0]


def test_shards_of_version_0_1_are_indexed_by_one_command(shards, tmp_path):
    old = without_index(shards, tmp_path / "old")
    assert make_index(old) == 100
    for path in shards.iterdir():
        assert (old / path.name).read_bytes() == path.read_bytes()


def test_bad_samples_are_left_out(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "bad")
    index = open_(folder)
    with open(folder / "train-000001.tar", "r+b") as file:
        file.seek(int(index.offset[45]))
        file.write(bytes(60))
    problems, _ = check(folder, True, 1)
    assert mark_bad(folder, problems) == 1
    opened = open_(folder)
    assert (len(opened), opened.num_bad) == (99, 1)
    assert index.offset[45] not in opened.offset[40:63]
    assert_equal(opened, open_(without_index(folder, tmp_path / "old")))


DAMAGE = {
    "columns": lambda folder: (folder / "train.index.bin").write_bytes(bytes(20 * 100)),
    "short columns": lambda folder: (folder / "train.index.bin").write_bytes(b"short"),
    "header": lambda folder: (folder / "train.index.json").write_text("{"),
    "other header": lambda folder: (folder / "train.index.json").write_text('{"samples": 3, "shards": []}'),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_reported_with_the_command_that_fixes_it(kind, shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "damaged")
    DAMAGE[kind](folder)
    with pytest.raises(UserError, match=r"is damaged.*Run python data_prep/check_shards.py .*damaged --index"):
        open_(folder)
    assert any(problem.shard.startswith("train.index") for problem in check(folder, False, 1)[0])
    make_index(folder)
    assert_equal(open_(folder), open_(shards))


def test_an_outdated_index_is_not_used(shards, tmp_path, caplog):
    folder = shutil.copytree(shards, tmp_path / "old")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"]["train-000000.tar"]["bad"] = ["s00003"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with caplog.at_level(logging.WARNING):
        opened = open_(folder)
    assert (len(opened), opened.label) == (99, None)
    assert "train.index.json is older than manifest.json" in caplog.text
    assert "is older than the manifest" in str(check(folder, False, 1)[0][0])


def test_a_changed_index_is_found_by_a_full_check(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "changed")
    manifest = read_manifest(folder)
    entries = manifest["shards"]
    entries["train-000000.tar"]["labels"] = [0] * entries["train-000000.tar"]["samples"]
    write_manifest(folder, entries, classes=manifest["classes"])
    assert check(folder, False, 1)[0] == []
    assert "does not match the shards" in str(check(folder, True, 1)[0][0])


def test_samples_without_a_class(shards, tmp_path):
    name, samples = "train-000000.tar", [sample(i)._replace(label=None) for i in range(3)]
    write_manifest(tmp_path, {name: write_shard(tmp_path / name, samples)})
    opened = open_(tmp_path)
    assert opened.label.tolist() == [-1] * 3
    with pytest.raises(UserError, match="these shards have no classes"):
        opened.labels()


@pytest.mark.parametrize("index", [True, False])
def test_urls(index, shards, tmp_path):
    remote = shards if index else without_index(shards, tmp_path / "remote")
    cache = Cache(tmp_path / "cache", 1 << 30)
    for _ in range(2):
        opened = open_shards(f"file://{remote}", cache)
        assert_equal(opened, open_(shards))
    assert (opened.label is None) == (not index)
    found = sorted(path.name.split(".")[1] for path in (tmp_path / "cache").glob("*/train.index.*"))
    assert found == (["index", "index"] if index else [])


def test_the_columns_at_a_url_are_fetched_once(shards, tmp_path, monkeypatch):
    cache, fetched = Cache(tmp_path / "cache", 1 << 30), []
    download = Cache._download
    monkeypatch.setattr(Cache, "_download", lambda self, url, *args: (fetched.append(url), download(self, url, *args)))
    for _ in range(3):
        open_shards(f"file://{shards}", cache)
    assert sum(url.endswith("train.index.bin") for url in fetched) == 1
    header = read_header(shards / "train.index.json")
    assert header["samples"] == 100


def whole_epoch(starts, seed, epoch):
    """Return the order of an epoch by its definition: shards permuted, then samples shuffled within windows."""
    starts = torch.as_tensor(starts)
    shards = permutation(len(starts) - 1, seed, epoch, -1)
    windows = []
    for number, window in enumerate(shards.split(SHUFFLE_WINDOW)):
        samples = torch.cat([torch.arange(int(starts[s]), int(starts[s + 1])) for s in window])
        windows.append(samples[permutation(len(samples), seed, epoch, number)])
    return torch.cat(windows)


@pytest.mark.parametrize("num_shards", [2, 15, 16, 17, 50])
@pytest.mark.parametrize("batch", [1, 7])
def test_order_by_window_is_that_of_the_whole_epoch(num_shards, batch):
    starts = np.cumsum([0, *(5 + i * 7 % 11 for i in range(num_shards))])
    order = EpochOrder(starts, 3, batch)
    size, take = order.epoch_samples, partial(whole_epoch, starts, 3)
    positions = torch.arange(3 * size)
    epochs, samples = order.samples(positions)
    assert torch.equal(epochs, positions // size)
    assert torch.equal(samples, torch.cat([take(epoch)[:size] for epoch in range(3)]))
    scattered = torch.tensor([2 * size - 1, 2 * size, size // 2, 0, size - 1])
    assert torch.equal(order.samples(scattered)[1], samples[scattered])


def test_simulated_data_sets_can_be_opened(tmp_path):
    """As launch/benchmark.py index does."""
    found = []
    for form in ("text", "index"):
        simulate(tmp_path, 2000, form)
        assert measure(tmp_path)["open_s"] > 0
        found.append(open_(tmp_path))
    for field in ("shard_starts", "offset", "length"):
        assert np.array_equal(*(getattr(each, field) for each in found))


def test_make_shards_writes_an_index(tmp_path):
    assert (make_shards(tmp_path) / "train.index.json").exists()
