"""What README says can be typed, and exists."""

import re
import shlex

import ranks

from ddae.cli import parse
from ddae.presets import METHODS, names

README = (ranks.ROOT / "README.md").read_text()


def test_its_commands_parse():
    text = README.replace("\\\n", " ")
    commands = re.findall(r"launch/pretrain\.py ([^`\n']*)", text)
    assert len(commands) >= 4
    for command in commands:
        words = [word for word in shlex.split(command, comments=True) if word not in ("--show", "--help")]
        assert parse(words).preset in names()
    (flags,) = re.findall(r"`(--pixel\.taps[^`]*)`", README)
    assert not parse(flags.split()).feature.enabled


def test_its_map_names_what_is_there():
    tree = README.split("## The tree")[1]
    for folder in re.findall(r"^    ([\w/]+/)  ", tree, re.MULTILINE):
        assert (ranks.ROOT / folder).is_dir(), folder
    sources = {path.name for path in ranks.ROOT.glob("[dklt]*/**/*.py")}
    for name in re.findall(r"[\w]+\.py", tree):
        assert name in sources, name
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ranks.ROOT / path).exists(), path


def test_its_table_has_every_method():
    for method in METHODS:
        assert f"| `{method}` |" in README
    for path in re.findall(r"`(ddae/[\w/]+\.py)`", README):
        assert (ranks.ROOT / path).exists()


def test_the_makefiles_targets_are_the_promised_ones():
    makefile = (ranks.ROOT / "Makefile").read_text()
    for target in ("venv", "demo", "test", "lint", "simd", "clean"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
