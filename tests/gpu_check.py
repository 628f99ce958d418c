"""Checks that need a GPU, in about eight minutes: tests, times of the losses, step variants, loaders.

The results of all parts are in one JSON file, which is rewritten after each part.

    PYTHONPATH=kernels:. python tests/gpu_check.py gpu-check.json [SHARDS]
"""

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
VARIANTS = ["naive", "shortcuts", "triton", "compiled", "two streams"]
PRESETS = ["ddae_vit_s16_100e", "ddae_vit_b16_100e", "mae_vit_b16_100e"]
TESTS = [
    *(f"tests/kernels/test_{name}.py" for name in ("triton", "dynamic", "distance")),
    *("tests/data/test_dali.py", "tests/distributed/test_engine.py", "tests/training/test_step.py"),
    "tests/method/test_cuda_graph.py",
]


# The packages that check tensor shapes need not be installed.
PYTEST = ("--noconftest", "-q", "-o", "addopts=--strict-markers")


def main() -> int:
    out, shards = Path(sys.argv[1]), sys.argv[2:3]
    folder = out.parent / f"{out.stem}_parts"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kernels, step, loader = folder / "kernels.csv", folder / "step.json", folder / "loader"
    python = sys.executable
    parts = {
        "tests": [python, "-m", "pytest", *PYTEST, "-m", "not reliability", *TESTS],
        "kernels": [python, "kernels/bench/bench.py", "--batch", "256", "--out", str(kernels)],
        "step": [python, "launch/benchmark.py", "step", "--preset", *PRESETS, "--rounds", "5", "--json", str(step)],
        "loader": [python, "launch/benchmark.py", "loader", "--data", *shards, "--rounds", "2", "--out", str(loader)],
    }
    parts["step"] += ["--profile", str(folder / "trace.json"), "--variants", *VARIANTS]
    if not shards:
        del parts["loader"]
    results: dict[str, dict] = {}
    for name, command in parts.items():
        start = time.monotonic()
        with open(folder / f"{name}.log", "w") as log:
            code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        rows = read_rows(kernels if name == "kernels" else step if name == "step" else loader.with_suffix(".csv"))
        results[name] = {
            "code": code,
            "seconds": round(time.monotonic() - start),
            "rows": rows if name != "tests" else [],
        }
        out.write_text(json.dumps(results, indent=1) + "\n")
        lines = (folder / f"{name}.log").read_text().splitlines()
        print(f"{name}: code {code}, {results[name]['seconds']} s", *lines[-12:], sep="\n  ", flush=True)
    return int(any(part["code"] for part in results.values()))


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a CSV or JSON file; none if it does not exist."""
    if not path.exists():
        return []
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    sys.exit(main())
