"""Triton kernels of the deep dynamic loss: the equations of reference.py, reading the predictions once.

This is the only module that imports triton; operators.py launches the kernels.

Forward (two launches, three for standardised targets):
    statistics_kernel   mean and variance of each channel over the tokens of an image (instance_layer, batch_layer)
    loss_kernel         one warp per program, for ROWS predicted patches of one image. For each patch it loads or
                        computes the target once, then loops over the K taps: error, weight, gradient of the
                        prediction. It stores the program's partial sums of the loss and of beta's gradient.
    sum_kernel          one program adds the partial sums in a fixed order, so that equal runs give equal bits.
Backward (one launch):
    scale_kernel        multiplies the stored gradient by the upstream gradient, which it reads on the device. It
                        returns early if that is 1, as in training.

All arithmetic is in fp32, addresses are int64. Shape letters: B images, M masked patches per image, S predicted ones of
them (all M without a subset), K taps, D values per patch.
"""

import math

import triton
import triton.language as tl

LN2 = tl.constexpr(math.log(2))
FAR = tl.constexpr(1 << 20)  # squared distance in patches^2, larger than in any grid


@triton.jit
def distance_kernel(
    masked_ptr,  # bool [B, H * W]
    distance_ptr,  # fp32 [B, H * W]
    H: tl.constexpr,
    W: tl.constexpr,
    OVER_MAX: tl.constexpr,  # divide by the largest distance of the image
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Compute the distances of one image per program.

    The squared distance is the minimum over rows of (y - row)^2 + (squared distance within that row).
    """
    start = tl.program_id(0).to(tl.int64) * (H * W)
    y = tl.arange(0, BLOCK_H)[:, None]
    x = tl.arange(0, BLOCK_W)
    offset_squared = (x[:, None] - x[None, :]) * (x[:, None] - x[None, :])
    squared = tl.full([BLOCK_H, BLOCK_W], FAR, tl.int32)
    for row in range(H):
        masked = tl.load(masked_ptr + start + row * W + x, mask=x < W, other=True)
        row_squared = tl.min(tl.where(masked[None, :], FAR, offset_squared), 1)
        squared = tl.minimum(squared, (y - row) * (y - row) + row_squared[None, :])
    distance = tl.where(squared < FAR, tl.sqrt_rn(squared.to(tl.float32)), float("inf"))
    valid = (y < H) & (x[None, :] < W)
    if OVER_MAX:
        largest = tl.max(tl.max(tl.where(valid, distance, 0.0), 1), 0)
        distance = tl.div_rn(distance, tl.where(largest > 0.0, largest, 1.0))
    tl.store(distance_ptr + start + y * W + x[None, :], distance, mask=valid)


@triton.jit
def _anchors(distance_ptr, beta, M, FULL: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the maximum of d^beta over the patches of one image, and the anchor of d r / d beta: both [BLOCK_K].

    With g = d^beta ln d, d r / d beta = r (g - anchor). The anchor is g at the maximum (the mean over ties) if FULL,
    otherwise the mean of g under the softmax weights. Both are running sums that are rescaled when the maximum grows.
    """
    maximum = tl.full([BLOCK_K], -float("inf"), tl.float32)
    count = tl.zeros([BLOCK_K], tl.float32)
    g_sum = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, M, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        log_distance = tl.log2(tl.load(distance_ptr + i, mask=i < M, other=1.0))[None, :]
        power = tl.exp2(beta[:, None] * log_distance)
        valid = (i < M)[None, :]
        new_maximum = tl.maximum(maximum, tl.max(tl.where(valid, power, -float("inf")), 1))
        if FULL:
            rescale = (maximum == new_maximum).to(tl.float32)
            term = tl.where(valid & (power == new_maximum[:, None]), 1.0, 0.0)
        else:
            rescale = tl.exp(maximum - new_maximum)
            term = tl.where(valid, tl.exp(power - new_maximum[:, None]), 0.0)
        count = count * rescale + tl.sum(term, 1)
        g_sum = g_sum * rescale + tl.sum(term * power * log_distance, 1)
        maximum = new_maximum
    return maximum, g_sum / count * LN2


@triton.jit
def _standardise(x, valid, count, eps):
    """Return x standardised over the elements in `valid` (0 elsewhere), and 1 / sqrt(variance + eps): [BLOCK_D], []."""
    centred = tl.where(valid, x - tl.sum(tl.where(valid, x, 0.0), 0) / count, 0.0)
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
    """Compute mean and biased variance of BLOCK_D channels over the tokens of one image per program.

    The statistics are those of differences from the first token, as in reference.py. The second pass reads the tokens
    from the cache.
    """
    image = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.arange(0, BLOCK_M)
    valid = column < D
    start_ptr = target_ptr + image * M * D + column
    first = tl.load(start_ptr, mask=valid, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for block_start in range(0, M, BLOCK_M):
        i = block_start + row
        mask_2d = (i < M)[:, None] & valid[None, :]
        tokens = tl.load(start_ptr[None, :] + i[:, None] * D, mask=mask_2d, other=0.0).to(tl.float32)
        total += tl.sum(tl.where(mask_2d, tokens - first[None, :], 0.0), 0)
    shift = total / M
    total = tl.zeros([BLOCK_D], tl.float32)
    for block_start in range(0, M, BLOCK_M):
        i = block_start + row
        mask_2d = (i < M)[:, None] & valid[None, :]
        tokens = tl.load(start_ptr[None, :] + i[:, None] * D, mask=mask_2d, other=0.0).to(tl.float32)
        centred = tl.where(mask_2d, tokens - first[None, :] - shift[None, :], 0.0)
        total += tl.sum(centred * centred, 0)
    tl.store(mean_ptr + image * D + column, first + shift, mask=valid)
    tl.store(variance_ptr + image * D + column, total / M, mask=valid)


@triton.jit
def _features(target_ptr, offset, mean_ptr, scale_ptr, stat_offset, valid, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Load a target and normalise it by NORM: [BLOCK_D]. stat_offset: position of channel means and scales."""
    target = tl.load(target_ptr + offset, mask=valid, other=0.0).to(tl.float32)
    if NORM == "standardised_layer":
        mean = tl.load(mean_ptr + stat_offset, mask=valid, other=0.0)
        target = (target - mean) * tl.load(scale_ptr + stat_offset, mask=valid, other=0.0)
    if NORM != "none":
        target, _ = _standardise(target, valid, D, eps)
    return target


@triton.jit
def _patch(
    image_ptr,
    index,
    column,
    valid,
    height,
    width,
    eps,
    PATCH: tl.constexpr,
    AFFINE: tl.constexpr,
    NORM: tl.constexpr,
    CORRECTION: tl.constexpr,
):
    """Load patch `index` of a uint8 image [3, height, width] and normalise it: [BLOCK_D], (row, column, channel) order.

    Sums and sums of squares of the bytes are exact integers. AFFINE is applied to the sums of each channel, not to
    the bytes.
    """
    COUNT: tl.constexpr = PATCH * PATCH
    patches_per_row = width // PATCH
    corner = index // patches_per_row * PATCH * width + index % patches_per_row * PATCH
    channel, x, y = column % 3, column // 3 % PATCH, column // (3 * PATCH)
    value = tl.load(image_ptr + corner + (channel * height + y) * width + x, mask=valid, other=0).to(tl.int32)
    c = tl.arange(0, 4)
    total = tl.zeros([4], tl.int32)
    total_square = tl.zeros([4], tl.int32)
    for channel_index in tl.static_range(3):
        channel_value = tl.where(channel == channel_index, value, 0)
        total = tl.where(c == channel_index, tl.sum(channel_value, 0), total)
        total_square = tl.where(c == channel_index, tl.sum(channel_value * channel_value, 0), total_square)
    gain = tl.where(c == 0, AFFINE[0], tl.where(c == 1, AFFINE[1], AFFINE[2]))
    shift = tl.where(c == 0, AFFINE[3], tl.where(c == 1, AFFINE[4], tl.where(c == 2, AFFINE[5], 0.0)))
    shift = gain * total / COUNT + shift  # mean of the channel
    variance = (total_square.to(tl.int64) * COUNT - total.to(tl.int64) * total).to(tl.float32) / (COUNT * COUNT)
    variance = gain * gain * variance
    if NORM == "per_channel":
        gain /= tl.sqrt_rn(variance * COUNT / (COUNT - CORRECTION) + eps)
        shift = tl.zeros_like(shift)
    elif NORM == "joint":
        shift = tl.where(c < 3, shift - tl.sum(shift, 0) / 3, 0.0)
        deviation = tl.sqrt_rn(tl.sum(variance + shift * shift, 0) * COUNT / (3 * COUNT - CORRECTION) + eps)
        gain /= deviation
        shift /= deviation
    centred = (value * COUNT - _of_channel(channel, total)).to(tl.float32)
    return centred * _of_channel(channel, gain / COUNT) + _of_channel(channel, shift)


@triton.jit
def _of_channel(channel, values):
    """Return values[channel] for values [4] in registers."""
    c = tl.arange(0, 4)
    red = tl.sum(tl.where(c == 0, values, 0), 0)
    green = tl.sum(tl.where(c == 1, values, 0), 0)
    blue = tl.sum(tl.where(c == 2, values, 0), 0)
    return tl.where(channel == 0, red, tl.where(channel == 1, green, blue))


@triton.jit(do_not_specialize=["num_images", "S", "M", "K"])
def loss_kernel(
    pred_ptr,  # [K, B, S, D]
    target_ptr,  # [B, M, D]; [K, B, M, D] if PER_TAP; uint8 [B, 3, height, width] if PATCH
    index_ptr,  # int64 [B, M]: indices of the masked patches, if PATCH
    subset_ptr,  # int64 [B, S]: places of the predicted patches among the masked ones, if SUBSET
    distance_ptr,  # fp32 [B, M]
    beta_ptr,  # fp32 [K]
    tap_weight_ptr,  # fp32 [K]
    patch_weight_ptr,  # fp32 [B, M], if WEIGHTED
    mean_ptr,  # fp32 [taps, images, D], if NORM is "standardised_layer"; taps and images may be 1
    scale_ptr,  # fp32 [taps, images, D]: 1 / sqrt(variance + eps)
    error_ptr,  # fp32 [K, B, S]
    grad_ptr,  # [K, B, S, D], dtype of pred
    partial_ptr,  # fp32 [2, K, programs]
    num_images,
    S,
    M,
    K,
    height,
    width,
    eps,
    grad_scale,  # factor of all gradients of pred
    D: tl.constexpr,
    PATCH: tl.constexpr,  # side of a patch in pixels; 0 if the target is a float tensor
    AFFINE: tl.constexpr,  # (3 scales, 3 offsets): from the bytes of a channel to pixels normalised by mean and std
    PER_TAP: tl.constexpr,
    NORM: tl.constexpr,
    CORRECTION: tl.constexpr,  # variance divides by n - CORRECTION
    OVER_BATCH: tl.constexpr,  # one mean and scale per channel for all images; otherwise one per image
    NORM_PRED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SUBSET: tl.constexpr,
    FULL: tl.constexpr,  # rescale_grad is "full"
    WITH_GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Process ROWS predicted patches of one image per program, sequentially, and all K taps of each patch."""
    program = tl.program_id(0)
    programs_per_image = tl.cdiv(S, ROWS)
    image = (program // programs_per_image).to(tl.int64)
    first = program % programs_per_image * ROWS
    num_tokens = num_images.to(tl.int64) * S  # of a tap of pred
    num_masked = num_images.to(tl.int64) * M  # of a tap of the target
    column = tl.arange(0, BLOCK_D)
    valid = column < D
    k = tl.arange(0, BLOCK_K)
    beta = tl.load(beta_ptr + k, mask=k < K, other=0.0)
    weight = grad_scale * tl.load(tap_weight_ptr + k, mask=k < K, other=0.0)
    maximum, anchor = _anchors(distance_ptr + image * M, beta, M, FULL, BLOCK_K, BLOCK_M)
    loss = tl.zeros([BLOCK_K], tl.float32)
    beta_grad = tl.zeros([BLOCK_K], tl.float32)
    for row in tl.range(first, tl.minimum(first + ROWS, S), disable_licm=True):
        token = image * S + row
        patch = image * M + (tl.load(subset_ptr + token) if SUBSET else row)
        log_distance = tl.log2(tl.load(distance_ptr + patch))
        power = tl.exp2(beta * log_distance)
        relative = tl.exp(power - maximum)
        if WEIGHTED:
            relative *= tl.load(patch_weight_ptr + patch)
        if PATCH:
            index = tl.load(index_ptr + patch)
            image_ptr = target_ptr + image * 3 * height * width
            target = _patch(image_ptr, index, column, valid, height, width, eps, PATCH, AFFINE, NORM, CORRECTION)
        elif not PER_TAP:
            stat_offset = (0 if OVER_BATCH else image) * D + column
            target = _features(target_ptr, patch * D + column, mean_ptr, scale_ptr, stat_offset, valid, eps, D, NORM)
        errors = tl.zeros([BLOCK_K], tl.float32)
        for tap in range(K):
            offset = (tap * num_tokens + token) * D + column
            pred = tl.load(pred_ptr + offset, mask=valid, other=0.0).to(tl.float32)
            if PER_TAP:
                stat_offset = (tap if OVER_BATCH else tap * num_images + image) * D + column
                target_offset = (tap * num_masked + patch) * D + column
                target = _features(target_ptr, target_offset, mean_ptr, scale_ptr, stat_offset, valid, eps, D, NORM)
            if NORM_PRED:
                pred, scale = _standardise(pred, valid, D, eps)
            difference = tl.where(valid, pred - target, 0.0)
            errors = tl.where(k == tap, tl.sum(difference * difference, 0) / D, errors)
            if WITH_GRAD:
                grad = tl.sum(tl.where(k == tap, weight * relative, 0.0), 0) * difference
                if NORM_PRED:  # backward pass of the prediction's LayerNorm
                    projection = tl.sum(grad * pred, 0) / D
                    grad = (grad - tl.sum(grad, 0) / D - projection * pred) * scale
                tl.store(grad_ptr + offset, grad.to(grad_ptr.dtype.element_ty), mask=valid)
        tl.store(error_ptr + k * num_tokens + token, errors, mask=k < K)
        loss += relative * errors
        beta_grad += relative * (power * log_distance * LN2 - anchor) * errors
    partial_ptrs = partial_ptr + k * tl.num_programs(0) + program
    tl.store(partial_ptrs, loss, mask=k < K)
    tl.store(partial_ptrs + K * tl.num_programs(0), beta_grad, mask=k < K)


@triton.jit(do_not_specialize=["K", "num_partials", "num_tokens"])
def sum_kernel(
    partial_ptr,  # fp32 [2, K, num_partials]: of tap_loss and of beta's gradient
    tap_weight_ptr,  # [K]
    loss_ptr,  # []
    tap_loss_ptr,  # [K]
    beta_grad_ptr,  # [K]
    K,
    num_partials,
    num_tokens,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the partial sums of all programs of loss_kernel, in a fixed order. One program."""
    k = tl.arange(0, BLOCK_K)
    tap_loss = tl.zeros([BLOCK_K, BLOCK], tl.float32)
    beta_grad = tl.zeros([BLOCK_K, BLOCK], tl.float32)
    for start in range(0, num_partials, BLOCK):
        i = start + tl.arange(0, BLOCK)
        valid = (k < K)[:, None] & (i < num_partials)[None, :]
        tap_loss_ptrs = partial_ptr + k[:, None] * num_partials + i[None, :]
        tap_loss += tl.load(tap_loss_ptrs, mask=valid, other=0.0)
        beta_grad += tl.load(tap_loss_ptrs + K * num_partials, mask=valid, other=0.0)
    tap_weight = tl.load(tap_weight_ptr + k, mask=k < K, other=0.0)
    tap_loss = tl.sum(tap_loss, 1) / num_tokens
    tl.store(tap_loss_ptr + k, tap_loss, mask=k < K)
    tl.store(beta_grad_ptr + k, tap_weight * tl.sum(beta_grad, 1) / num_tokens, mask=k < K)
    tl.store(loss_ptr, tl.sum(tap_weight * tap_loss, 0))


@triton.jit(do_not_specialize=["K"])
def scale_kernel(
    grad_ptr,  # [count], scaled in place
    beta_grad_ptr,  # [K], scaled in place
    upstream_ptr,  # []
    unit,  # 1 / the factor that the stored gradient of pred carries (operators._storage_scale)
    count,
    K,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply grad by upstream * unit and beta_grad by upstream, in place."""
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
