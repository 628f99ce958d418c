"""Checks that need a GPU, in at most eight minutes; the main questions are answered in the first four.

    python tests/gpu_check.py gpu-check.json [SHARDS] [--dry]

Parts, in this order: whether gradients reduced on a second stream are DeepSpeed's; the step of one GPU of 64 with 64
images each, DDAE beside MAE; the tests that need a GPU; times of the losses; the step variant by variant; the loaders,
if there are SHARDS. The results are in one JSON file, which is rewritten whenever a part has new rows, and the last
lines name the defaults that the rows speak for changing. --dry: all parts at tiny sizes, for a machine without a GPU.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
SECONDS = 480  # of all parts
PRESETS = ["ddae_vit_b16_100e", "mae_vit_b16_100e", "ddae_vit_s16_100e"]
VARIANTS = ["naive", "shortcuts", "triton", "compiled", "two streams"]
TESTS = [
    *(f"tests/kernels/test_{name}.py" for name in ("triton", "dynamic", "distance")),
    *("tests/data/test_dali.py", "tests/distributed/test_engine.py", "tests/training/test_step.py"),
    "tests/method/test_cuda_graph.py",
    "tests/training/test_compile.py::test_student_graphs_equal_compiled_modules",
]
# The packages that check tensor shapes need not be installed.
PYTEST = ("-m", "pytest", "-q", "-o", "addopts=--strict-markers", "-m", "not reliability")
# The setting that each variant of the step of a rank would turn on by default.
DEFAULTS = {
    "lean reduction": "engine.gradient_reduction auto: lean",
    "teacher stream": "engine.teacher_stream",
    "teacher graph": "engine.teacher_graph",
    "compiled": "engine.compile",
    "graphs": "engine.compile, engine.teacher_graph, engine.student_graphs",
}


class Part(NamedTuple):
    """One command, and the file to which it writes its rows."""

    name: str
    command: list[str]
    rows: Path | None = None


def parts(folder: Path, shards: str, dry: bool) -> list[Part]:
    """Return the parts in their order. folder: for their rows."""
    benchmark = ["launch/benchmark.py"]
    rank, step, losses, loader = (folder / name for name in ("rank.json", "step.json", "losses.csv", "loader.csv"))
    of_rank = [*benchmark, "step", "--fake_ranks", "--json", str(rank), "--preset"]
    of_step = [*benchmark, "step", "--json", str(step), "--profile", str(folder / "trace.json"), "--preset"]
    of_losses = ["kernels/bench/bench.py", "--out", str(losses), "--batch"]
    if dry:
        of_rank += ["demo", "--batch", "1", "--rounds", "1"]
        of_step += ["demo", "--batch", "2", "--rounds", "1", "--variants", "naive", "shortcuts"]
        of_losses += ["2", "--only", "mse"]
    else:
        of_rank += [*PRESETS, "--rounds", "5"]
        of_step += [*PRESETS[:2], "--rounds", "3", "--variants", *VARIANTS]
        of_losses += ["256"]
    found = [
        Part("reduction", ["tests/support/overlap.py"]),
        Part("rank", of_rank, rank),
        Part("tests", [*PYTEST, *(["--setup-plan"] if dry else []), *TESTS]),
        Part("losses", of_losses, losses),
        Part("step", of_step, step),
    ]
    if shards:
        of_loader = ["loader", "--data", shards, "--out", str(loader.with_suffix("")), "--rounds", "1" if dry else "2"]
        found.append(Part("loader", [*benchmark, *of_loader, *(["--seconds", "1"] if dry else [])], loader))
    return found


def run_part(part: Part, log: Path, deadline: float, save: Any) -> int:
    """Run a part until the deadline, and save its rows as they come. Return its exit code, 124 for the deadline."""
    with open(log, "w") as file:
        options = {"cwd": ROOT, "stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen([sys.executable, *part.command], **options)
        while process.poll() is None:
            time.sleep(1)
            save()
            if time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)  # its own processes, too
                process.wait()
                return 124
    return process.returncode


def read_rows(path: Path | None) -> list[dict]:
    """Return the rows of a CSV or JSON file; none if it does not exist or is being written."""
    if path is None or not path.exists():
        return []
    if path.suffix == ".csv":
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError:
        return []


def advice(results: dict[str, dict]) -> list[str]:
    """Return a line for each default that the rows speak for changing: faster with each preset, in every round."""
    lines = []
    rows = results.get("rank", {}).get("rows", [])
    for variant, default in DEFAULTS.items():
        of_variant = [row for row in rows if row["variant"] == variant]
        equal = variant != "lean reduction" or results.get("reduction", {}).get("code") == 0
        if of_variant and equal and all(row["ratio_low"] > 1 for row in of_variant):
            ratios = ", ".join(f"{row['ratio']:.2f} {row['preset']}" for row in of_variant)
            lines.append(f"faster in every round, turn on by default: {default} ({ratios})")
    for row in rows:
        if row["gpu_ms"] is not None and row["host_ms"] > row["gpu_ms"]:
            times = f"{row['host_ms']:.0f} ms of the host, {row['gpu_ms']:.0f} ms of the GPU"
            lines.append(f"the host is the limit: {row['preset']}, {row['variant']}: {times}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("shards", nargs="?", default="", help="folder of shards, to measure the loaders, too")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, without a GPU")
    args = parser.parse_args()
    start = time.monotonic()
    folder = args.out.parent / f"{args.out.stem}_parts"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / name) for name in (".", "kernels", "tests/support"))
    results: dict[str, dict] = {}
    for part in parts(folder, args.shards, args.dry):
        began = time.monotonic()
        result = results[part.name] = {"code": None, "seconds": 0, "rows": []}

        def save(part: Part = part, result: dict = result, began: float = began) -> None:
            result["seconds"], rows = round(time.monotonic() - began), read_rows(part.rows)
            result["rows"] = rows or result["rows"]
            args.out.write_text(json.dumps(results, indent=1) + "\n")

        log = folder / f"{part.name}.log"
        result["code"] = run_part(part, log, start + SECONDS, save)
        save()
        lines = log.read_text(errors="replace").splitlines()
        print(f"{part.name}: code {result['code']}, {result['seconds']} s", *lines[-12:], sep="\n  ", flush=True)
    print(*advice(results), sep="\n")
    return int(any(part["code"] for part in results.values()))


if __name__ == "__main__":
    sys.exit(main())
