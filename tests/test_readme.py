"""What README says can be typed, and exists."""

import re
import shlex
import subprocess
import sys

import ranks

from ddae.cli import parse
from ddae.eval.recipes import FINETUNING, PROBING
from ddae.eval.recipes_segment import SEGMENTATION
from ddae.eval.recipes_tokenizer import TOKENIZING
from ddae.presets import METHODS, names

README = (ranks.ROOT / "README.md").read_text()
CLUSTER = (ranks.ROOT / "docs" / "cluster.md").read_text()


def test_its_commands_parse():
    text = (README + CLUSTER).replace("\\\n", " ")
    commands = re.findall(r"launch/(?:pretrain\.py|slurm_pretrain\.sh) ([^`\n']*)", text)
    assert len(commands) >= 6
    for command in commands:
        words = [word for word in shlex.split(command, comments=True) if word not in ("--show", "--help", "...")]
        assert parse(words).preset in names()
    (flags,) = re.findall(r"`(--pixel\.taps[^`]*)`", README)
    assert not parse(flags.split()).feature.enabled


def test_commands_of_evaluations_parse():
    kinds = {"finetune": FINETUNING, "linear_probe": PROBING, "segment": SEGMENTATION}
    text = (README + (ranks.ROOT / "docs" / "evaluation.md").read_text()).replace("\\\n", " ")
    commands = re.findall(rf"launch/({'|'.join(kinds)})\.py (--[^`\n]*)", text)
    assert {name for name, _ in commands} == kinds.keys()
    for name, words in commands:
        assert parse(shlex.split(words, comments=True), kinds[name]).encoder.startswith("runs/")


def test_commands_of_tokenizers_parse():
    text = README.replace("\\\n", " ")
    (words,) = re.findall(r"launch/train_tokenizer\.py (--[^`\n]*)", text)
    assert parse(shlex.split(words), TOKENIZING).vq.teacher == "runs/demo"


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


def test_the_kernels_example_trains_without_the_rest_of_the_project():
    """Their README's toy model, in a Python that finds `ddae_kernels` and no `ddae`."""
    (code,) = re.findall(r"```python\n(.*?)```", (ranks.ROOT / "kernels" / "README.md").read_text(), re.DOTALL)
    first, last = rows_of("import sys; sys.path.insert(0, 'kernels'); sys.modules['ddae'] = None\n" + code)
    assert max(last[:2]) < 0.7 * min(first[:2])  # both taps' errors
    assert max(last[2:]) < -0.6  # both betas have left -0.5


def test_the_example_of_somebodys_own_loop_trains():
    """With the three lines; and without them it is a masked autoencoder of one tap, whose beta stays."""
    (code,) = re.findall(r"```python\n(import ddae_kernels.*?)```", README, re.DOTALL)
    marked = [line for line in code.splitlines() if re.search(r"# [123]\. ", line)]
    assert len(marked) == 3
    paths = "import sys; sys.path[:0] = ['kernels', '.']\n"
    first, last = rows_of(paths + code)
    assert len(last) == 4
    assert max(last[:2]) < 0.8 * min(first[:2])
    assert all(abs(beta + 0.5) > 0.01 for beta in last[2:])
    plain = code.replace(marked[0], "taps, tap_weight = (4,), torch.ones(1)").replace(
        marked[1], "beta = torch.zeros(1)"
    )
    first, last = rows_of(paths + plain.replace(marked[2], ""))
    assert last[0] < 0.8 * first[0]
    assert last[1] == 0


def rows_of(code: str) -> tuple[list[float], list[float]]:
    """The numbers of the first and the last line that it prints."""
    command = [sys.executable, "-I", "-c", code]
    said = subprocess.run(command, cwd=ranks.ROOT, capture_output=True, text=True, check=True).stdout
    rows = [[float(number) for number in re.findall(r"-?\d\.\d+", line)] for line in said.splitlines()]
    return rows[0], rows[-1]
