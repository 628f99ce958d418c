"""At every ZeRO stage gradients are plain autograd's and the teacher is float64's: the gate for a new DeepSpeed."""

import json

import pytest
import ranks

COUNTS = [2, *(pytest.param(count, marks=pytest.mark.faults) for count in (1, 4))]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What tests/support/numerics.py found, by number of ranks and (stage, micro-batches a step)."""
    folder, known = tmp_path_factory.mktemp("numerics"), {}

    def of(count):
        if count not in known:
            cases = [(stage, micros) for stage in range(4) for micros in (1, 2)]
            runs = []
            for stage, micros in cases:
                settings = json.loads((ranks.ROOT / "ds_configs" / f"zero{stage}.json").read_text())
                settings["train_micro_batch_size_per_gpu"] = 16 // (count * micros)
                file = folder / f"{count}_{stage}_{micros}.json"
                file.write_text(json.dumps(settings))
                words = ranks.arguments("none", "none", stage, "--engine.precision", "fp32")
                words[words.index("--ds_config") + 1] = str(file)
                runs.append(words)
            said = ranks.run_program(count, ["tests/support/numerics.py"], runs)
            lines = [json.loads(line.removeprefix("FOUND ")) for line in said.splitlines() if line.startswith("FOUND")]
            known[count] = dict(zip(cases, lines, strict=True))
        return known[count]

    return of


@pytest.mark.parametrize("count", COUNTS)
def test_gradients_are_plain_autograds(count, found, record_result):
    """Gradients of all parameters and betas against plain autograd, ZeRO 0 to 3, one and two micro-batches a step."""
    results = found(count)
    for case, result in results.items():
        assert result["parameters"] < 1e-6, case
        assert result["betas"] < 1e-6, case
    worst = max(max(result["parameters"], result["betas"]) for result in results.values())
    record_result(f"largest difference {worst:.1e} of the layer's largest gradient")


@pytest.mark.parametrize("count", COUNTS)
def test_the_teacher_follows_at_its_slowest(count, found, record_result):
    """EMA teacher: 1,000 steps at m = 0.99999 towards weights 1 % away, ZeRO 0 to 3, against float64."""
    results = found(count)
    for case, result in results.items():
        assert result["teacher"] < 1e-3, case
    worst = max(result["teacher"] for result in results.values())
    record_result(f"largest error {worst:.1e} of the distance travelled")
