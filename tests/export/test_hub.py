"""Exports pushed to a hub: a local server stands in for it."""

import base64
import json
import runpy
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import ranks
import torch
from huggingface_hub import ModelCard, constants

from ddae.config.pretrain import ModelConfig
from ddae.eval.baselines import untrained_encoder
from ddae.export.encoder import write_export
from ddae.models.vit import Encoder


class Hub(BaseHTTPRequestHandler):
    """Accepts everything, and keeps the files of commits in server.files."""

    def answer(self, content, code=200):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer({"id": "me/mine", "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self.read_chunks()
        if self.server.refuses:
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            self.answer({"url": f"http://{self.headers['Host']}/me/mine", "name": "me/mine", "id": "1"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in files]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer(
                {
                    "success": True,
                    "commitOid": "1" * 40,
                    "commitUrl": f"http://{self.headers['Host']}/me/mine/commit/{'1' * 40}",
                }
            )
        else:
            self.answer({})

    def read_chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.refuses = {}, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", url)
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    yield server
    server.shutdown()


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    write_export(
        untrained_encoder(Encoder(ModelConfig(width=24, depth=2, heads=2, image_size=32, patch_size=8))),
        tmp_path / "encoder",
    )
    return tmp_path / "encoder"


def export(monkeypatch, *args) -> int:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ranks.ROOT / "launch" / "export.py"), run_name="__main__")
    return end.value.code


@pytest.mark.parametrize("form", ["transformers", "timm", "ddae"])
def test_push(form, hub, encoder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert export(monkeypatch, "--encoder", encoder, "--form", form, "--out", out, "--push", "me/mine") == 0
    assert "pushed: http://127.0.0.1" in capsys.readouterr().out
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir()}
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.library_name == form
    assert "Label-free pretrained encoder, written by ddae." in card.text


def test_dry_run_sends_nothing(hub, encoder, tmp_path, monkeypatch, capsys):
    args = ("--encoder", encoder, "--form", "timm", "--out", tmp_path / "out", "--push", "me/mine", "--dry_run")
    assert export(monkeypatch, *args) == 0
    output = capsys.readouterr().out
    assert "would be pushed to me/mine:" in output
    assert "model.safetensors" in output
    assert hub.files == {}
    assert export(monkeypatch, *args) == 0  # the export with metadata is still an export


def test_mistakes(hub, encoder, tmp_path, monkeypatch, capsys):
    def fails(*args) -> str:
        assert export(monkeypatch, "--encoder", encoder, "--out", tmp_path / "out", *args) == 2
        return capsys.readouterr().err

    assert "--push uploads a folder, but --form onnx is a file" in fails("--form", "onnx", "--push", "me/mine")
    assert "--dry_run is for --push" in fails("--dry_run")
    assert not (tmp_path / "out").exists()
    assert "is no name of a repository" in fails("--push", "a b/c d/e")
    hub.refuses = True
    assert "refuses (" in fails("--push", "me/mine")
    hub.shutdown()
    hub.server_close()
    message = fails("--push", "me/mine")
    assert "cannot be reached" in message
    assert (tmp_path / "out" / "model.safetensors").exists()
