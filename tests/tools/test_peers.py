"""The benchmark of MAE in other libraries; what needs them is skipped where they are not installed."""

import json
from argparse import Namespace

import pytest
import ranks
import torch

from ddae.config.presets import mae
from ddae.config.scales import SCALES, at_scale
from ddae.errors import UserError
from ddae.method.model import build_model
from ddae.tools.bench_peers import PEERS, benchmark_peers


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_has_the_same_shape(name):
    """As many trained parameters as this project's MAE, and features that do not depend on masks."""
    pytest.importorskip(name)
    config = at_scale(mae("s16", 100), "nano")
    peer, images = PEERS[name](config), torch.rand(2, 3, 32, 32)
    trained = sum(each.numel() for each in peer.parameters() if each.requires_grad)
    assert trained == pytest.approx(sum(each.numel() for each in build_model(config).parameters()), rel=0.01)
    assert peer(images).isfinite()
    features = peer.features(images)
    assert features.shape == (2, config.model.width)
    torch.testing.assert_close(peer.features(images), features)


@pytest.mark.slow
def test_benchmark_of_peers(digits, tmp_path):
    """One row for each library, after equally many images, with k-NN and its baselines."""
    for package in PEERS:
        pytest.importorskip(package)
    out = tmp_path / "rows.json"
    args = ["peers", "--scale", "nano", "--data", str(digits), "--steps", "4", "--rounds", "2", "--json", str(out)]
    code, output = ranks.run_command("launch/benchmark.py", *args)
    assert code == 0, output
    rows = json.loads(out.read_text())
    assert [row["library"] for row in rows] == ["ddae", *PEERS]
    assert all(row["images"] == 4 * SCALES["nano"].batch_size for row in rows)
    assert all(min(row["images_per_s"], row["peak_bytes"], row["knn"], row["chance"]) > 0 for row in rows)


@pytest.mark.parametrize(
    "args, reason",
    [
        (["--scale", "micro"], "--data is missing; peers needs shards"),
        (["--data", "d", "--scale", "huge"], "expected one of nano, micro"),
    ],
)
def test_wrong_arguments(args, reason):
    code, output = ranks.run_command("launch/benchmark.py", "peers", *args)
    assert code == 2
    assert reason in output
    assert "Traceback" not in output


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr("ddae.tools.bench_peers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"Install them: pip install 'ddae\[peers\]'"):
        benchmark_peers(Namespace(data="d", scale="nano"), [])
