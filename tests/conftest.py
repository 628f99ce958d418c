"""Fixtures: shards of small generated images, smooth as photographs are, written once per session."""

import io
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from PIL import Image

from ddae.data.digits import write_digits
from ddae.data.shard_writer import Sample, write_manifest, write_shard

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # set before Triton is imported: runs its kernels in Python
os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
# As in an activated environment: use the `deepspeed` and `ninja` of this Python. Another version of ninja would rebuild
# DeepSpeed's shared-memory op, which takes a minute.
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))  # one cache per environment
if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes: waiting OpenMP threads would spin on their cores
    os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup ranks would ignore it, too
    signal.signal(signal.SIGHUP, lambda *_: None)


LONGEST = (
    *("test_whole_runs", "test_golden", "test_tables", "test_own_photos", "test_triton", "test_plan", "test_site"),
    *("test_crashes", "test_finetune", "test_launcher", "test_nothing_is_lost", "test_knn", "test_linear_probe"),
)


def pytest_addoption(parser):
    parser.addoption("--write-golden", action="store_true", help="record tests/golden_curves.json again")


def pytest_collection_modifyitems(items):
    """Start with the longest modules: two run at a time (without xdist's own order), and the last would run alone."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def picture(number: int) -> Image.Image:
    """Return a smooth image of random size, 70 to 139 pixels a side; the same number gives the same image."""
    rng = np.random.default_rng(number)
    width, height = int(rng.integers(70, 140)), int(rng.integers(70, 140))
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def sample(number: int) -> Sample:
    """Return the picture of this number as a JPEG sample, in one of five classes."""
    image, buffer = picture(number), io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return Sample(f"s{number:05d}", buffer.getvalue(), number % 5, image.width, image.height)


def make_shards(folder, counts=(40, 24, 36), split="train", start=0):
    """Write one shard for each of `counts` samples, with index and manifest. Earlier shards stay in the manifest."""
    manifest = folder / "manifest.json"
    entries = json.loads(manifest.read_text())["shards"] if manifest.exists() else {}
    for number, count in enumerate(counts):
        path = folder / f"{split}-{number:06d}.tar"
        entries[path.name] = write_shard(path, [sample(start + i) for i in range(count)])
        start += count
    write_manifest(folder, entries, classes=list("abcde"))
    return folder


@pytest.fixture(scope="session", autouse=True)
def stop_ranks():
    """End the processes that ranks.py started when the tests end."""
    yield
    if ranks.forks.cache_info().currsize:
        ranks.forks().close()


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Return a folder with 100 training images in three shards."""
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Return a folder with 1,797 handwritten digits in shards: 1,400 for training, the others for validation."""
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """Return the export of an untrained tiny encoder."""
    from ddae.config.pretrain import ModelConfig
    from ddae.export.encoder import write_export
    from ddae.models.vit import Encoder, initialise

    encoder = Encoder(ModelConfig(width=64, depth=4, heads=2, image_size=32, patch_size=8))
    initialise(encoder, torch.Generator().manual_seed(0))
    write_export(encoder, folder := tmp_path_factory.mktemp("encoder") / "encoder")
    return folder


@pytest.fixture
def record_result(request, record_property):
    """Return a function that records the test's result for docs/reliability.md.

    The scenario is the first line of the test's docstring.
    """
    lines = (request.function.__doc__ or "").strip().splitlines()
    case = f" [{request.node.callspec.id}]" if hasattr(request.node, "callspec") else ""
    record_property("scenario", lines[0].rstrip(".") + case)
    return lambda result: record_property("result", result)
