"""The Triton kernels as torch operators: opaque to torch.compile, differentiable, deterministic.

Each kernel has a function that launches it, and a custom operator of that function for torch.compile, fake tensors and
dispatch modes. Elsewhere the function is called directly, because torch.library takes more of the host's time than the
launches.

The forward pass computes the gradient of pred for an upstream gradient of 1; the backward pass returns it. If all scale
factors (tap weights, warmup, 1 / accumulation steps) are part of `tap_weight`, the backward pass has nothing to do.
Launch configurations depend on shapes only; nothing is autotuned. Shape letters: B images, M masked patches per image,
S predicted ones of them (all M without a subset), K taps, D values per patch.
"""

import inspect
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ddae_kernels import reference, triton_impl
from ddae_kernels.implementation import is_intercepted

kernels: Any = triton_impl  # Any: kernel[grid](...) has no types
# triton_impl alone imports triton, whose two functions take microseconds a call.
cdiv, next_power_of_2 = cache(kernels.triton.cdiv), cache(kernels.triton.next_power_of_2)
# Masked patches per program. Few balance the load at the end of the launch. More than one amortise the scan over all
# distances of the image with which every program starts.
ROWS = 4


def patch_distance(masked: Tensor, height: int, width: int, over_max: bool = False) -> Tensor:
    """Return the distances that distance.py defines: bool [B, height * width] -> float32 [B, height * width]."""
    compute = _distance_operator if is_intercepted(masked) else _launch_distance
    return compute(masked, height, width, over_max)


def _launch_distance(masked: Tensor, height: int, width: int, over_max: bool) -> Tensor:
    distance = torch.empty(masked.shape, device=masked.device)
    block_h, block_w = next_power_of_2(height), next_power_of_2(width)
    num_warps = _num_warps(block_w * max(block_h, block_w), 512)
    with torch.cuda.device_of(masked):
        kernels.distance_kernel[(len(masked),)](
            masked.contiguous(), distance, height, width, over_max, block_h, block_w, num_warps=num_warps
        )
    return distance


_distance_operator = torch.library.custom_op("ddae_kernels::patch_distance", mutates_args=())(_launch_distance)


@_distance_operator.register_fake
def _(masked, height, width, over_max):
    return torch.empty(masked.shape, device=masked.device)


def dynamic_loss(
    pred: Tensor,
    target: Tensor,
    distance: Tensor,
    beta: Tensor,
    tap_weight: Tensor,
    rescale_grad: str,
    patch_weight: Tensor | None = None,
    subset: Tensor | None = None,
    *,
    norm: str = "none",
    unbiased: bool = False,
    eps: float = 0.0,
    norm_pred: bool = False,
    masked: Tensor | None = None,
    patch: int = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss [], tap_loss [K] and token_error [K, B, S]; loss is differentiable in pred and beta.

    The target is a float tensor [B, M, D] or [K, B, M, D] with norm in dynamic.TARGET_NORMS, or uint8 images
    [B, 3, H, W] with masked (indices [B, M]), patch (side in pixels), mean, std and norm in dynamic.PATCH_NORMS.
    norm_pred: apply LayerNorm without affine to pred. Non-contiguous arguments are copied.
    """
    vectors = [tensor.float().contiguous() for tensor in (distance, beta, tap_weight)]
    patch_weight = patch_weight if patch_weight is None else patch_weight.float().contiguous()
    target, statistics = target.contiguous(), (None, None)
    if norm in ("instance_layer", "batch_layer"):
        statistics, norm = _mean_and_scale(target, norm == "batch_layer"), "standardised_layer"
    # Scales, then offsets, that turn the bytes of each channel into pixels normalised by mean and std.
    affine = [1 / (255 * s) for s in std] + [-m / s for m, s in zip(mean, std, strict=True)]
    compute = _loss_operator if is_intercepted(pred) else _Loss.apply
    loss, tap_loss, token_error, _, _ = compute(
        *(pred.contiguous(), target, *(each if each is None else each.contiguous() for each in (masked, subset))),
        *(*vectors, patch_weight, *statistics),
        *(norm, unbiased, eps, norm_pred, patch, affine, rescale_grad == "full"),
        torch.is_grad_enabled() and pred.requires_grad,
    )
    return loss, tap_loss, token_error


def _mean_and_scale(target: Tensor, over_batch: bool) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / sqrt(variance + STANDARDISE_EPS) of each channel over masked tokens.

    [.., B, M, D] -> two tensors [taps, images, D]. taps is 1 if all taps share the target; images is 1 if the
    statistics are over the batch.
    """
    means, variances = (_statistics_operator if is_intercepted(target) else _launch_statistics)(target)
    if over_batch:
        batch_mean = means[:, :1] + (means - means[:, :1]).mean(1, keepdim=True)  # exact if all means are equal
        variances = (variances + (means - batch_mean).square()).mean(1, keepdim=True)  # images have equal token counts
        means = batch_mean
    return means.contiguous(), (variances + reference.STANDARDISE_EPS).rsqrt()


def _launch_statistics(target: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel over the tokens of an image: [.., B, M, D] -> [taps, B, D]."""
    mean, variance = _empty_statistics(target)
    num_tokens, width = target.shape[-2:]
    block_d = min(128, next_power_of_2(width))
    with torch.cuda.device_of(target):
        kernels.statistics_kernel[(target.shape[:-2].numel(), cdiv(width, block_d))](
            *(target, mean, variance, num_tokens), D=width, BLOCK_M=16, BLOCK_D=block_d, num_warps=4
        )
    return mean, variance


_statistics_operator = torch.library.custom_op("ddae_kernels::token_statistics", mutates_args=())(_launch_statistics)


@_statistics_operator.register_fake
def _(target):
    return _empty_statistics(target)


def _empty_statistics(target: Tensor) -> tuple[Tensor, Tensor]:
    shape = (target.shape[0] if target.ndim == 4 else 1, target.shape[-3], target.shape[-1])
    return torch.empty(shape, device=target.device), torch.empty(shape, device=target.device)


def _launch_loss(
    pred: Tensor,
    target: Tensor,
    masked: Tensor | None,
    subset: Tensor | None,
    distance: Tensor,
    beta: Tensor,
    tap_weight: Tensor,
    patch_weight: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    norm: str,
    unbiased: bool,
    eps: float,
    norm_pred: bool,
    patch: int,
    affine: list[float],
    full: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, tap_loss, token_error, and the gradients of pred (empty unless with_grad) and beta.

    Both are for an upstream gradient of 1; that of pred is multiplied by _storage_scale.
    """
    outputs = _empty_outputs(pred, with_grad)
    loss, tap_loss, token_error, grad, beta_grad = outputs
    num_taps, num_images, num_predicted, dim = pred.shape
    height, width = target.shape[2:] if patch else (0, 0)
    block_k, block_d = next_power_of_2(num_taps), next_power_of_2(dim)
    programs = num_images * cdiv(num_predicted, ROWS)
    partial = torch.empty(2, num_taps, programs, device=pred.device)
    with torch.cuda.device_of(pred):
        kernels.loss_kernel[(programs,)](
            *(pred, target, masked, subset, distance, beta, tap_weight, patch_weight, mean, scale),
            *(token_error, grad, partial, num_images, num_predicted, distance.shape[1], num_taps),
            *(height, width, eps, 2 * _storage_scale(pred) / pred.shape[1:].numel()),
            D=dim,
            PATCH=patch,
            AFFINE=tuple(affine),
            PER_TAP=not patch and target.ndim == 4,
            NORM=norm,
            CORRECTION=int(unbiased),
            OVER_BATCH=mean is not None and mean.shape[1] < num_images,
            NORM_PRED=norm_pred,
            WEIGHTED=patch_weight is not None,
            SUBSET=subset is not None,
            FULL=full,
            WITH_GRAD=with_grad,
            ROWS=ROWS,
            BLOCK_D=block_d,
            BLOCK_K=block_k,
            BLOCK_M=max(16, min(256, 1024 // block_k)),
            num_warps=_num_warps(block_d, 1024),
        )
        kernels.sum_kernel[(1,)](
            *(partial, tap_weight, loss, tap_loss, beta_grad, num_taps, programs, num_images * num_predicted),
            BLOCK_K=block_k,
            BLOCK=max(256, 8192 // block_k),
            num_warps=16,
        )
    return outputs


_loss_operator = torch.library.custom_op("ddae_kernels::dynamic_loss", mutates_args=())(_launch_loss)


@_loss_operator.register_fake
def _(pred, *args):
    return _empty_outputs(pred, with_grad=args[-1])


def _empty_outputs(pred: Tensor, with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_taps = len(pred)
    loss, tap_loss, beta_grad, token_error = (
        torch.empty(shape, device=pred.device) for shape in ((), num_taps, num_taps, pred.shape[:3])
    )
    return loss, tap_loss, token_error, torch.empty_like(pred if with_grad else pred[:0]), beta_grad


def _storage_scale(pred: Tensor) -> float:
    """Return the factor of the stored gradient of pred: 1; for fp16 the power of two nearest to B * M * D.

    In fp16, gradients divided by B * M * D would underflow before the backward pass multiplies them by the loss scale.
    """
    return 2.0 ** round(math.log2(pred.shape[1:].numel())) if pred.dtype == torch.float16 else 1.0


def _scale_gradients(grad: Tensor, beta_grad: Tensor, upstream: Tensor, unit: float) -> None:
    """Multiply grad by upstream * unit and beta_grad by upstream, in place.

    unit: 1 / _storage_scale of the predictions.
    """
    if is_intercepted(grad):
        _scale_operator(grad, beta_grad, upstream, unit)
    else:
        _launch_scale(grad, beta_grad, upstream, unit)
        torch.autograd.graph.increment_version((grad, beta_grad))  # so that autograd refuses a second backward pass


def _launch_scale(grad: Tensor, beta_grad: Tensor, upstream: Tensor, unit: float) -> None:
    """At most 1,024 programs are launched, because most calls have upstream * unit = 1 and leave grad unchanged."""
    block, num_taps = 4096, len(beta_grad)
    programs = min(1024, max(1, cdiv(grad.numel(), block)))
    with torch.cuda.device_of(grad):
        kernels.scale_kernel[(programs,)](
            grad, beta_grad, upstream, unit, grad.numel(), num_taps, next_power_of_2(num_taps), block
        )


_scale_operator = torch.library.custom_op("ddae_kernels::scale_gradients", mutates_args=("grad", "beta_grad"))(
    _launch_scale
)


def _setup_context(ctx, inputs, output) -> None:
    """Save the gradients for backward, which modifies them in place: they must not be returned to the user."""
    ctx.set_materialize_grads(False)  # allocate no zeros for the non-differentiable outputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:])
    ctx.unit = 1 / _storage_scale(inputs[0])


def _backward(ctx, upstream: Tensor, *_):
    """Scale the stored gradients in place and return them. Autograd therefore refuses a second backward pass."""
    if upstream is None:
        return (None,) * NUM_INPUTS
    grad, beta_grad = ctx.saved_tensors
    _scale_gradients(grad, beta_grad, upstream, ctx.unit)
    needs_pred, *_, needs_beta = ctx.needs_input_grad[:6]
    return (grad if needs_pred else None, *[None] * 4, beta_grad if needs_beta else None, *[None] * (NUM_INPUTS - 6))


NUM_INPUTS = len(inspect.signature(_launch_loss).parameters)
_loss_operator.register_autograd(_backward, setup_context=_setup_context)


class _Loss(torch.autograd.Function):
    """_loss_operator without torch.library."""

    @staticmethod
    def forward(ctx, *inputs):
        outputs = _launch_loss(*inputs)
        _setup_context(ctx, inputs, outputs)
        return outputs

    backward = staticmethod(_backward)


def _num_warps(elements: int, elements_per_warp: int) -> int:
    return min(16, max(1, elements // elements_per_warp))
