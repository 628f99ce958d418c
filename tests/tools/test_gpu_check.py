"""gpu_check.py: its rows name the defaults to change, and a part ends at the deadline. Reduction beside DeepSpeed's."""

import json
import time

import gpu_check
import pytest
import ranks


def row(variant, ratio_low, preset="ddae_vit_b16_100e", gpu_ms=30.0):
    times = {"gpu_ms": gpu_ms, "host_ms": 20.0}
    return {"variant": variant, "preset": preset, "ratio": ratio_low + 0.1, "ratio_low": ratio_low} | times


@pytest.mark.parametrize(
    "rows, reduction, expected",
    [
        ([row("lean reduction", 1.1)], 0, ["engine.gradient_reduction auto: lean (1.20 ddae_vit_b16_100e)"]),
        ([row("lean reduction", 1.1)], 1, []),  # not equal to DeepSpeed's
        ([row("compiled", 1.2), row("compiled", 0.9, "mae_vit_b16_100e")], 0, []),
        ([row("default", 1.0, gpu_ms=10.0)], 0, ["the host is the limit"]),
        ([row("default", 1.0, gpu_ms=None)], 0, []),
    ],
)
def test_advice(rows, reduction, expected):
    lines = gpu_check.advice({"rank": {"rows": rows}, "reduction": {"code": reduction}})
    assert len(lines) == len(expected)
    assert all(text in line for text, line in zip(expected, lines, strict=True))


def test_a_part_ends_at_the_deadline_and_keeps_its_rows(tmp_path):
    file, saved = tmp_path / "rows.json", []
    code = f"import time; open({str(file)!r}, 'w').write('[{{\"a\": 1}}]'); time.sleep(60)"
    part = gpu_check.Part("slow", ["-c", code], file)
    start = time.monotonic()
    code = gpu_check.run_part(part, tmp_path / "log", start + 3, lambda: saved.append(gpu_check.read_rows(file)))
    assert code == 124
    assert time.monotonic() - start < 30
    assert saved[-1] == [{"a": 1}]


def test_all_parts_exist(tmp_path):
    for dry in (False, True):
        for part in gpu_check.parts(tmp_path, "shards", dry):
            files = [word for word in part.command if word.endswith(".py")]
            assert files
            assert all((ranks.ROOT / file).exists() for file in files)


def test_reduction_with_many_buckets_is_that_of_deepspeed():
    """overlap.py: gradients of one rank of 64; on a GPU reduced on a second stream, during the backward pass."""
    code, output = ranks.run_command("tests/support/overlap.py")
    assert code == 0, output
    result = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert result["difference"] == 0
    assert result["gradients"] > 10_000
