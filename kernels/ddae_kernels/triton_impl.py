"""The deep dynamic loss in Triton: reference.py's equations, one pass over the predictions. The only import of triton.

Forward is two launches. `loss_kernel`: a program is one warp with ROWS masked patches of one image; for each it reads
or makes the target once, and then meets the K taps one after the other: error, weight, gradient of the prediction. What
it adds to the loss and to beta's gradient it writes down; `sum_kernel`, one program, adds those shares in a fixed
order, so that equal runs give equal bits. `statistics_kernel` comes before them where channels of the target are
standardised over tokens. Backward is one launch, `scale_kernel`: it multiplies the stored gradient by
the upstream gradient, which it reads on the device, and returns at once where that is 1, as in training.

Computed in fp32, addressed in int64. Launched by operators.py. Shape letters: B images, M masked patches, K taps, D
numbers of a patch.
"""

import math

import triton
import triton.language as tl

LN2 = tl.constexpr(math.log(2))
FAR = tl.constexpr(1 << 20)  # squared patches: farther than any grid's corner


@triton.jit
def distance_kernel(
    masked_ptr,  # bool [B, H * W]
    distance_ptr,  # fp32 [B, H * W]
    H: tl.constexpr,
    W: tl.constexpr,
    OVER_MAX: tl.constexpr,  # in units of the image's largest distance
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One image a program: over the rows, (y - row)^2 + the nearest visible patch within that row, squared."""
    first = tl.program_id(0).to(tl.int64) * (H * W)
    y = tl.arange(0, BLOCK_H)[:, None]
    x = tl.arange(0, BLOCK_W)
    between = (x[:, None] - x[None, :]) * (x[:, None] - x[None, :])
    squared = tl.full([BLOCK_H, BLOCK_W], FAR, tl.int32)
    for row in range(H):
        masked = tl.load(masked_ptr + first + row * W + x, mask=x < W, other=True)
        within = tl.min(tl.where(masked[None, :], FAR, between), 1)
        squared = tl.minimum(squared, (y - row) * (y - row) + within[None, :])
    distance = tl.where(squared < FAR, tl.sqrt_rn(squared.to(tl.float32)), float("inf"))
    inside = (y < H) & (x[None, :] < W)
    if OVER_MAX:
        largest = tl.max(tl.max(tl.where(inside, distance, 0.0), 1), 0)
        distance = tl.div_rn(distance, tl.where(largest > 0.0, largest, 1.0))
    tl.store(distance_ptr + first + y * W + x[None, :], distance, mask=inside)


@triton.jit
def _anchors(distance_ptr, beta, M, FULL: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of one image and each beta [BLOCK_K]: the largest D^beta, and the growth D^beta ln D that d r / d beta is held
    against: the largest's own (the mean over ties) where FULL, else the softmax's mean."""
    top = tl.full([BLOCK_K], -float("inf"), tl.float32)
    count = tl.zeros([BLOCK_K], tl.float32)
    growth = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, M, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        log_distance = tl.log2(tl.load(distance_ptr + i, mask=i < M, other=1.0))[None, :]
        power = tl.exp2(beta[:, None] * log_distance)
        inside = (i < M)[None, :]
        higher = tl.maximum(top, tl.max(tl.where(inside, power, -float("inf")), 1))
        if FULL:
            kept = (top == higher).to(tl.float32)
            share = tl.where(inside & (power == higher[:, None]), 1.0, 0.0)
        else:
            kept = tl.exp(top - higher)
            share = tl.where(inside, tl.exp(power - higher[:, None]), 0.0)
        count = count * kept + tl.sum(share, 1)
        growth = growth * kept + tl.sum(share * power * log_distance, 1)
        top = higher
    return top, growth / count * LN2


@triton.jit
def _standardise(x, own, count, eps):
    """The numbers `own` less their mean and over their deviation, 0 elsewhere: [BLOCK_D] and 1 / deviation."""
    centred = tl.where(own, x - tl.sum(tl.where(own, x, 0.0), 0) / count, 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 0) / count + eps)
    return centred * scale, scale


@triton.jit(do_not_specialize=["M"])
def statistics_kernel(
    target_ptr,  # [images, M, D]
    mean_ptr,  # fp32 [images, D]
    variance_ptr,  # fp32 [images, D]
    M,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mean and biased variance of BLOCK_D channels over the tokens of one image a program.

    Of differences from the image's first token, as in reference.py; the second pass finds the tokens in the cache.
    """
    image = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.arange(0, BLOCK_M)
    own = column < D
    start = target_ptr + image * M * D + column
    first = tl.load(start, mask=own, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(0, M, BLOCK_M):
        i = begin + row
        inside = (i < M)[:, None] & own[None, :]
        tokens = tl.load(start[None, :] + i[:, None] * D, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(tl.where(inside, tokens - first[None, :], 0.0), 0)
    shift = total / M
    total = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(0, M, BLOCK_M):
        i = begin + row
        inside = (i < M)[:, None] & own[None, :]
        tokens = tl.load(start[None, :] + i[:, None] * D, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, tokens - first[None, :] - shift[None, :], 0.0)
        total += tl.sum(centred * centred, 0)
    tl.store(mean_ptr + image * D + column, first + shift, mask=own)
    tl.store(variance_ptr + image * D + column, total / M, mask=own)


@triton.jit
def _features(target_ptr, at, mean_ptr, scale_ptr, stat, own, eps, D: tl.constexpr, NORM: tl.constexpr):
    """A target that is given, [BLOCK_D], normalised as NORM says; channel means and scales are at `stat`."""
    target = tl.load(target_ptr + at, mask=own, other=0.0).to(tl.float32)
    if NORM == "standardised_layer":
        mean = tl.load(mean_ptr + stat, mask=own, other=0.0)
        target = (target - mean) * tl.load(scale_ptr + stat, mask=own, other=0.0)
    if NORM != "none":
        target, _ = _standardise(target, own, D, eps)
    return target


@triton.jit
def _patch(
    image_ptr,
    place,
    column,
    own,
    height,
    width,
    eps,
    SIDE: tl.constexpr,
    AFFINE: tl.constexpr,
    NORM: tl.constexpr,
    SPARE: tl.constexpr,
):
    """The patch at `place` of a uint8 [3, height, width], normalised: [BLOCK_D] in (row, column, channel) order.

    Sums and sums of squares of bytes are exact in integers; mean and std act on those of each channel.
    """
    COUNT: tl.constexpr = SIDE * SIDE
    across = width // SIDE
    corner = place // across * SIDE * width + place % across * SIDE
    channel, x, y = column % 3, column // 3 % SIDE, column // (3 * SIDE)
    value = tl.load(image_ptr + corner + (channel * height + y) * width + x, mask=own, other=0).to(tl.int32)
    c = tl.arange(0, 4)
    total = tl.zeros([4], tl.int32)
    square = tl.zeros([4], tl.int32)
    for one in tl.static_range(3):
        own_byte = tl.where(channel == one, value, 0)
        total = tl.where(c == one, tl.sum(own_byte, 0), total)
        square = tl.where(c == one, tl.sum(own_byte * own_byte, 0), square)
    gain = tl.where(c == 0, AFFINE[0], tl.where(c == 1, AFFINE[1], AFFINE[2]))
    shift = tl.where(c == 0, AFFINE[3], tl.where(c == 1, AFFINE[4], tl.where(c == 2, AFFINE[5], 0.0)))
    shift = gain * total / COUNT + shift  # the channel's mean
    variance = (square.to(tl.int64) * COUNT - total.to(tl.int64) * total).to(tl.float32) / (COUNT * COUNT)
    variance = gain * gain * variance
    if NORM == "per_channel":
        gain /= tl.sqrt_rn(variance * COUNT / (COUNT - SPARE) + eps)
        shift = tl.zeros_like(shift)
    elif NORM == "joint":
        shift = tl.where(c < 3, shift - tl.sum(shift, 0) / 3, 0.0)
        deviation = tl.sqrt_rn(tl.sum(variance + shift * shift, 0) * COUNT / (3 * COUNT - SPARE) + eps)
        gain /= deviation
        shift /= deviation
    centred = (value * COUNT - _of_channel(channel, total)).to(tl.float32)
    return centred * _of_channel(channel, gain / COUNT) + _of_channel(channel, shift)


@triton.jit
def _of_channel(channel, values):
    c = tl.arange(0, 4)
    red = tl.sum(tl.where(c == 0, values, 0), 0)
    green = tl.sum(tl.where(c == 1, values, 0), 0)
    blue = tl.sum(tl.where(c == 2, values, 0), 0)
    return tl.where(channel == 0, red, tl.where(channel == 1, green, blue))


@triton.jit(do_not_specialize=["num_images", "M", "K"])
def loss_kernel(
    pred_ptr,  # [K, B, M, D]
    target_ptr,  # [B, M, D]; [K, B, M, D] where PER_TAP; uint8 [B, 3, height, width] where PATCH
    place_ptr,  # int64 [B, M], where PATCH
    distance_ptr,  # fp32 [B, M]
    beta_ptr,  # fp32 [K]
    tap_weight_ptr,  # fp32 [K]
    patch_weight_ptr,  # fp32 [B, M], where WEIGHTED
    mean_ptr,  # fp32 [taps, images, D], where NORM is "standardised_layer"; taps and images may be 1
    scale_ptr,  # fp32, as mean
    error_ptr,  # fp32 [K, B, M]
    grad_ptr,  # [K, B, M, D], as pred
    partial_ptr,  # fp32 [2, K, programs]
    num_images,
    M,
    K,
    height,
    width,
    eps,
    gain,  # what all gradients are multiplied by
    D: tl.constexpr,
    PATCH: tl.constexpr,  # its side; 0 where the target is given
    AFFINE: tl.constexpr,  # a factor of each channel's bytes, then a summand of each: to the units after mean and std
    PER_TAP: tl.constexpr,
    NORM: tl.constexpr,
    SPARE: tl.constexpr,
    OVER_BATCH: tl.constexpr,  # channel means and scales are of all images, otherwise of each
    NORM_PRED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FULL: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """ROWS masked patches of one image a program, one after the other; each meets all K taps."""
    program = tl.program_id(0)
    shares = tl.cdiv(M, ROWS)
    image = (program // shares).to(tl.int64)
    first = program % shares * ROWS
    tokens = num_images.to(tl.int64) * M
    column = tl.arange(0, BLOCK_D)
    own = column < D
    k = tl.arange(0, BLOCK_K)
    beta = tl.load(beta_ptr + k, mask=k < K, other=0.0)
    weight = gain * tl.load(tap_weight_ptr + k, mask=k < K, other=0.0)
    top, anchor = _anchors(distance_ptr + image * M, beta, M, FULL, BLOCK_K, BLOCK_M)
    loss = tl.zeros([BLOCK_K], tl.float32)
    slope = tl.zeros([BLOCK_K], tl.float32)
    for row in tl.range(first, tl.minimum(first + ROWS, M), disable_licm=True):
        token = image * M + row
        log_distance = tl.log2(tl.load(distance_ptr + token))
        power = tl.exp2(beta * log_distance)
        relative = tl.exp(power - top)
        if WEIGHTED:
            relative *= tl.load(patch_weight_ptr + token)
        if PATCH:
            place = tl.load(place_ptr + token)
            image_ptr = target_ptr + image * 3 * height * width
            target = _patch(image_ptr, place, column, own, height, width, eps, PATCH, AFFINE, NORM, SPARE)
        elif not PER_TAP:
            stat = (0 if OVER_BATCH else image) * D + column
            target = _features(target_ptr, token * D + column, mean_ptr, scale_ptr, stat, own, eps, D, NORM)
        errors = tl.zeros([BLOCK_K], tl.float32)
        for tap in range(K):
            here = (tap * tokens + token) * D + column
            pred = tl.load(pred_ptr + here, mask=own, other=0.0).to(tl.float32)
            if PER_TAP:
                stat = (tap if OVER_BATCH else tap * num_images + image) * D + column
                target = _features(target_ptr, here, mean_ptr, scale_ptr, stat, own, eps, D, NORM)
            if NORM_PRED:
                pred, scale = _standardise(pred, own, D, eps)
            difference = tl.where(own, pred - target, 0.0)
            errors = tl.where(k == tap, tl.sum(difference * difference, 0) / D, errors)
            if WITH_GRAD:
                grad = tl.sum(tl.where(k == tap, weight * relative, 0.0), 0) * difference
                if NORM_PRED:  # back through the prediction's own mean and deviation
                    along = tl.sum(grad * pred, 0) / D
                    grad = (grad - tl.sum(grad, 0) / D - along * pred) * scale
                tl.store(grad_ptr + here, grad.to(grad_ptr.dtype.element_ty), mask=own)
        tl.store(error_ptr + k * tokens + token, errors, mask=k < K)
        loss += relative * errors
        slope += relative * (power * log_distance * LN2 - anchor) * errors
    at = partial_ptr + k * tl.num_programs(0) + program
    tl.store(at, loss, mask=k < K)
    tl.store(at + K * tl.num_programs(0), slope, mask=k < K)


@triton.jit(do_not_specialize=["K", "shares", "tokens"])
def sum_kernel(
    partial_ptr,  # [2, K, shares]
    tap_weight_ptr,  # [K]
    loss_ptr,  # []
    tap_loss_ptr,  # [K]
    beta_grad_ptr,  # [K]
    K,
    shares,
    tokens,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k = tl.arange(0, BLOCK_K)
    tap_loss = tl.zeros([BLOCK_K, BLOCK], tl.float32)
    slope = tl.zeros([BLOCK_K, BLOCK], tl.float32)
    for start in range(0, shares, BLOCK):
        i = start + tl.arange(0, BLOCK)
        own = (k < K)[:, None] & (i < shares)[None, :]
        at = partial_ptr + k[:, None] * shares + i[None, :]
        tap_loss += tl.load(at, mask=own, other=0.0)
        slope += tl.load(at + K * shares, mask=own, other=0.0)
    tap_weight = tl.load(tap_weight_ptr + k, mask=k < K, other=0.0)
    tap_loss = tl.sum(tap_loss, 1) / tokens
    tl.store(tap_loss_ptr + k, tap_loss, mask=k < K)
    tl.store(beta_grad_ptr + k, tap_weight * tl.sum(slope, 1) / tokens, mask=k < K)
    tl.store(loss_ptr, tl.sum(tap_weight * tap_loss, 0))


@triton.jit(do_not_specialize=["K"])
def scale_kernel(
    grad_ptr,  # [count], scaled in place
    beta_grad_ptr,  # [K], scaled in place
    upstream_ptr,  # []
    unit,  # what one upstream is worth to the stored gradient of pred
    count,
    K,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    upstream = tl.load(upstream_ptr)
    program = tl.program_id(0)
    if program == 0:
        k = tl.arange(0, BLOCK_K)
        beta_grad = tl.load(beta_grad_ptr + k, mask=k < K, other=0.0)
        tl.store(beta_grad_ptr + k, beta_grad * upstream, mask=k < K)
    if upstream * unit == 1.0:
        return
    for start in range(program.to(tl.int64) * BLOCK, count, tl.num_programs(0).to(tl.int64) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + i, mask=i < count, other=0.0).to(tl.float32)
        tl.store(grad_ptr + i, (grad * (upstream * unit)).to(grad_ptr.dtype.element_ty), mask=i < count)
