"""What README says can be typed, and exists."""

import re
import shlex
import subprocess
import sys

import ranks

from ddae.config.cli import parse
from ddae.config.evaluation import FINETUNING, PROBING
from ddae.config.presets import METHODS, names
from ddae.config.segmentation import SEGMENTATION
from ddae.config.tokenizer import TOKENIZING

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
    alone = "import sys; sys.path.insert(0, 'kernels'); sys.modules['ddae'] = None\n"
    command = [sys.executable, "-I", "-c", alone + code]
    done = subprocess.run(command, cwd=ranks.ROOT, capture_output=True, text=True, check=True)
    first, last = rows_in(done.stdout)
    assert max(last[:2]) < 0.7 * min(first[:2])  # both taps' errors
    assert max(last[2:]) < -0.6  # both betas have left -0.5


def test_the_example_of_somebodys_own_loop_trains():
    """With what is marked as new, and as it was before, when it is a masked autoencoder of the last block."""
    (code,) = re.findall(r"```python\n(import ddae_kernels.*?)```", README, re.DOTALL)
    exit_code, said = ranks.run_command("-c", code)
    assert exit_code == 0, said
    first, last = rows_in(said)
    assert last[0] < 0.5 * first[0]
    assert all(abs(beta + 0.5) > 0.01 for beta in last[1:])
    before = []
    for line in code.splitlines():
        if "predicted = " in line:
            before.append("    tokens = encoder(images, layers=(4,), visible=mask.visible)")
        if "loss.backward" in line:
            before.append("    loss = (predicted - target).square().mean()")
        if "# new" not in line:
            before.append(line.replace(", beta {beta.tolist()}", ""))
    assert len(before) == len(code.splitlines()) - 3
    exit_code, said = ranks.run_command("-c", "\n".join(before))
    assert exit_code == 0, said
    first, last = rows_in(said)
    assert last[0] < 0.5 * first[0]


def rows_in(said: str) -> tuple[list[float], list[float]]:
    """The numbers of the first and the last line that were printed."""
    lines = [line for line in said.splitlines() if line.startswith("step")]
    rows = [[float(number) for number in re.findall(r"-?\d\.\d+", line)] for line in lines]
    return rows[0], rows[-1]
