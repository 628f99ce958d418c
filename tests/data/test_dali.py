"""DALI's graph: one for CPU and GPU. What only a GPU shows waits for `make gpu-check`."""

import io
import os

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from ddae.data.decode import decode_crop
from ddae.data.sampling import ASPECT, random_crops

dali = pytest.importorskip("ddae.data.dali")
CPU = torch.device("cpu")


def jpegs(count, size=None, **options):
    files = []
    for number in range(count):
        image, buffer = picture(number), io.BytesIO()
        image = image if size is None else image.resize(size)
        image.save(buffer, "JPEG", quality=92, **options)
        files.append((np.frombuffer(buffer.getvalue(), np.uint8), image.size))
    return [file for file, _ in files], torch.tensor([size for _, size in files])


def crops_of(sizes, scale=(0.2, 1.0)):
    return random_crops(torch.arange(len(sizes)) * 104729, sizes[:, 0], sizes[:, 1], scale)


@pytest.mark.parametrize("resizes", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_every_crop_is_pillows(subsampling, resizes):
    """The same box, to half a level of 255 on average in every single image, also by the whole graph, as on a GPU."""
    files, sizes = jpegs(60, subsampling=subsampling)
    crops = crops_of(sizes)
    theirs = dali.DaliDecoder(64, 60, 2, CPU, resizes=resizes).decode(files, crops.boxes, crops.flips)
    for file, box, flip, other in zip(files, crops.boxes.tolist(), crops.flips.tolist(), theirs, strict=True):
        ours = decode_crop(file.tobytes(), tuple(box), flip, 64)
        assert np.abs(ours.astype(int) - other.numpy().astype(int)).mean() <= 0.5


def test_regions_and_whole_images_give_the_same_crops():
    files, sizes = jpegs(20)
    crops = crops_of(sizes)
    region, whole = (
        dali.DaliDecoder(48, 20, 2, CPU, region=region, resizes=True).decode(files, crops.boxes, crops.flips)
        for region in (True, False)
    )
    assert (region.int() - whole.int()).abs().float().mean((1, 2, 3)).max() < 0.1


@pytest.mark.parametrize("region", [True, False])
def test_the_graph_of_a_gpu_is_built_as_far_as_that_goes_without_one(region):
    """Operators, their devices and their arguments are checked when the graph is written out."""
    graph = dali.crop_graph(224, "gpu", region, 0.65, batch_size=8, num_threads=2, device_id=None)
    written = graph.serialize()
    for word in (b"mixed", b"hw_decoder_load", b"jpeg_fancy_upsampling", b"gpu"):
        assert word in written
    assert (b"ImageSlice" in written) == region
    with pytest.raises(ValueError, match="much"):
        dali.crop_graph(224, "gpu", region, "much", batch_size=8, num_threads=2, device_id=None).serialize()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("region", [True, False])
@pytest.mark.parametrize("load", [0.0, 0.65])
def test_a_gpu_gives_pillows_crops(region, load):
    files, sizes = jpegs(60)
    crops = crops_of(sizes)
    decoder = dali.DaliDecoder(64, 60, 2, torch.device("cuda", 0), region, load)
    theirs = decoder.decode(files, crops.boxes, crops.flips).cpu()
    for file, box, flip, other in zip(files, crops.boxes.tolist(), crops.flips.tolist(), theirs, strict=True):
        ours = decode_crop(file.tobytes(), tuple(box), flip, 64)
        assert np.abs(ours.astype(int) - other.numpy().astype(int)).mean() <= 0.5


def die(*_):
    os.kill(os.getpid(), 11)


def sleep(*_):
    import time

    time.sleep(60)


def test_a_decoder_is_tried_in_a_process_that_may_crash(monkeypatch):
    """nvImageCodec 0.9 was reported to end the process on regions of ordinary JPEGs."""
    files, sizes = jpegs(4)
    arguments = (files, crops_of(sizes).boxes, 32, CPU, 0.65)
    assert dali.region_works(*arguments)
    monkeypatch.setattr(dali, "_try_region", die)
    assert not dali.region_works(*arguments)
    monkeypatch.setattr(dali, "_try_region", sleep)
    monkeypatch.setattr(dali, "PROBE_SECONDS", 0.5)
    assert not dali.region_works(*arguments)


@pytest.mark.parametrize("resizes", [False, True])
def test_both_back_ends_draw_torchvisions_law(resizes):
    """Crops of a picture whose red is the column and whose green is the row tell, by their pixels, where they lie."""
    count, side = 1500, 256
    ramp = np.zeros((side, side, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(side), np.arange(side)[:, None]
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "JPEG", quality=100, subsampling=0)
    file = np.frombuffer(buffer.getvalue(), np.uint8)
    sizes = torch.full((count, 2), side)
    crops = crops_of(sizes)
    torch.manual_seed(0)
    drawn = [
        RandomResizedCrop.get_params(torch.empty(3, side, side), [0.2, 1.0], list(ASPECT)) for _ in range(4 * count)
    ]
    top, left, tall, wide = np.array(drawn, float).T
    decoder = dali.DaliDecoder(16, count, 2, CPU, resizes=resizes)
    by_dali = decoder.decode([file] * count, crops.boxes, crops.flips).numpy()
    boxes = zip(crops.boxes.tolist(), crops.flips.tolist(), strict=True)
    by_pillow = np.stack([decode_crop(buffer.getvalue(), tuple(box), flip, 16) for box, flip in boxes])
    for pixels in (by_dali.astype(float), by_pillow.astype(float)):
        columns, rows = pixels[:, 0].mean(1), pixels[:, 1].mean(2)  # [count, 16]
        flipped = columns[:, 0] > columns[:, -1]
        assert flipped.mean() == pytest.approx(0.5, abs=0.05)
        found_wide, found_tall = (np.abs(line[:, -4] - line[:, 3]) * 16 / 9 for line in (columns, rows))
        found_left = columns.mean(1) + 0.5 - found_wide / 2
        found_top = rows.mean(1) + 0.5 - found_tall / 2
        for found, law in ((found_wide, wide), (found_tall, tall), (found_left, left), (found_top, top)):
            assert ks_2samp(found, law + np.random.default_rng(0).normal(0, 0.5, len(law))).pvalue > 1e-3
        assert ks_2samp(found_wide * found_tall, wide * tall).pvalue > 1e-3
        assert ks_2samp(found_wide / found_tall, wide / tall).pvalue > 1e-3
