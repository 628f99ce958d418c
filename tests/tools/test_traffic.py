"""ddae/tools/traffic.py: planned bytes of a step against those that gloo sends on 2 and 4 ranks."""

import json

import pytest
import ranks

from ddae.config.cli import parse
from ddae.config.deepspeed import load
from ddae.tools.traffic import Traffic, count_traffic

TOLERANCE = 0.05  # of the ratio of planned and counted bytes, of each part and of the sum on the wire without headers
THRESHOLD, REUSE = "stage3_param_persistence_threshold", "stage3_max_reuse_distance"
LIVE, PREFETCH = "stage3_max_live_parameters", "stage3_prefetch_bucket_size"
SHAPE = "--model.width 64 --model.depth 4 --pixel.taps 2 4 --feature.taps 2 4 --data.batch_size 16".split()
AUTOCAST = ["--engine.precision", "autocast"]
DEEPSPEED = ["--engine.gradient_reduction", "deepspeed"]
STAGES = {  # name -> (ZeRO stage, settings of its block, micro-batches, arguments)
    "ZeRO 0": (0, {}, 1, []),
    "ZeRO 1": (1, {}, 1, DEEPSPEED),
    "ZeRO 2": (2, {}, 1, DEEPSPEED),
    "ZeRO 3": (3, {THRESHOLD: 1000, REUSE: 0, LIVE: 100_000, PREFETCH: 20_000}, 1, []),
}
VARIANTS = {  # all in one process, in which DeepSpeed keeps autocast's types of gradients after a run with autocast
    "ZeRO 2, gradients in fp32": (2, {}, 1, ["--engine.reduce_dtype", "fp32"]),
    "ZeRO 0, autocast": (0, {}, 2, AUTOCAST),
    "ZeRO 1, two micro-batches": (1, {}, 2, []),
    "ZeRO 1, autocast": (1, {}, 1, AUTOCAST),
    "ZeRO 2, two micro-batches": (2, {}, 2, []),
    "ZeRO 2, fp32, one tap a step": (2, {}, 1, ["--engine.precision", "fp32", "--taps_per_step", "1"]),
    "ZeRO 3, all weights are small": (3, {}, 1, []),
    "ZeRO 3, kept until the backward pass": (3, {THRESHOLD: 1000}, 2, []),
    "ZeRO 3, gathered twice": (3, {THRESHOLD: 1000, REUSE: 0, PREFETCH: 0}, 1, AUTOCAST),
    "ZeRO 3, the last ones kept": (3, {THRESHOLD: 1000, REUSE: 150_000, PREFETCH: 0}, 1, []),
}


@pytest.mark.parametrize(
    "count, cases",
    [
        pytest.param(2, STAGES, id="2 ranks"),
        pytest.param(4, STAGES, id="4 ranks", marks=pytest.mark.slow),
        pytest.param(2, VARIANTS, id="2 ranks, variants", marks=pytest.mark.slow),
        pytest.param(4, VARIANTS, id="4 ranks, variants", marks=pytest.mark.slow),
    ],
)
def test_planned_traffic_equals_counted_bytes(count, cases, tmp_path, record_result):
    """Each part and the sum against the tensors of the step's collectives, and against the bytes on the wire.

    gloo's reduce-scatter is an all-reduce: on the wire ZeRO-3's gradients take twice the bytes of a ring's.
    """
    runs, planned = [], []
    for number, (stage, zero, accumulation, more) in enumerate(cases.values()):
        settings = load(f"zero{stage}")
        settings["zero_optimization"] |= zero
        settings["train_micro_batch_size_per_gpu"] = 16 // count // accumulation
        ds_json = tmp_path / f"{number}.json"
        ds_json.write_text(json.dumps(settings))
        runs.append([*ranks.NANO, *SHAPE, *more, "--ds_config", str(ds_json)])
        planned.append(count_traffic(parse(runs[-1]), settings, stage, count, accumulation))
    lines = ranks.run_program(count, ["tests/support/traffic.py"], runs).splitlines()
    counted = [json.loads(line.removeprefix("SENT ")) for line in lines if line.startswith("SENT")]
    assert len(counted) == len(cases)
    ratios, on_wire = [], []
    for (name, (stage, *_)), plan, sent in zip(cases.items(), planned, counted, strict=True):
        parts = sent["ring"]
        small = sum(parts.get(phase, 0) for phase in ("step", "betas", "log"))
        assert parts.keys() <= {"prefetch", "gather", "backward", "teacher", "step", "betas", "log"}, name
        weights = (parts.get(phase, 0) for phase in ("prefetch", "gather", "teacher"))
        expected = Traffic(parts["backward"], *weights, small)
        for part, ours, theirs in zip(Traffic._fields, plan, expected, strict=True):
            if theirs == 0:
                assert ours == 0, (name, part)
                continue
            ratios.append(ours / theirs)
            assert abs(ours / theirs - 1) < TOLERANCE, (name, part, ours, theirs)
        wire = sum(sent["wire"].values()) - sum(sent["headers"].values())
        on_wire.append((plan.total + (plan.gradients if stage == 3 else 0)) / wire)
        assert abs(on_wire[-1] - 1) < TOLERANCE, (name, on_wire[-1], sent)
    record_result(
        f"{len(cases)} settings on {count} ranks: planned over counted {min(ratios):.3f} to {max(ratios):.3f}, "
        f"over sent {min(on_wire):.3f} to {max(on_wire):.3f}"
    )
