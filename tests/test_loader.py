import io
import itertools

import numpy as np
import pytest
import torch
from conftest import picture, sample
from PIL import Image

from ddae.config import DataConfig
from ddae.data import pillow
from ddae.data.choice import check_installed
from ddae.data.loader import Loader
from ddae.data.preview import preview_images
from ddae.data.reader import Part
from ddae.data.shard_writer import Sample, write_manifest, write_shard
from ddae.errors import UserError

CPU = torch.device("cpu")


def stream(shards, backend, step=0, count=4, part=None, **options):
    config = DataConfig(train=str(shards), batch_size=16, backend=backend, **{"workers": 0} | options)
    loader = Loader(config, 32, 0, part or Part(16, 16, 0, 1), CPU)
    batches = list(itertools.islice(loader.batches(step), count))
    loader.close()
    return batches


def test_batches_do_not_depend_on_workers_or_where_one_begins(shards):
    alone = stream(shards, "pillow")
    for other in (stream(shards, "pillow", workers=2), [None, None, *stream(shards, "pillow", step=2, count=2)]):
        for a, b in zip(alone, other, strict=True):
            if b is not None:
                assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_ranks_see_the_global_batch_between_them(shards):
    alone = stream(shards, "pillow", count=2)
    ranks = [stream(shards, "pillow", count=4, part=Part(16, 4, rank, 2)) for rank in range(2)]
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
        assert difference.mean() < 1  # two JPEG decoders and two resamplers, in levels of 255
        assert difference.max() <= 16


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
    assert (pillow.decode(buffer.getvalue(), (0, 0, 32, 64), False, 16) == 0).all()
    whole = pillow.decode(buffer.getvalue(), (0, 0, 64, 64), False, 64)
    mirrored = pillow.decode(buffer.getvalue(), (0, 0, 64, 64), True, 64)
    assert whole.shape == (3, 64, 64)
    assert (whole[:, :, ::-1] == mirrored).all()
    assert (whole == halves.transpose(2, 0, 1)).all()


def test_synthetic_batches_need_no_data():
    batch, other = stream("", "synthetic", count=2)
    assert batch.images.shape == (16, 3, 32, 32)
    assert batch.images.float().std() > 50
    assert not torch.equal(batch.seeds, other.seeds)


def test_preview_shows_whole_images(shards):
    images, held_out = preview_images(DataConfig(train=str(shards)), 32, 5)
    assert images.shape == (5, 3, 32, 32)
    assert not held_out  # there are no validation shards
    opened = sample(0)
    side = min(opened.width, opened.height)
    box = (opened.width - side) // 2, (opened.height - side) // 2, side, side
    assert torch.equal(images[0], torch.tensor(pillow.decode(opened.jpeg, box, False, 32)))


def test_backend_is_chosen_and_named(monkeypatch):
    assert check_installed("pillow") == "pillow"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed"):
        check_installed("dali")
