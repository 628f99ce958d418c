"""DALI's graph, which CPU and GPU share. Tests that need a GPU run with `make gpu-check`."""

import gc
import io
import multiprocessing
import os

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from ddae.data.decode import decode_crop
from ddae.data.sampling import ASPECT_RANGE, random_crops

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


@pytest.mark.parametrize("resize_in_dali", [False, True])
@pytest.mark.parametrize("subsampling, size", [(0, 64), (1, 64), (2, 64), (2, (64, 40))])
def test_crops_match_pillow(subsampling, size, resize_in_dali):
    """The mean difference of each image is at most 0.5 of 255, with torch's resize and with that of DALI's graph."""
    files, sizes = jpegs(60, subsampling=subsampling)
    crops = crops_of(sizes)
    by_dali = dali.DaliDecoder(size, 60, 2, CPU, resize_in_dali=resize_in_dali).decode(files, crops.boxes, crops.flips)
    for file, box, flip, actual in zip(files, crops.boxes.tolist(), crops.flips.tolist(), by_dali, strict=True):
        expected = decode_crop(file.tobytes(), tuple(box), flip, size)
        assert np.abs(expected.astype(int) - actual.numpy().astype(int)).mean() <= 0.5


@pytest.mark.parametrize("resize_in_dali", [False, True])
def test_queue_gives_the_batches_in_order(resize_in_dali):
    """Each with its own boxes and flips."""
    files, sizes = jpegs(24)
    crops = crops_of(sizes)
    batches = [(files[i : i + 6], crops.boxes[i : i + 6], crops.flips[i : i + 6]) for i in range(0, 24, 6)]
    single = dali.DaliDecoder(48, 6, 2, CPU, resize_in_dali=resize_in_dali)
    queued = dali.DaliDecoder(48, 6, 2, CPU, resize_in_dali=resize_in_dali, queue=2)
    queued.submit(*batches[0])
    with pytest.raises(RuntimeError, match="1 batches were submitted to a queue of 2"):
        queued.result()
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        if following is not None:
            queued.submit(*following)
        assert torch.equal(queued.result(), single.decode(*batch))


def test_region_and_whole_image_decoding_agree():
    files, sizes = jpegs(20)
    crops = crops_of(sizes)
    region, whole = (
        dali.DaliDecoder(48, 20, 2, CPU, region=region, resize_in_dali=True).decode(files, crops.boxes, crops.flips)
        for region in (True, False)
    )
    assert (region.int() - whole.int()).abs().float().mean((1, 2, 3)).max() < 0.1


@pytest.mark.parametrize("region", [True, False])
def test_gpu_graph_serializes_without_a_gpu(region):
    """Serialization checks operators, their devices and their arguments."""
    graph = dali.crop_graph(224, "gpu", region, 0.65, batch_size=8, num_threads=2, device_id=None)
    serialized = graph.serialize()
    for word in (b"mixed", b"hw_decoder_load", b"jpeg_fancy_upsampling", b"gpu"):
        assert word in serialized
    assert (b"ImageSlice" in serialized) == region
    with pytest.raises(ValueError, match="much"):
        dali.crop_graph(224, "gpu", region, "much", batch_size=8, num_threads=2, device_id=None).serialize()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("region", [True, False])
@pytest.mark.parametrize("load", [0.0, 0.65])
def test_gpu_crops_match_pillow(region, load):
    files, sizes = jpegs(60)
    crops = crops_of(sizes)
    decoder = dali.DaliDecoder(64, 60, 2, torch.device("cuda", 0), region, load)
    by_dali = decoder.decode(files, crops.boxes, crops.flips).cpu()
    for file, box, flip, actual in zip(files, crops.boxes.tolist(), crops.flips.tolist(), by_dali, strict=True):
        expected = decode_crop(file.tobytes(), tuple(box), flip, 64)
        assert np.abs(expected.astype(int) - actual.numpy().astype(int)).mean() <= 0.5


def test_forked_process_does_not_finalise_its_parents_pipelines():
    """A pipeline in a reference cycle is garbage in the parent, and collecting it in a forked process would crash."""
    gc.disable()
    try:
        decoder = dali.DaliDecoder(32, 2, 2, CPU)
        files, sizes = jpegs(2)
        crops = crops_of(sizes)
        decoder.decode(files, crops.boxes, crops.flips)
        decoder.cycle = decoder
        del decoder
        child = multiprocessing.get_context("fork").Process(target=gc.collect)
        child.start()
        child.join()
    finally:
        gc.enable()
        gc.collect()
    assert child.exitcode == 0


def crash(*_):
    os.kill(os.getpid(), 11)


def hang(*_):
    import time

    time.sleep(60)


def test_region_decoding_is_probed_in_a_process_that_may_crash(monkeypatch):
    """nvImageCodec 0.9 was reported to crash on regions of ordinary JPEGs."""
    files, sizes = jpegs(4)
    arguments = (files, crops_of(sizes).boxes, 32, CPU, 0.65)
    assert dali.region_decoding_works(*arguments)
    monkeypatch.setattr(dali, "_probe_region_decoding", crash)
    assert not dali.region_decoding_works(*arguments)
    monkeypatch.setattr(dali, "_probe_region_decoding", hang)
    monkeypatch.setattr(dali, "PROBE_TIMEOUT_S", 0.5)
    assert not dali.region_decoding_works(*arguments)


@pytest.mark.parametrize("resize_in_dali", [False, True])
def test_both_back_ends_crop_as_torchvision_does(resize_in_dali):
    """Compare the distribution of crop boxes with RandomResizedCrop.

    In the picture red is the column and green the row, so that the box can be recovered from the pixels of its crop.
    """
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
        RandomResizedCrop.get_params(torch.empty(3, side, side), [0.2, 1.0], list(ASPECT_RANGE))
        for _ in range(4 * count)
    ]
    top, left, tall, wide = np.array(drawn, float).T
    decoder = dali.DaliDecoder(16, count, 2, CPU, resize_in_dali=resize_in_dali)
    by_dali = decoder.decode([file] * count, crops.boxes, crops.flips).numpy()
    boxes = zip(crops.boxes.tolist(), crops.flips.tolist(), strict=True)
    by_pillow = np.stack([decode_crop(buffer.getvalue(), tuple(box), flip, 16) for box, flip in boxes])
    for pixels in (by_dali.astype(float), by_pillow.astype(float)):
        columns, rows = pixels[:, 0].mean(1), pixels[:, 1].mean(2)  # [count, 16]
        flipped = columns[:, 0] > columns[:, -1]
        assert flipped.mean() == pytest.approx(0.5, abs=0.05)
        measured_wide, measured_tall = (np.abs(line[:, -4] - line[:, 3]) * 16 / 9 for line in (columns, rows))
        measured_left = columns.mean(1) + 0.5 - measured_wide / 2
        measured_top = rows.mean(1) + 0.5 - measured_tall / 2
        for measured, expected in (
            (measured_wide, wide),
            (measured_tall, tall),
            (measured_left, left),
            (measured_top, top),
        ):
            assert ks_2samp(measured, expected + np.random.default_rng(0).normal(0, 0.5, len(expected))).pvalue > 1e-3
        assert ks_2samp(measured_wide * measured_tall, wide * tall).pvalue > 1e-3
        assert ks_2samp(measured_wide / measured_tall, wide / tall).pvalue > 1e-3
