"""At every ZeRO stage gradients equal plain autograd's, and the EMA teacher a float64 one. Checks a new DeepSpeed."""

import functools
import json

import pytest
import ranks

COUNTS = [2, *(pytest.param(count, marks=pytest.mark.faults) for count in (1, 4))]


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Return a function errors(count) -> {(stage, micro-batches a step, precision): errors} of support/numerics.py.

    count: number of ranks.
    """
    folder = tmp_path_factory.mktemp("numerics")

    @functools.cache
    def errors(count):
        cases = [(stage, micro_batches, "fp32") for stage in range(4) for micro_batches in (1, 2)]
        cases += [(2, 2, "bf16"), (2, 2, "bf16 reduced in fp32")]
        runs = []
        for stage, micro_batches, precision in cases:
            ds_json = json.loads((ranks.ROOT / "ds_configs" / f"zero{stage}.json").read_text())
            ds_json["train_micro_batch_size_per_gpu"] = 16 // (count * micro_batches)
            if precision.startswith("bf16"):  # several buckets
                ds_json["zero_optimization"]["reduce_bucket_size"] = 20000
            file = folder / f"{count}_{stage}_{micro_batches}_{precision}.json"
            file.write_text(json.dumps(ds_json))
            options = ("--engine.precision", precision.split()[0], "--ds_config", str(file))
            options += ("--engine.reduce_dtype", "fp32") if "reduced" in precision else ()
            runs.append(ranks.arguments("none", "none", stage, *options))
        lines = ranks.run_program(count, ["tests/support/numerics.py"], runs).splitlines()
        results = [json.loads(line.removeprefix("ERRORS ")) for line in lines if line.startswith("ERRORS")]
        return dict(zip(cases, results, strict=True))

    return errors


@pytest.mark.parametrize("count", COUNTS)
def test_gradients_equal_plain_autograd(count, errors, record_result):
    """Gradients of all parameters and betas against plain autograd, ZeRO 0 to 3, one and two micro-batches a step."""
    results = {case: result for case, result in errors(count).items() if case[-1] == "fp32"}
    for case, result in results.items():
        assert result["parameters"] < 1e-6, case
        assert result["betas"] < 1e-6, case
    worst = max(max(result["parameters"], result["betas"]) for result in results.values())
    record_result(f"largest difference {worst:.1e} of the layer's largest gradient")


@pytest.mark.parametrize("count", COUNTS)
def test_reduced_gradients_are_those_of_deepspeed(count, errors):
    """Averaged gradients of gradient_reduction.py and DeepSpeed's own hooks, to the bit, also bf16 summed in fp32."""
    results = errors(count)
    assert {case: result["reduction"] for case, result in results.items() if result["reduction"]} == {}
    assert not results[2, 2, "bf16"]["fp32_sums"]
    assert results[2, 2, "bf16 reduced in fp32"]["fp32_sums"]


@pytest.mark.parametrize("count", COUNTS)
def test_weights_of_the_teacher_are_gathered(count, errors):
    """The teacher's weights that run forward are the master weights of all ranks, to the bit, also in bf16."""
    assert {case: result["gather"] for case, result in errors(count).items() if result["gather"]} == {}


@pytest.mark.parametrize("count", COUNTS)
def test_teacher_at_its_highest_momentum(count, errors, record_result):
    """EMA teacher: 1,000 steps at m = 0.99999 towards weights 1 % away, ZeRO 0 to 3, against float64."""
    results = errors(count)
    for case, result in results.items():
        assert result["teacher"] < 1e-3, case
    worst = max(result["teacher"] for result in results.values())
    record_result(f"largest error {worst:.1e} of the distance travelled")
