import contextlib
import io
import itertools
import json
import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import picture, sample
from PIL import Image

from ddae.config.pretrain import DataConfig
from ddae.data import backend as choice
from ddae.data import cache as remote
from ddae.data import loader as loader_module
from ddae.data.backend import check_installed
from ddae.data.cache import Cache
from ddae.data.dali_fallback import RescuingDecoder
from ddae.data.decode import decode_crop
from ddae.data.loader import Loader
from ddae.data.masking import sample_mask
from ddae.data.preview import preview_images
from ddae.data.reader import RankBatch, Reader
from ddae.data.sampling import EpochOrder, crop_policy
from ddae.data.shard_writer import Sample, write_manifest, write_shard
from ddae.data.shards import open_shards
from ddae.errors import UserError
from ddae.sharding.check import check, mark_bad

CPU = torch.device("cpu")
DRAW_MASK = partial(sample_mask, "bootmae_block", grid=(4, 4), num_masked=12)


def loader_of(shards, backend, part=None, **options):
    part = part or RankBatch(16, 16, 0, 1)
    config = DataConfig(train=str(shards), batch_size=part.batch_size, backend=backend, **{"workers": 0} | options)
    return Loader(config, 32, 0, part, CPU, None, DRAW_MASK)


def stream(shards, backend, step=0, count=4, part=None, **options):
    loader = loader_of(shards, backend, part, **options)
    try:
        batches = list(itertools.islice(loader.batches(step), count))
    finally:
        loader.close()
    for batch in batches:  # whoever reads, and whatever stands in for a bad sample
        assert all(map(torch.equal, batch.mask, DRAW_MASK(batch.seeds)))
    return batches


def same(one, other):
    return all(map(torch.equal, (*one[:3], *one.mask), (*other[:3], *other.mask)))


@pytest.mark.parametrize("backend", ["pillow", "dali"])
def test_batches_do_not_depend_on_workers_or_where_one_begins(shards, backend):
    """Bit for bit: images, seeds of crops and masks, and samples, also over the border of an epoch."""
    alone = stream(shards, backend, count=8)
    for other in (
        stream(shards, backend, count=8, workers=2),
        [*[None] * 5, *stream(shards, backend, step=5, count=3, workers=3)],
    ):
        for a, b in zip(alone, other, strict=True):
            if b is not None:
                assert same(a, b)


def test_the_ranks_see_the_global_batch_between_them(shards):
    alone = stream(shards, "pillow", count=2)
    ranks = [stream(shards, "pillow", count=4, part=RankBatch(16, 4, rank, 2)) for rank in range(2)]
    for step, whole in enumerate(alone):
        parts = [micro for rank in ranks for micro in rank[2 * step : 2 * step + 2]]
        for i in range(3):
            assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])


@pytest.mark.parametrize("workers", [0, 2])
def test_dali_and_pillow_give_the_same_batches(shards, workers):
    pytest.importorskip("nvidia.dali")
    for ours, theirs in zip(stream(shards, "pillow"), stream(shards, "dali", workers=workers), strict=True):
        assert torch.equal(ours.seeds, theirs.seeds)
        assert torch.equal(ours.samples, theirs.samples)
        assert theirs.images.dtype == torch.uint8
        difference = (ours.images.int() - theirs.images.int()).abs().float()
        assert difference.mean() < 0.1  # two JPEG decoders, in levels of 255
        assert difference.max() <= 2


@pytest.mark.parametrize("backend", ["pillow", "dali"])
def test_images_are_read_as_they_are_stored(backend, tmp_path):
    """EXIF's orientation is ignored by both back ends: boxes are of the stored image."""
    pytest.importorskip("nvidia.dali")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    samples = []
    for number in range(16):
        image, buffer = picture(number).resize((120, 64)), io.BytesIO()
        image.save(buffer, "JPEG", exif=rotated, quality=95)
        samples.append(Sample(f"s{number}", buffer.getvalue(), 0, 120, 64))
    write_manifest(tmp_path, {"train-000000.tar": write_shard(tmp_path / "train-000000.tar", samples)})
    (batch,) = stream(tmp_path, backend, count=1)
    (plain,) = stream(tmp_path, "pillow", count=1)
    assert (batch.images.int() - plain.images.int()).abs().float().mean() < 1


def test_pillow_crops_before_it_resizes():
    """Nothing outside the box is seen: a picture of two halves stays clean at the border."""
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:, 32:] = 255
    buffer = io.BytesIO()
    Image.fromarray(halves).save(buffer, "PNG")
    assert (decode_crop(buffer.getvalue(), (0, 0, 32, 64), False, 16) == 0).all()
    whole = decode_crop(buffer.getvalue(), (0, 0, 64, 64), False, 64)
    mirrored = decode_crop(buffer.getvalue(), (0, 0, 64, 64), True, 64)
    assert whole.shape == (3, 64, 64)
    assert (whole[:, :, ::-1] == mirrored).all()
    assert (whole == halves.transpose(2, 0, 1)).all()


def test_synthetic_batches_need_no_data():
    batch, other = stream("", "synthetic", count=2)
    assert batch.images.shape == (16, 3, 32, 32)
    assert batch.images.float().std() > 50
    assert not torch.equal(batch.seeds, other.seeds)


@pytest.mark.parametrize("backend", ["synthetic", "pillow", "dali"])
def test_what_a_reader_makes_can_be_pinned(shards, backend):
    """For a GPU all of it is copied into pinned memory, which a view that repeats its elements refuses."""
    loader = loader_of("" if backend == "synthetic" else shards, backend)
    micro = loader._reader()[0]
    tensors = [each for each in (*micro, *micro.drawn, *micro.drawn.crops) if isinstance(each, torch.Tensor)]
    assert len(tensors) == 7
    assert all(each.is_contiguous() for each in tensors)


def test_preview_shows_whole_images(shards):
    images, held_out = preview_images(DataConfig(train=str(shards)), 32, 5)
    assert images.shape == (5, 3, 32, 32)
    assert not held_out  # there are no validation shards
    opened = sample(0)
    side = min(opened.width, opened.height)
    box = (opened.width - side) // 2, (opened.height - side) // 2, side, side
    assert torch.equal(images[0], torch.tensor(decode_crop(opened.jpeg, box, False, 32)))


def test_backend_is_chosen_and_named(monkeypatch):
    assert check_installed("pillow") == "pillow"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed"):
        check_installed("dali")


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("remainder, workers", [("rotate", 0), ("rotate", 3), ("drop", 1)])
def test_an_epoch_is_each_sample_once_over_all_ranks(shards, world, remainder, workers):
    """100 samples in shards of 40, 24 and 36, batches of 24: as many steps a rank, whatever the ranks and workers."""
    parts = [RankBatch(24, 24 // world, rank, world) for rank in range(world)]
    loaders = [loader_of(shards, "dali", part, remainder=remainder, workers=workers) for part in parts]
    assert {loader.epoch_samples for loader in loaders} == {100 if remainder == "carry_over" else 96}
    per_rank = []
    for loader in loaders:
        files = loader.read_files(0)
        per_rank.append([micro.drawn.samples for micro in itertools.islice(files, 25)])  # six epochs of 100
        files.close()
    steps = [torch.cat(step) for step in zip(*per_rank, strict=True)]
    epoch = loaders[0].epoch_samples
    seen = torch.cat(steps)[: 6 * epoch].split(epoch)
    for samples in seen:
        assert len(samples.unique()) == len(samples)
    if remainder == "drop":
        assert len({tuple(set(range(100)) - set(samples.tolist())) for samples in seen}) > 1  # others each time
    alone = loader_of(shards, "dali", RankBatch(24, 24, 0, 1), remainder=remainder).read_files(0)
    for step in steps:
        assert torch.equal(step, next(alone).drawn.samples)
    alone.close()


def test_what_becomes_of_the_remainder_is_said(shards):
    assert "the last 4 of an epoch go into the next one's first batch" in loader_of(shards, "pillow").describe()
    assert "the last 4 of an epoch are left out" in loader_of(shards, "pillow", remainder="drop").describe()
    assert "epoch" not in loader_of(shards, "pillow", RankBatch(20, 20, 0, 1)).describe()


def test_too_few_images_are_refused(shards):
    with pytest.raises(UserError, match="100 images for 128 ranks"):
        loader_of(shards, "pillow", RankBatch(128, 1, 0, 128))
    with pytest.raises(UserError, match="larger than the 100 images"):
        loader_of(shards, "pillow", RankBatch(128, 128, 0, 1), remainder="drop")
    assert len(stream(shards, "pillow", part=RankBatch(128, 128, 0, 1), count=1)[0].images) == 128


def test_auto_is_measured_and_kept(shards, monkeypatch):
    loader = loader_of(shards, "auto")
    loader.select_backend()
    assert loader.backend in ("pillow", "dali")
    assert re.search(r"pillow \d+/s, dali \d+/s", loader.describe())
    for rates in ({"pillow": 2.0, "dali": 1.0}, {"pillow": 1.0, "dali": 2.0}):
        monkeypatch.setattr(choice, "measure", lambda *_, rates=rates: rates)
        loader = loader_of(shards, "auto")
        loader.select_backend()
        assert loader.backend == max(rates, key=lambda name: rates[name])
    loader = loader_of(shards, "auto")
    loader.select_backend("pillow")  # an earlier start of the run's
    assert "pillow (as before)" in loader.describe()
    monkeypatch.setattr(choice, "dali_installed", lambda: False)
    loader = loader_of(shards, "auto")
    loader.select_backend("dali")
    assert "pillow (DALI is not installed)" in loader.describe()


def spoiled(shards, folder, how):
    """A copy of the shards in which these samples {number: what} are broken, their lengths unchanged."""
    shutil.copytree(shards, folder)
    opened = open_shards(str(folder), Cache(folder, 0))
    for number, kind in how.items():
        shard, data = opened.shard_of(number), bytearray(opened.read(number))
        match kind:
            case "truncated":
                data[len(data) // 3 :] = bytes(len(data) - len(data) // 3)
            case "garbage":
                data[:] = bytes(i * 7 % 256 for i in range(len(data)))
            case "empty":
                data[:] = bytes(len(data))
            case "other size":
                buffer = io.BytesIO()
                Image.new("RGB", (20, 20)).save(buffer, "JPEG")
                data[: buffer.tell()] = buffer.getvalue()
        with open(opened.places[shard], "r+b") as file:
            file.seek(int(opened.offset[number]))
            file.write(data)
    return folder


BAD = {3: "truncated", 4: "garbage", 50: "empty", 99: "other size"}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_passed_over_named_and_counted(shards, tmp_path, monkeypatch, capfd, workers):
    """Both back ends, one stream: the next good sample stands in, with its own crop and mask."""
    monkeypatch.setattr(loader_module, "MAX_BAD", 0.05)
    folder = spoiled(shards, tmp_path / "bad", BAD)
    streams = {}
    for backend in ("pillow", "dali"):
        loader = loader_of(folder, backend, workers=workers)
        streams[backend] = list(itertools.islice(loader.batches(0), 14))  # two epochs
        assert set(loader.bad) == set(BAD)
        assert loader.read_stats()["data/decode_errors"] == 4
        assert loader.read_stats()["throughput/decode_images_per_s"] == 0  # none since the last call
        loader.close()
        said = capfd.readouterr().out.splitlines()
        assert len(said) == 4  # once each, though met twice
        for number in BAD:
            assert any(sample(number).key in line and line.startswith("passing over") for line in said)
    whole = stream(shards, "pillow", count=14)
    stand_in = {3: 5, 4: 5, 50: 51, 99: 0}
    for ours, theirs, plain in zip(*streams.values(), whole, strict=True):
        assert torch.equal(ours.samples, theirs.samples)
        assert torch.equal(ours.seeds, theirs.seeds)
        assert all(map(torch.equal, (*ours.mask, *theirs.mask), 2 * DRAW_MASK(ours.seeds)))
        assert (ours.images.int() - theirs.images.int()).abs().float().mean((1, 2, 3)).max() <= 0.5
        assert ours.samples.tolist() == [stand_in.get(number, number) for number in plain.samples.tolist()]
        kept = torch.tensor([number not in BAD for number in plain.samples.tolist()])
        assert torch.equal(ours.images[kept], plain.images[kept])
        assert torch.equal(ours.seeds[kept], plain.seeds[kept])


def test_a_device_without_memory_is_no_bad_image(shards):
    class Full:
        def decode(self, *_):
            raise torch.OutOfMemoryError("CUDA out of memory")

    order, crop = EpochOrder(np.array([0, 100]), 0), crop_policy("random", (1, 1))
    reader = Reader(open_shards(str(shards), Cache(shards, 0)), order, RankBatch(4, 4, 0, 1), 32, crop, decodes=False)
    with pytest.raises(torch.OutOfMemoryError):
        RescuingDecoder(reader, lambda batch: Full()).decode(reader[0])


@pytest.mark.parametrize("backend", ["pillow", "dali"])
def test_too_many_bad_samples_end_the_run_with_their_list(shards, tmp_path, backend):
    folder = spoiled(shards, tmp_path / "bad", {7: "truncated"})  # one of a hundred is more than 0.1 %
    loader = loader_of(folder, backend)
    list(itertools.islice(loader.batches(0), 7))
    with pytest.raises(UserError, match=r"1 of 100 images cannot be decoded.*train-000000.tar:s00007 \(its end"):
        loader.read_stats()
    loader.close()


def test_samples_listed_as_bad_are_not_read(shards, tmp_path):
    folder = spoiled(shards, tmp_path / "bad", BAD)
    problems, _ = check(folder, full=True, num_workers=1)
    assert mark_bad(folder, problems) == 3
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["shards"]["train-000000.tar"]["bad"] == ["s00003", "s00004"]
    loader = loader_of(folder, "pillow", RankBatch(12, 12, 0, 1))
    assert loader.num_samples == 97
    assert "3 more are listed as bad" in loader.describe()
    assert loader.fingerprint != loader_of(shards, "pillow").fingerprint
    batches = list(itertools.islice(loader.batches(0), 8))
    assert set(loader.bad) == {96}  # the one that decodes, to another size
    loader.close()
    assert len(batches) == 8


def test_a_data_set_that_is_all_bad_does_not_run_for_ever(shards, tmp_path):
    folder = spoiled(shards, tmp_path / "bad", dict.fromkeys(range(100), "garbage"))
    for backend, workers in (("pillow", 0), ("pillow", 2), ("dali", 2)):
        with pytest.raises(UserError, match=r"^100 samples in a row cannot be read.*--full$") as caught:
            stream(folder, backend, workers=workers)
        assert "\n" not in str(caught.value)


@contextlib.contextmanager
def served(folder):
    """The folder's files over http, and the names that were asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("backend, what", [("pillow", ""), ("dali", "/train-{000000..000002}.tar")])
def test_shards_at_urls_give_the_same_batches(shards, tmp_path, backend, what):
    local = stream(shards, backend, count=8)
    with served(shards) as (url, asked):
        options = {"workers": 2, "cache": str(tmp_path / "cache")}
        for ours, theirs in zip(local, stream(url + what, backend, count=8, **options), strict=True):
            assert same(ours, theirs)
        assert sum(path.endswith(".tar") for path in asked) == 3  # each shard once
        stream(url + what, backend, count=8, **options)
        assert sum(path.endswith(".tar") for path in asked) == 3


def test_a_cache_too_small_for_all_shards_serves_them_in_turn(shards, tmp_path):
    sizes = [path.stat().st_size for path in shards.glob("*.tar")]
    options = {"workers": 2, "cache": str(tmp_path / "cache"), "cache_gib": (max(sizes) + 50000) / 2**30}
    with served(shards) as (url, asked):
        for ours, theirs in zip(stream(shards, "dali"), stream(url, "dali", **options), strict=True):
            assert torch.equal(ours.images, theirs.images)
    assert sum(path.endswith(".tar") for path in asked) >= 3


def test_a_shard_that_is_not_what_its_manifest_says_is_refused(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0.0,))
    changed = spoiled(shards, tmp_path / "changed", {3: "garbage"})
    with served(changed) as (url, _), pytest.raises(UserError, match="sha256"):
        stream(url, "pillow", cache=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "where, words",
    [
        ("pipe:cat x.tar", "would run a command"),
        ("{folder}/train-{{000000..000007}}.tar", "train-000003.tar, which does not exist"),
        ("{folder}/nothing-*.tar", "holds no shards"),
        ("http://127.0.0.1:9/data", "127.0.0.1:9"),
    ],
)
def test_what_cannot_be_read_is_told(shards, tmp_path, monkeypatch, where, words):
    monkeypatch.setattr(remote, "WAITS", (0.0,))
    with pytest.raises(UserError, match=words) as caught:
        stream(where.format(folder=shards), "pillow", cache=str(tmp_path / "cache"))
    assert "\n" not in str(caught.value)
