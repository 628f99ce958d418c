"""The benchmark script runs on any device and writes complete rows; the times themselves are not tested."""

import csv
import os
import re
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_benchmark_appends_rows(tmp_path):
    out = tmp_path / "results.csv"
    environment = os.environ | {"PYTHONPATH": "kernels:."}
    command = [sys.executable, "kernels/bench/bench.py", "--batch", "2", "--only", "pixel", "--out", str(out)]
    command += ["--step", "demo"]
    for _ in range(2):  # the second run appends to the file of the first
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert "x floor" in output
        assert re.search(r"reference  step +[\d.]+ ms  losses +[\d.]+ ms  [\d.]+% of the step", output)
    rows = list(csv.DictReader(out.open()))
    assert len(rows) % 2 == 0
    assert {row["impl"] for row in rows} >= {"eager", "compiled"}
    for row in rows:
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert int(row["floor_bytes"]) > 0
        assert row["hardware"]
        assert row["torch"]


@pytest.mark.slow
def test_host_time_of_direct_launches_and_of_operators():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "kernels/bench/bench.py", "--host", "--only", "mse", "pixel", "--batch", "2"]
    environment |= {"PYTHONPATH": "kernels:."}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^(\w+) +direct +(\d+) us  operators +(\d+) us  ratio ([\d.]+)$", output, re.MULTILINE)
    assert [row[0] for row in found] == ["mse", "pixel"]
    assert all(float(number) > 0 for row in found for number in row[1:])
