"""Numbers that change in the course of training, as pure functions of the step or the epoch."""

import math

TEACHER_MOMENTUM = ((0, 0.999), (100, 0.9999), (400, 0.99999))  # (epoch, m), linear between; BootMAE
TEACHER_LINE = ((0, 0.999), (400, 0.99999))  # the paper's appendix A as printed
TEACHER_BATCH = 4096  # the batch that the table above is meant for


def warmup_cosine(step: int, steps: int, warmup_steps: float, peak: float, floor: float) -> float:
    """Linear warm-up to `peak` over warmup_steps, then half a cosine down to `floor` at the last step."""
    if step + 1 < warmup_steps:
        return peak * (step + 1) / warmup_steps
    floor = min(floor, peak)  # a small batch's peak may lie below the floor meant for a large one
    progress = (step - warmup_steps) / max(1.0, steps - 1 - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))


def warmup_linear(step: int, steps: int, warmup_steps: float, peak: float, floor: float) -> float:
    """A straight line from `peak` to `floor`, reached one step after the last; over the first warmup_steps times a
    factor that rises to 1 from a millionth (mmsegmentation's "poly" of power 1)."""
    line = floor + (peak - floor) * (1 - step / steps)
    return line * (1 - (1 - step / warmup_steps) * (1 - 1e-6)) if step < warmup_steps else line


def teacher_momentum(
    epoch: float, batch_size: int, points: tuple[tuple[float, float], ...] = TEACHER_MOMENTUM
) -> float:
    """A schedule by (epoch, m), linear in m between its points, adapted to the batch: m ^ (batch / 4096).

    A half-life counted in samples is what the exponent keeps (METHOD.md).
    """
    (start, momentum), *later = points
    for end, target in later:
        if epoch < end:
            momentum += (target - momentum) * (epoch - start) / (end - start)
            break
        start, momentum = end, target
    return momentum ** (batch_size / TEACHER_BATCH)


def ramp(step: int, ramp_steps: float) -> float:
    """Linear from near 0 to 1 over ramp_steps, then 1."""
    return min(1.0, (step + 1) / ramp_steps) if ramp_steps > 0 else 1.0
