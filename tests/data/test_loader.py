import contextlib
import io
import itertools
import json
import os
import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import psutil
import pytest
import torch
from conftest import picture, sample
from PIL import Image

from ddae.config.pretrain import DataConfig
from ddae.data import backend as backend_module
from ddae.data import cache as cache_module
from ddae.data import loader as loader_module
from ddae.data.backend import Decoding, check_installed
from ddae.data.cache import Cache
from ddae.data.dali_fallback import FallbackDecoder
from ddae.data.decode import decode_crop
from ddae.data.loader import Loader
from ddae.data.masking import sample_mask
from ddae.data.preview import preview_images
from ddae.data.reader import RankBatch, Reader
from ddae.data.sampling import EpochOrder, crop_policy
from ddae.data.shard_writer import Sample, write_manifest, write_shard
from ddae.data.shards import Shards, open_shards
from ddae.distributed.logs import configure_logging
from ddae.errors import UserError
from ddae.sharding.check import check, mark_bad

CPU = torch.device("cpu")
SAMPLE_MASKS = partial(sample_mask, "bootmae_block", grid=(4, 4), num_masked=12)


def make_loader(shards, backend, rank_batch=None, **options):
    rank_batch = rank_batch or RankBatch(16, 16, 0, 1)
    config = DataConfig(
        train=str(shards), batch_size=rank_batch.batch_size, backend=backend, **{"workers": 0} | options
    )
    return Loader(config, 32, 0, rank_batch, CPU, None, SAMPLE_MASKS)


def read_batches(shards, backend, step=0, count=4, rank_batch=None, **options):
    loader = make_loader(shards, backend, rank_batch, **options)
    try:
        batches = list(itertools.islice(loader.batches(step), count))
    finally:
        loader.close()
    for batch in batches:  # in every back end, also for replaced samples
        assert all(map(torch.equal, batch.mask, SAMPLE_MASKS(batch.seeds)))
    return batches


def equal(one, other):
    return all(map(torch.equal, (*one[:3], *one.mask), (*other[:3], *other.mask)))


@pytest.mark.parametrize("backend", ["pillow", "dali"])
def test_batches_do_not_depend_on_workers_or_first_step(shards, backend):
    """Images, seeds, samples and masks are bit-identical, also across the end of an epoch."""
    expected = read_batches(shards, backend, count=8)
    for workers, step in ((1, 0), (2, 0), (3, 5), (0, 7)):
        actual = read_batches(shards, backend, step, 8 - step, workers=workers)
        assert all(map(equal, expected[step:], actual))


@pytest.mark.parametrize("backend", ["pillow", "dali"])
@pytest.mark.parametrize("workers", [0, 2])
def test_only_worker_processes_read_and_sample_masks(shards, backend, workers, monkeypatch):
    """Calls in a worker process do not reach the lists of this one."""
    reads, plans, masks = [], [], []
    read_into, plan = Shards.read_into, Reader.plan
    monkeypatch.setattr(Shards, "read_into", lambda self, *args: reads.append(args) or read_into(self, *args))
    monkeypatch.setattr(Reader, "plan", lambda self, *args: plans.append(args) or plan(self, *args))
    loader = make_loader(shards, backend, workers=workers)
    loader.sample_masks = lambda seeds: masks.append(seeds) or SAMPLE_MASKS(seeds)
    batches = list(itertools.islice(loader.batches(0), 4))
    loader.close()
    assert [len(each) > 0 for each in (reads, plans, masks)] == [workers == 0] * 3
    assert all(map(equal, batches, read_batches(shards, backend)))


@pytest.mark.parametrize("backend", ["pillow", "dali"])
def test_closing_ends_the_worker_processes(shards, backend):
    before = set(psutil.Process().children())
    loader = make_loader(shards, backend, workers=2)
    next(loader.batches(0))
    workers = set(psutil.Process().children()) - before
    assert len(workers) == 2
    loader.close()
    assert not any(worker.is_running() for worker in workers)
    loader.raw_batches(0).close()  # a stream that was never read
    assert set(psutil.Process().children()) <= before


def test_encoded_files_stay_as_they_are_while_they_are_referred_to(shards, monkeypatch):
    """Also beyond the number of shared buffers, and if they do not fit into one."""
    expected = list(itertools.islice(make_loader(shards, "dali").raw_batches(0), 20))
    for spare in (loader_module.BUFFER_SPARE, 1.0, 0.01):  # the second holds only some of the micro-batches
        monkeypatch.setattr(loader_module, "BUFFER_SPARE", spare)
        files = make_loader(shards, "dali", workers=2).raw_batches(0)
        actual = list(itertools.islice(files, 20))
        files.close()
        for one, other in zip(expected, actual, strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.lengths, other.lengths)


def test_ranks_together_read_the_global_batch(shards):
    expected = read_batches(shards, "pillow", count=2)
    ranks = [read_batches(shards, "pillow", count=4, rank_batch=RankBatch(16, 4, rank, 2)) for rank in range(2)]
    for step, batch in enumerate(expected):
        micro_batches = [micro for rank in ranks for micro in rank[2 * step : 2 * step + 2]]
        for i in range(3):
            assert torch.equal(torch.cat([micro[i] for micro in micro_batches]), batch[i])


@pytest.mark.parametrize("workers", [0, 2])
def test_dali_and_pillow_give_the_same_batches(shards, workers):
    pytest.importorskip("nvidia.dali")
    by_dali = read_batches(shards, "dali", workers=workers)
    for expected, actual in zip(read_batches(shards, "pillow"), by_dali, strict=True):
        assert torch.equal(expected.seeds, actual.seeds)
        assert torch.equal(expected.samples, actual.samples)
        assert actual.images.dtype == torch.uint8
        difference = (expected.images.int() - actual.images.int()).abs().float()
        assert difference.mean() < 0.1  # of 255: two JPEG decoders
        assert difference.max() <= 2


@pytest.mark.parametrize("backend", ["pillow", "dali"])
def test_exif_orientation_is_ignored(backend, tmp_path):
    """Boxes refer to the stored image in both back ends."""
    pytest.importorskip("nvidia.dali")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    samples = []
    for number in range(16):
        image, buffer = picture(number).resize((120, 64)), io.BytesIO()
        image.save(buffer, "JPEG", exif=rotated, quality=95)
        samples.append(Sample(f"s{number}", buffer.getvalue(), 0, 120, 64))
    write_manifest(tmp_path, {"train-000000.tar": write_shard(tmp_path / "train-000000.tar", samples)})
    (batch,) = read_batches(tmp_path, backend, count=1)
    (expected,) = read_batches(tmp_path, "pillow", count=1)
    assert (batch.images.int() - expected.images.int()).abs().float().mean() < 1


def test_pillow_crops_before_resizing():
    """Pixels outside the box do not contribute: the crop of one half of a two-colour picture has one colour."""
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
    batch, other = read_batches("", "synthetic", count=2)
    assert batch.images.shape == (16, 3, 32, 32)
    assert batch.images.float().std() > 50
    assert not torch.equal(batch.seeds, other.seeds)


@pytest.mark.parametrize("backend", ["synthetic", "pillow", "dali"])
def test_reader_output_can_be_pinned(shards, backend):
    """pin_memory() rejects views with repeated elements."""
    loader = make_loader("" if backend == "synthetic" else shards, backend)
    batch = loader._reader()[0]
    tensors = [each for each in (*batch, *batch.plan, *batch.plan.crops) if isinstance(each, torch.Tensor)]
    assert len(tensors) == 7
    assert all(each.is_contiguous() for each in tensors)


def test_preview_loads_central_squares(shards):
    images, held_out = preview_images(DataConfig(train=str(shards)), 32, 5)
    assert images.shape == (5, 3, 32, 32)
    assert not held_out  # there are no validation shards
    first = sample(0)
    side = min(first.width, first.height)
    box = (first.width - side) // 2, (first.height - side) // 2, side, side
    assert torch.equal(images[0], torch.tensor(decode_crop(first.jpeg, box, False, 32)))


def test_missing_dali_is_reported(monkeypatch):
    assert check_installed("pillow") == "pillow"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed"):
        check_installed("dali")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("remainder, workers", [("carry_over", 0), ("carry_over", 3), ("drop", 1)])
def test_ranks_together_read_each_sample_once_per_epoch(shards, world_size, remainder, workers):
    """100 samples in shards of 40, 24 and 36, batches of 24: the same batches for any number of ranks and workers."""
    rank_batches = [RankBatch(24, 24 // world_size, rank, world_size) for rank in range(world_size)]
    loaders = [make_loader(shards, "dali", each, remainder=remainder, workers=workers) for each in rank_batches]
    assert {loader.epoch_samples for loader in loaders} == {100 if remainder == "carry_over" else 96}
    per_rank = []
    for loader in loaders:
        files = loader.raw_batches(0)
        per_rank.append([raw.plan.samples for raw in itertools.islice(files, 25)])  # six epochs of 100
        files.close()
    steps = [torch.cat(step) for step in zip(*per_rank, strict=True)]
    epoch = loaders[0].epoch_samples
    epochs = torch.cat(steps)[: 6 * epoch].split(epoch)
    for samples in epochs:
        assert len(samples.unique()) == len(samples)
    if remainder == "drop":
        dropped = {tuple(set(range(100)) - set(samples.tolist())) for samples in epochs}
        assert len(dropped) > 1  # not the same samples in every epoch
    one_rank = make_loader(shards, "dali", RankBatch(24, 24, 0, 1), remainder=remainder).raw_batches(0)
    for step in steps:
        assert torch.equal(step, next(one_rank).plan.samples)
    one_rank.close()


def test_describe_states_workers_and_the_handling_of_the_remainder(shards):
    assert "100 images from pillow, 3 workers," in make_loader(shards, "pillow", workers=3).describe()
    assert f"{len(os.sched_getaffinity(0))} worker" in make_loader(shards, "pillow", workers=None).describe()
    assert "the last 4 of an epoch are carried over to the next" in make_loader(shards, "pillow").describe()
    assert "the last 4 of an epoch are dropped" in make_loader(shards, "pillow", remainder="drop").describe()
    assert "epoch" not in make_loader(shards, "pillow", RankBatch(20, 20, 0, 1)).describe()


def test_too_few_images_are_rejected(shards):
    with pytest.raises(UserError, match="100 images for 128 ranks"):
        make_loader(shards, "pillow", RankBatch(128, 1, 0, 128))
    with pytest.raises(UserError, match="larger than the 100 images"):
        make_loader(shards, "pillow", RankBatch(128, 128, 0, 1), remainder="drop")
    assert len(read_batches(shards, "pillow", rank_batch=RankBatch(128, 128, 0, 1), count=1)[0].images) == 128


def test_auto_selects_the_faster_backend_and_keeps_it(shards, monkeypatch):
    loader = make_loader(shards, "auto")
    loader.select_backend()
    assert loader.backend in ("pillow", "dali")
    assert re.search(r"pillow \d+/s, dali \d+/s", loader.describe())
    for rates in ({"pillow": 2.0, "dali": 1.0}, {"pillow": 1.0, "dali": 2.0}):
        monkeypatch.setattr(backend_module, "measure", lambda *_, rates=rates: rates)
        loader = make_loader(shards, "auto")
        loader.select_backend()
        assert loader.backend == max(rates, key=lambda name: rates[name])
    loader = make_loader(shards, "auto")
    loader.select_backend(Decoding("pillow"))  # of an earlier start of the run
    assert "pillow (as before)" in loader.describe()
    monkeypatch.setattr(backend_module, "dali_installed", lambda: False)
    loader = make_loader(shards, "auto")
    loader.select_backend(Decoding("dali"))
    assert "pillow (DALI is not installed)" in loader.describe()


@pytest.mark.parametrize(
    "of_ranks, previous, expected",
    [
        ([True, True], None, True),
        ([True, False], None, False),  # whole images on all ranks
        ([True, True], Decoding("dali", False), False),  # as the earlier start did
        ([True, True], Decoding("dali", True), True),
        ([False, True], Decoding("dali", True), False),  # another machine, on which it would crash
        ([True, True], Decoding("pillow", False), True),
    ],
)
def test_all_ranks_decode_in_the_same_way(of_ranks, previous, expected, shards, monkeypatch):
    monkeypatch.setattr("ddae.data.loader.can_decode_regions", lambda *_: of_ranks[0])
    monkeypatch.setattr("ddae.data.loader.gather", lambda _: of_ranks)
    loader = make_loader(shards, "dali")
    loader.select_backend(previous)
    assert loader.decoding == Decoding("dali", expected)


def damaged_copy(shards, folder, damage):
    """Copy the shards and damage samples without changing their lengths; damage: its kind by sample."""
    shutil.copytree(shards, folder)
    opened = open_shards(str(folder), Cache(folder, 0))
    for number, kind in damage.items():
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
        with open(opened.paths[shard], "r+b") as file:
            file.seek(int(opened.offset[number]))
            file.write(data)
    return folder


BAD = {3: "truncated", 4: "garbage", 50: "empty", 99: "other size"}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_logged_and_counted(shards, tmp_path, monkeypatch, capfd, workers):
    """The next good sample replaces a bad one, with its own crop and mask, identically in both back ends."""
    monkeypatch.setattr(loader_module, "MAX_BAD_FRACTION", 0.05)
    folder = damaged_copy(shards, tmp_path / "bad", BAD)
    configure_logging()
    streams = {}
    for backend in ("pillow", "dali"):
        loader = make_loader(folder, backend, workers=workers)
        streams[backend] = list(itertools.islice(loader.batches(0), 14))  # two epochs
        assert set(loader.bad) == set(BAD)
        assert loader.read_stats()["data/decode_errors"] == 4
        assert loader.read_stats()["throughput/decode_images_per_s"] == 0  # none since the last call
        loader.close()
        lines = capfd.readouterr().out.splitlines()
        assert len(lines) == 4  # once each, although the stream reaches them twice
        for number in BAD:
            assert any(re.search(rf"rank 0\] skipping .*{sample(number).key}: ", line) for line in lines)
    undamaged = read_batches(shards, "pillow", count=14)
    replacements = {3: 5, 4: 5, 50: 51, 99: 0}
    for pillow, dali, original in zip(*streams.values(), undamaged, strict=True):
        assert torch.equal(pillow.samples, dali.samples)
        assert torch.equal(pillow.seeds, dali.seeds)
        assert all(map(torch.equal, (*pillow.mask, *dali.mask), 2 * SAMPLE_MASKS(pillow.seeds)))
        assert (pillow.images.int() - dali.images.int()).abs().float().mean((1, 2, 3)).max() <= 0.5
        assert pillow.samples.tolist() == [replacements.get(number, number) for number in original.samples.tolist()]
        is_good = torch.tensor([number not in BAD for number in original.samples.tolist()])
        assert torch.equal(pillow.images[is_good], original.images[is_good])
        assert torch.equal(pillow.seeds[is_good], original.seeds[is_good])


def test_out_of_memory_is_not_taken_for_a_bad_image(shards):
    class OutOfMemoryDecoder:
        def submit(self, *_):
            pass

        def result(self):
            raise torch.OutOfMemoryError("CUDA out of memory")

    order, crop = EpochOrder(np.array([0, 100]), 0), crop_policy("random", (1, 1))
    reader = Reader(open_shards(str(shards), Cache(shards, 0)), order, RankBatch(4, 4, 0, 1), 32, crop, decodes=False)
    decoder = FallbackDecoder(reader, lambda batch_size, queue: OutOfMemoryDecoder())
    with pytest.raises(torch.OutOfMemoryError):
        decoder.decode_next(map(reader.__getitem__, itertools.count()))


def test_only_the_batch_with_a_bad_image_is_decoded_image_by_image(shards, tmp_path):
    """A new pipeline decodes those that were in the queue behind it."""
    dali, made = pytest.importorskip("ddae.data.dali"), []
    folder = damaged_copy(shards, tmp_path / "bad", {4: "garbage"})
    reader = make_loader(folder, "dali", RankBatch(10, 10, 0, 1))._reader()

    def new_decoder(batch, queue):
        made.append(batch)
        return dali.DaliDecoder(32, batch, 1, CPU, queue=queue)

    decoder, files = FallbackDecoder(reader, new_decoder), map(reader.__getitem__, range(12))
    bad = [sample for _ in range(10) for sample, _ in decoder.decode_next(files).bad]
    assert bad == [4]
    assert made == [10, 10, 1]


def test_files_are_decoded_before_an_error_of_the_reader_after_them(shards):
    """The error arrives in its place, although DALI's queue was never full."""
    dali = pytest.importorskip("ddae.data.dali")
    reader = make_loader(shards, "dali", RankBatch(4, 4, 0, 1))._reader()
    files = iter([reader[0], reader[1]._replace(error="the disk is gone")])
    decoder = FallbackDecoder(reader, lambda batch, queue: dali.DaliDecoder(32, batch, 1, CPU, queue=queue))
    (expected,) = read_batches(shards, "dali", rank_batch=RankBatch(4, 4, 0, 1), count=1)
    assert torch.equal(decoder.decode_next(files).images, expected.images)
    assert decoder.decode_next(files).error == "the disk is gone"


@pytest.mark.parametrize("backend", ["pillow", "dali"])
def test_too_many_bad_samples_end_the_run(shards, tmp_path, backend):
    folder = damaged_copy(shards, tmp_path / "bad", {7: "truncated"})  # 1 % of the samples; the limit is 0.1 %
    loader = make_loader(folder, backend)
    list(itertools.islice(loader.batches(0), 7))
    message = r"1 of 100 images cannot be decoded.*train-000000.tar:s00007 \(the file is truncated"
    with pytest.raises(UserError, match=message):
        loader.read_stats()
    loader.close()


def test_samples_listed_as_bad_are_not_read(shards, tmp_path):
    folder = damaged_copy(shards, tmp_path / "bad", BAD)
    problems, _ = check(folder, full=True, num_workers=1)
    assert mark_bad(folder, problems) == 3
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["shards"]["train-000000.tar"]["bad"] == ["s00003", "s00004"]
    loader = make_loader(folder, "pillow", RankBatch(12, 12, 0, 1))
    assert loader.num_samples == 97
    assert "3 more are listed as bad" in loader.describe()
    assert loader.fingerprint != make_loader(shards, "pillow").fingerprint
    batches = list(itertools.islice(loader.batches(0), 8))
    assert set(loader.bad) == {96}  # decodes, but to another size than the manifest states
    loader.close()
    assert len(batches) == 8


def test_completely_damaged_data_set_is_reported(shards, tmp_path):
    folder = damaged_copy(shards, tmp_path / "bad", dict.fromkeys(range(100), "garbage"))
    for backend, workers in (("pillow", 0), ("pillow", 2), ("dali", 2)):
        with pytest.raises(UserError, match=r"^100 samples in a row cannot be read.*--full\.$") as caught:
            read_batches(folder, backend, workers=workers)
        assert "\n" not in str(caught.value)


@contextlib.contextmanager
def served(folder):
    """Serve a folder over HTTP. Yield its URL and the list of requested paths."""
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("backend, pattern", [("pillow", ""), ("dali", "/train-{000000..000002}.tar")])
def test_shards_at_urls_give_the_same_batches(shards, tmp_path, backend, pattern):
    local = read_batches(shards, backend, count=8)
    with served(shards) as (url, requests):
        options = {"workers": 2, "cache": str(tmp_path / "cache")}
        for expected, actual in zip(local, read_batches(url + pattern, backend, count=8, **options), strict=True):
            assert equal(expected, actual)
        assert sum(path.endswith(".tar") for path in requests) == 3  # each shard once
        read_batches(url + pattern, backend, count=8, **options)
        assert sum(path.endswith(".tar") for path in requests) == 3


def test_cache_smaller_than_the_data_set_works(shards, tmp_path):
    sizes = [path.stat().st_size for path in shards.glob("*.tar")]
    options = {"workers": 2, "cache": str(tmp_path / "cache"), "cache_gib": (max(sizes) + 50000) / 2**30}
    with served(shards) as (url, requests):
        for expected, actual in zip(read_batches(shards, "dali"), read_batches(url, "dali", **options), strict=True):
            assert torch.equal(expected.images, actual.images)
    assert sum(path.endswith(".tar") for path in requests) >= 3


def test_shard_with_another_hash_than_its_manifest_is_rejected(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "RETRY_DELAYS_S", (0.0,))
    changed = damaged_copy(shards, tmp_path / "changed", {3: "garbage"})
    with served(changed) as (url, _), pytest.raises(UserError, match="sha256"):
        read_batches(url, "pillow", cache=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "where, message",
    [
        ("pipe:cat x.tar", "would run a command"),
        ("{folder}/train-{{000000..000007}}.tar", "train-000003.tar does not exist"),
        ("{folder}/nothing-*.tar", "holds no shards"),
        ("http://127.0.0.1:9/data", "127.0.0.1:9"),
    ],
)
def test_unreadable_locations_are_reported(shards, tmp_path, monkeypatch, where, message):
    monkeypatch.setattr(cache_module, "RETRY_DELAYS_S", (0.0,))
    with pytest.raises(UserError, match=message) as caught:
        read_batches(where.format(folder=shards), "pillow", cache=str(tmp_path / "cache"))
    assert "\n" not in str(caught.value)
