"""Several sources of training shards in one run: order, weights, resume, ranks."""

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import sample

from ddae.config.base import ShardsConfig
from ddae.config.cli import parse
from ddae.data.cache import Cache
from ddae.data.loader import Loader
from ddae.data.reader import RankBatch
from ddae.data.shard_writer import write_manifest, write_shard
from ddae.data.shards import open_shards
from ddae.errors import UserError


def write_source(folder, first, count, per_shard=10, classes=("a", "b", "c", "d", "e")):
    folder.mkdir()
    entries = {}
    for number, start in enumerate(range(first, first + count, per_shard)):
        name = f"train-{number:06d}.tar"
        images = range(start, min(start + per_shard, first + count))
        entries[name] = write_shard(folder / name, [sample(i) for i in images])
    write_manifest(folder, entries, classes=list(classes))
    return str(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return write_source(folder / "a", 0, 24), write_source(folder / "b", 24, 40)


def stream(train, count, weights=(), rank=0, ranks=1, step=0, batch=8):
    """Return samples and seeds of `count` steps of one rank."""
    config = ShardsConfig(train=train, weights=weights, backend="pillow", workers=0, batch_size=batch)
    loader = Loader(config, 32, 0, RankBatch(batch, batch // ranks, rank, ranks), torch.device("cpu"))
    batches = loader.batches(step)
    found = [next(batches) for _ in range(count)]
    loader.close()
    return torch.cat([each.samples for each in found]), torch.cat([each.seeds for each in found])


def test_shards_follow_each_other(sources):
    cache = Cache(None, 0)  # not used by local shards
    joined, parts = open_shards(sources, cache), [open_shards(each, cache) for each in sources]
    assert len(joined) == 64
    assert [joined.read(i) for i in (0, 23, 24, 63)] == [sample(i).jpeg for i in (0, 23, 24, 63)]
    assert joined.labels().tolist() == [label for part in parts for label in part.labels().tolist()]
    assert joined.source_shards == (3, 4)
    assert joined.fingerprint not in {part.fingerprint for part in parts}


def test_an_epoch_contains_every_image_once(sources):
    samples, seeds = stream(sources, 16)
    assert sorted(samples[:64].tolist()) == sorted(samples[64:].tolist()) == list(range(64))
    assert len(set(seeds.tolist())) == 128


def test_a_pattern_of_the_same_shards_gives_the_same_stream(sources, tmp_path):
    """The order depends on the shards alone."""
    whole = write_source(tmp_path / "whole", 0, 24)
    assert torch.equal(stream(sources[0], 6)[0], stream((whole,), 6)[0])


def test_weights_are_passes_in_an_epoch(sources):
    samples, seeds = stream(sources, 24, weights=(5, 1))  # 5 x 24 + 40 = 160 samples, 20 steps
    counts = Counter(samples[:160].tolist())
    assert [counts[i] for i in range(64)] == [5] * 24 + [1] * 40
    assert len(set(seeds.tolist())) == len(seeds)  # each pass has its own crops and masks
    assert torch.equal(stream(sources, 24, weights=(1, 1))[1], stream(sources, 24)[1])


@pytest.mark.parametrize("weights", [(), (2, 1)])
def test_resume_and_ranks(sources, weights):
    samples, seeds = stream(sources, 12, weights)
    resumed = stream(sources, 5, weights, step=7)
    assert torch.equal(resumed[0], samples[56:])
    assert torch.equal(resumed[1], seeds[56:])
    by_rank = [stream(sources, 12, weights, rank, 2)[0].view(12, 4) for rank in range(2)]
    assert torch.equal(torch.cat(by_rank, 1).flatten(), samples)


def test_other_classes_are_rejected(sources, tmp_path):
    other = write_source(tmp_path / "other", 0, 10, classes="vwxyz")
    with pytest.raises(UserError, match="other, whose classes differ"):
        stream((sources[0], other), 1)


@pytest.mark.parametrize("weights", [(1,), (1, 2, 3)])
def test_one_weight_for_each_source(sources, weights):
    with pytest.raises(UserError, match=rf"data.weights has {len(weights)} values for 2 sources"):
        stream(sources, 1, weights)


def test_flags_and_config(sources):
    one = parse(["--preset", "demo", "--data.train", "x"])
    assert (one.data.train, one.data.sources) == ("x", ("x",))
    two = parse(["--preset", "demo", "--data.train", "x", "s3://key:secret@b/y?z", "--data.weights", "1", "3"])
    assert two.data.sources == ("x", "s3://key:secret@b/y?z")
    assert two.data.weights == (1, 3)
    assert two.to_dict()["data"]["train"] == ["x", "s3://b/y"]
    assert type(two).from_dict(two.to_dict()).data.weights == (1, 3)
    with pytest.raises(UserError, match=r"data.weights is 0; expected a value >= 1"):
        parse(["--preset", "demo", "--data.train", "x", "y", "--data.weights", "0", "1"])


def test_decoded_in_memory(sources):
    config = ShardsConfig(train=sources, in_memory=True, workers=0, batch_size=8)
    loader = Loader(config, 32, 0, RankBatch(8, 8, 0, 1), torch.device("cpu"))
    loader.select_backend()
    batch = next(loader.batches(0))
    loader.close()
    config = ShardsConfig(train=sources, backend="pillow", workers=0, batch_size=8)
    plain = Loader(config, 32, 0, RankBatch(8, 8, 0, 1), torch.device("cpu"))
    assert np.array_equal(batch.images, next(plain.batches(0)).images)
    plain.close()
