"""The documentation site builds without a warning; the commands and messages in its pages exist; the notebook runs."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
import ranks

from ddae import cli
from ddae.config.cli import PRETRAINING, normalise, parse
from ddae.config.evaluation import FINETUNING, PROBING
from ddae.config.own import Images, own
from ddae.config.presets import preset
from ddae.config.segmentation import SEGMENTATION
from ddae.config.tokenizer import TOKENIZING

DOCS = ranks.ROOT / "docs"
PAGES = [ranks.ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
EXPERIMENTS = {
    "pretrain": PRETRAINING,
    "finetune": FINETUNING,
    "linear_probe": PROBING,
    "segment": SEGMENTATION,
    "train_tokenizer": TOKENIZING,
}
SCRIPTS = {"shard_imagenet": "shard"}  # names of scripts that differ from their modules in ddae/commands
COMMAND = re.compile(
    r"^    (?:python |deepspeed .*?|sbatch .*?)?(ddae \w+|(?:launch|data_prep)/\w+\.(?:py|sh))(.*)$", re.M
)


def commands():
    """Yield (page, program, arguments) of each command in a code block of the pages."""
    for page in PAGES:
        for program, rest in COMMAND.findall(page.read_text().replace("\\\n", " ")):
            args = shlex.split(rest, comments=True)
            if "..." not in args:
                yield page.name, program, args


def test_the_site_builds(tmp_path):
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ranks.ROOT, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = {path.name: path.read_text() for path in (tmp_path / "site").glob("[!4]*.html")}
    assert {"index.html", "photos.html", "METHOD.html", "api.html", "kernels.html"} <= pages.keys()
    assert 'id="ddae.api.pretrain"' in pages["api.html"]
    for name, text in pages.items():
        for target in re.findall(r'<(?:img|a)[^>]* (?:src|href)="([^":#?]+)["#]', text):
            assert (tmp_path / "site" / target).exists(), f"{name}: {target}"


@pytest.mark.parametrize(
    "page, program, args", [pytest.param(*each, id=" ".join([*each[:2], *each[2]])) for each in commands()]
)
def test_commands_are_accepted(page, program, args, monkeypatch):
    """The arguments of every command in the pages are parsed by the command itself."""
    name = Path(program).stem.replace("slurm_pretrain", "pretrain") if "/" in program else program.split()[1]
    module = cli.COMMANDS[name].module if name in cli.COMMANDS and "/" not in program else SCRIPTS.get(name, name)
    if program == "ddae pretrain":
        args = ["--data.train", *args] if not args[0].startswith("-") else args
        start = own(Images(1000, 500), has_gpu=False) if "--preset" not in args else None
        parse([arg for arg in normalise(args) if arg not in ("--show", "--help", "--help_all")], PRETRAINING, start)
        return
    if module in EXPERIMENTS:
        given = [arg for arg in normalise(args) if arg not in ("--show", "--help", "--help_all")]
        parse(given, EXPERIMENTS[module])
        return
    if module == "sample_photos":  # a script alone
        assert args[:1] in ([], ["--out"], ["--masks"])
        return
    import argparse
    import importlib

    class ParsedError(Exception):
        pass

    parse_args, parse_known_args = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args

    def stop(self, *more):
        parse_args(self, *more)
        raise ParsedError

    def stop_at_rest(self, *more):  # of a command whose further arguments another parser reads
        result = parse_known_args(self, *more)
        if sys._getframe(1).f_code is not parse_args.__code__ and not isinstance(self, argparse._SubParsersAction):
            raise ParsedError
        return result

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop_at_rest)
    monkeypatch.setattr(sys, "argv", [program, *args])
    with pytest.raises(ParsedError):
        importlib.import_module(f"ddae.commands.{module}").main()


def test_table_of_preset_own():
    """photos.md states the settings that config/own.py chooses."""
    text = (DOCS / "photos.md").read_text()
    for images, size in ((20_000, 192), (200_000, 384), (10**7, 768)):
        config = own(Images(images, 500), has_gpu=True)
        assert config.model.width == size
        assert str(size) in text
        assert f"{config.data.batch_size:,}" in text
    cpu = own(Images(100, 500), has_gpu=False)
    assert f"{cpu.model.depth} blocks of width {cpu.model.width}; {cpu.model.image_size} pixels" in text
    assert f"at least {cpu.train.steps:,} steps" in text
    assert preset("own").data.val_share == 0.05


def test_messages_of_the_troubleshooting_page_exist():
    """Each quoted part of a message stands in a string of the code."""
    strings = []
    for file in [*ranks.ROOT.glob("ddae/**/*.py"), ranks.ROOT / "launch" / "require_packages.py"]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                strings.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
    rows = re.findall(r"^\| `([^`]+)`", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 25
    for message in rows:
        assert any(message in string for string in strings), message


def test_the_notebook_runs(tmp_path):
    """The notebook, with fewer steps, from its first cell to its last."""
    notebook = nbformat.read(DOCS / "example.ipynb", as_version=4)
    notebook.cells[1].source = re.sub(r"STEPS = \d+", "STEPS = 30", notebook.cells[1].source)
    assert "STEPS = 30" in notebook.cells[1].source
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    before = dict(os.environ)
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{before['PATH']}"
    os.environ["PYTHONPATH"] = f"{ranks.ROOT}:{ranks.ROOT / 'kernels'}"
    try:
        client.execute()
    finally:
        os.environ.clear()
        os.environ.update(before)
    outputs = "".join(str(output) for cell in notebook.cells for output in cell.get("outputs", []))
    assert "two-crop retrieval" in outputs
    assert "[1, 65, 96]" in outputs  # tokens of the encoder
    assert (tmp_path / "exported" / "model.safetensors").exists()
