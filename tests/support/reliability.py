"""docs/reliability.md from the results of make test-faults: what was tried, and what happened.

python tests/support/reliability.py RESULTS.xml [LATER.xml ...] docs/reliability.md     a test's latest result counts
"""

import os
import platform
import sys
import time
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path

from ddae.training.run_dir import git

GROUPS = {
    "test_crashes": "Crashes, damage, hosts, long lives",
    "test_signals": "Signals and launchers",
    "test_elastic": "Other ranks, stages and accumulation",
    "test_numerics": "Gradients and the teacher",
    "test_engine": "Clipping and steps that are left out, against torch alone",
    "test_step": "The step against the one written first",
    "test_compile": "torch.compile",
    "test_plan": "The plan's memory model",
    "test_tracker": "MLflow",
    "test_training": "Numbers that go wrong, disks that are full",
}


def table(results: list[Path]) -> str:
    """Markdown; a test that failed or was skipped says so in its row."""
    groups: dict[str, list[str]] = {}
    cases = {}
    for file in results:
        for case in ElementTree.parse(file).getroot().iter("testcase"):
            cases[case.get("classname"), case.get("name")] = case
    for case in cases.values():
        said = {each.get("name"): each.get("value") for each in case.iter("property")}
        happened = said.get("happened", "")
        for verdict in ("failure", "error", "skipped"):
            if (found := case.find(verdict)) is not None:
                happened = f"**{verdict}**: {(found.get('message') or '').splitlines()[0][:150]}"
        name = (case.get("classname") or "").rsplit(".", 1)[-1]
        if not name:  # where the run was broken off
            continue
        tried = said.get("tried") or (case.get("name") or "").removeprefix("test_").replace("_", " ")
        cells = [tried, happened or "as it should be", f"{float(case.get('time', 0)):.0f}"]
        groups.setdefault(name, []).append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    pins = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed", "mlflow"))
    lines = [
        "# What was tried, and what happened",
        "",
        "Made by `make test-faults` from its own results; not to be edited by hand. "
        f"{time.strftime('%Y-%m-%d')}, the last run at commit {git('rev-parse', '--short', 'HEAD')}, "
        f"{os.cpu_count()} cores, no GPU, Python {platform.python_version()}, {pins}.",
    ]
    for name, rows in groups.items():
        lines += ["", f"## {GROUPS.get(name, name)}", "", "| tried | what happened | s |", "|---|---|--:|", *rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(sys.argv[-1]).write_text(table([Path(word) for word in sys.argv[1:-1]]))
