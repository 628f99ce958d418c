"""Schedules as pure functions of step or epoch: learning rate, teacher momentum, weight of the feature branch."""

import math

TEACHER_MOMENTUM = ((0, 0.999), (100, 0.9999), (400, 0.99999))  # (epoch, m), linear between; BootMAE
TEACHER_LINE = ((0, 0.999), (400, 0.99999))  # the paper's appendix A as printed
TEACHER_BATCH = 4096  # batch size for which these are given


def warmup_cosine(step: int, num_steps: int, warmup_steps: float, peak: float, floor: float) -> float:
    """Return a linear warm-up to `peak` over warmup_steps, then half a cosine down to `floor` at the last step."""
    if step + 1 < warmup_steps:
        return peak * (step + 1) / warmup_steps
    floor = min(floor, peak)  # the peak of a small batch may lie below a floor meant for a large one
    progress = (step - warmup_steps) / max(1.0, num_steps - 1 - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))


def warmup_linear(step: int, num_steps: int, warmup_steps: float, peak: float, floor: float) -> float:
    """Return a line from `peak` to `floor`, which it reaches one step after the last; during warmup_steps times a
    factor that rises from 1e-6 to 1 (mmsegmentation's "poly" of power 1)."""
    line = floor + (peak - floor) * (1 - step / num_steps)
    return line * (1 - (1 - step / warmup_steps) * (1 - 1e-6)) if step < warmup_steps else line


def teacher_momentum(
    epoch: float, batch_size: int, points: tuple[tuple[float, float], ...] = TEACHER_MOMENTUM
) -> float:
    """Return the momentum of a piecewise linear schedule of (epoch, m), adapted to the batch: m ^ (batch / 4096).

    The exponent keeps the half-life in samples (METHOD.md).
    """
    (start, momentum), *later = points
    for end, target in later:
        if epoch < end:
            momentum += (target - momentum) * (epoch - start) / (end - start)
            break
        start, momentum = end, target
    return momentum ** (batch_size / TEACHER_BATCH)


def ramp(step: int, ramp_steps: float) -> float:
    """Return a line from near 0 to 1 over ramp_steps, then 1."""
    return min(1.0, (step + 1) / ramp_steps) if ramp_steps > 0 else 1.0
