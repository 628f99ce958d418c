"""Small data for every test: shards of generated images that are smooth as photographs are, made once a session."""

import io
import json
import os
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
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels run in Python then
os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
# As in an activated environment: the `deepspeed` and `ninja` of this Python come first. Another ninja would build
# DeepSpeed's shared-memory op anew, a minute each time the two take turns.
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))  # nor another environment
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several: threads that wait for each other would spin on its cores
    os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_addoption(parser):
    parser.addoption("--write-golden", action="store_true", help="record tests/golden_curves.json anew")


def picture(number: int) -> Image.Image:
    """A smooth picture of its own size; the same number gives the same picture."""
    rng = np.random.default_rng(number)
    width, height = int(rng.integers(70, 140)), int(rng.integers(70, 140))
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def sample(number: int) -> Sample:
    image, buffer = picture(number), io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return Sample(f"s{number:05d}", buffer.getvalue(), number % 5, image.width, image.height)


def make_shards(folder, counts=(40, 24, 36), split="train", start=0):
    """Shards of these many samples, with indexes and manifest; those that the folder holds already stay listed."""
    manifest = folder / "manifest.json"
    entries = json.loads(manifest.read_text())["shards"] if manifest.exists() else {}
    for number, count in enumerate(counts):
        path = folder / f"{split}-{number:06d}.tar"
        entries[path.name] = write_shard(path, [sample(start + i) for i in range(count)])
        start += count
    write_manifest(folder, entries, classes=list("abcde"))
    return folder


@pytest.fixture(scope="session", autouse=True)
def no_rank_is_left():
    """What ranks.py has started ends with the tests."""
    yield
    if ranks.forks.cache_info().currsize:
        ranks.forks().close()


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder with 100 training images in three shards."""
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """1,797 handwritten digits in shards: 1,400 to learn from, the others to ask with."""
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """An export of a tiny encoder before any training."""
    from ddae.config.pretrain import ModelConfig
    from ddae.export.encoder import write_export
    from ddae.models.vit import Encoder, initialise

    encoder = Encoder(ModelConfig(width=64, depth=4, heads=2, image_size=32, patch_size=8))
    initialise(encoder, torch.Generator().manual_seed(0))
    write_export(encoder, folder := tmp_path_factory.mktemp("encoder") / "encoder")
    return folder


@pytest.fixture
def tell(request, record_property):
    """Says what happened, for the table of docs/reliability.md; what was tried is the first line of the docstring."""
    lines = (request.function.__doc__ or "").strip().splitlines()
    case = f" [{request.node.callspec.id}]" if hasattr(request.node, "callspec") else ""
    record_property("tried", lines[0].rstrip(".") + case)
    return lambda happened: record_property("happened", happened)
