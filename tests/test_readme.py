"""The commands, examples, links and names in README.md and docs/ are valid."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import ranks

from ddae.config.cli import parse
from ddae.config.evaluation import FINETUNING, PROBING
from ddae.config.presets import METHODS, names
from ddae.config.segmentation import SEGMENTATION
from ddae.config.tokenizer import TOKENIZING

README = (ranks.ROOT / "README.md").read_text()
CLUSTER = (ranks.ROOT / "docs" / "cluster.md").read_text()
EVALUATION = (ranks.ROOT / "docs" / "evaluation.md").read_text()
METHOD = (ranks.ROOT / "METHOD.md").read_text()
PAGES = [*ranks.ROOT.glob("*.md"), *ranks.ROOT.glob("docs/*.md"), ranks.ROOT / "kernels" / "README.md"]


def test_pretraining_commands_parse():
    text = (README + CLUSTER).replace("\\\n", " ")
    commands = re.findall(r"launch/(?:pretrain\.py|slurm_pretrain\.sh) ([^`\n']*)", text)
    assert len(commands) >= 7
    for command in commands:
        args = [arg for arg in shlex.split(command, comments=True) if arg not in ("--show", "--help", "...")]
        assert parse(args).preset in names()
    (flags,) = re.findall(r"`(--pixel\.taps[^`]*)`", README)
    assert not parse(flags.split()).feature.enabled


def test_gradient_variants_parse():
    flags = re.findall(r"`(--dynamic\.[^`]*)`", README + METHOD)
    assert len(flags) >= 6
    for each in flags:
        parse(each.split())


def test_evaluation_commands_parse():
    experiments = {"finetune": FINETUNING, "linear_probe": PROBING, "segment": SEGMENTATION}
    text = (README + EVALUATION).replace("\\\n", " ")
    commands = re.findall(rf"launch/({'|'.join(experiments)})\.py (--[^`\n]*)", text)
    assert {name for name, _ in commands} == experiments.keys()
    for name, args in commands:
        assert parse(shlex.split(args, comments=True), experiments[name]).encoder.startswith("runs/")


def test_tokenizer_commands_parse():
    text = README.replace("\\\n", " ")
    (args,) = re.findall(r"launch/train_tokenizer\.py (--[^`\n]*)", text)
    assert parse(shlex.split(args), TOKENIZING).vq.teacher == "runs/demo"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_to_existing_files_and_headings(page: Path):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, link


def test_folder_table_is_complete():
    table = README.split("## Where things are")[1].split("\n## ")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    listed = [folder for row in rows for folder in re.findall(r"`([\w/]+)`", row)]
    sources = {path.parent.relative_to(ranks.ROOT).as_posix() for path in ranks.ROOT.glob("ddae/*/__init__.py")}
    assert sources == {folder for folder in listed if folder.startswith("ddae/")}
    for path in re.findall(r"`((?:ddae/|kernels|launch|data_prep|ds_configs|tests)[\w/]*(?:\.py)?)`", README):
        assert (ranks.ROOT / path).exists(), path


def test_commands_in_the_task_table_exist():
    for name in re.findall(r"`((?:launch|data_prep)/\w+\.py)`", README):
        assert (ranks.ROOT / name).exists(), name


def test_table_lists_every_method():
    for method in METHODS:
        assert f"| `{method}` |" in README


def test_makefile_has_the_documented_targets():
    makefile = (ranks.ROOT / "Makefile").read_text()
    documented = set(re.findall(r"`make ([\w-]+)", "".join(page.read_text() for page in PAGES)))
    for target in documented | {"venv", "demo", "test", "lint", "simd", "clean"}:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target


def test_kernels_example_trains_without_the_rest_of_the_project():
    """The toy model of kernels/README.md, with `ddae_kernels` importable and `ddae` not."""
    (code,) = re.findall(r"```python\n(.*?)```", (ranks.ROOT / "kernels" / "README.md").read_text(), re.DOTALL)
    isolation = "import sys; sys.path.insert(0, 'kernels'); sys.modules['ddae'] = None\n"
    command = [sys.executable, "-I", "-c", isolation + code]
    result = subprocess.run(command, cwd=ranks.ROOT, capture_output=True, text=True, check=True)
    first, last = first_and_last_row(result.stdout)
    assert max(last[:2]) < 0.7 * min(first[:2])  # both taps' errors
    assert max(last[2:]) < -0.6  # both betas have left -0.5


def test_example_training_loop_trains():
    """README's loop trains with the lines marked as new, and without them as a masked autoencoder of the last block."""
    (code,) = re.findall(r"```python\n(import ddae_kernels.*?)```", README, re.DOTALL)
    exit_code, output = ranks.run_command("-c", code)
    assert exit_code == 0, output
    first, last = first_and_last_row(output)
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
    exit_code, output = ranks.run_command("-c", "\n".join(before))
    assert exit_code == 0, output
    first, last = first_and_last_row(output)
    assert last[0] < 0.5 * first[0]


def first_and_last_row(output: str) -> tuple[list[float], list[float]]:
    """Return the decimal numbers of the first and the last line that begins with "step"."""
    lines = [line for line in output.splitlines() if line.startswith("step")]
    rows = [[float(number) for number in re.findall(r"-?\d\.\d+", line)] for line in lines]
    return rows[0], rows[-1]
