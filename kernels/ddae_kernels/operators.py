"""The Triton kernels as torch operators: opaque to torch.compile, differentiable, deterministic.

The gradient of pred is computed in forward, for an upstream gradient of 1, and handed over in backward: fold tap
weights, ramps and 1 / accumulation into `tap_weight`, and backward has nothing to do. Launch shapes follow from D, K
and M alone; nothing is tuned at run time. Shape letters: B images, M masked patches, K taps, D numbers of a patch.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddae_kernels import triton_impl

kernels: Any = triton_impl  # type checkers do not know how Triton launches
ROWS = 4  # masked patches a program takes: few, for an even end; more than one, for it weighs the whole image first


@torch.library.custom_op("ddae_kernels::patch_distance", mutates_args=())
def patch_distance(masked: Tensor, height: int, width: int, over_max: bool = False) -> Tensor:
    """distance.py's patch_distance: bool [B, height * width] -> float32 [B, height * width]."""
    distance = torch.empty(masked.shape, device=masked.device)
    block_h, block_w = _block(height), _block(width)
    warps = _warps(block_w * max(block_h, block_w), 512)
    with torch.cuda.device_of(masked):
        kernels.distance_kernel[(len(masked),)](
            masked.contiguous(), distance, height, width, over_max, block_h, block_w, num_warps=warps
        )
    return distance


@patch_distance.register_fake
def _(masked, height, width, over_max=False):
    return torch.empty(masked.shape, device=masked.device)


def dynamic_loss(
    pred: Tensor,
    target: Tensor,
    distance: Tensor,
    beta: Tensor,
    tap_weight: Tensor,
    rescale_grad: str,
    patch_weight: Tensor | None = None,
    *,
    norm: str = "none",
    unbiased: bool = False,
    eps: float = 0.0,
    norm_pred: bool = False,
    standardise_eps: float = 0.0,
    masked: Tensor | None = None,
    patch: int = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """loss [], tap_loss [K] and token_error [K, B, M], the first differentiable in pred and beta.

    target: floats [B, M, D] or [K, B, M, D], norm one of dynamic.py's TARGET_NORMS; or uint8 images [B, 3, H, W] with
    the positions `masked` [B, M], the side of a `patch`, mean and std, and norm "none", "per_channel" or "joint".
    norm_pred standardises the prediction, too. Arguments that are not contiguous are copied first.
    """
    vectors = [tensor.float().contiguous() for tensor in (distance, beta, tap_weight)]
    weight = patch_weight if patch_weight is None else patch_weight.float().contiguous()
    target, statistics = target.contiguous(), (None, None)
    if norm in ("instance_layer", "batch_layer"):
        statistics, norm = _mean_and_scale(target, norm == "batch_layer", standardise_eps), "standardised_layer"
    affine = [1 / (255 * s) for s in std] + [-m / s for m, s in zip(mean, std, strict=True)]  # from bytes
    loss, tap_loss, token_error, _, _ = _dynamic_loss(
        *(pred.contiguous(), target, masked if masked is None else masked.contiguous()),
        *(*vectors, weight, *statistics),
        *(norm, unbiased, eps, norm_pred, patch, affine, rescale_grad == "full"),
        torch.is_grad_enabled() and pred.requires_grad,
    )
    return loss, tap_loss, token_error


def _mean_and_scale(target: Tensor, over_batch: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each channel over masked tokens: [.., B, M, D] -> twice [taps, images, D].

    One image where they are over the batch, one tap where the taps share the target.
    """
    means, variances = _statistics(target)
    if over_batch:
        mean = means[:, :1] + (means - means[:, :1]).mean(1, keepdim=True)  # exact where all means are equal
        variances = (variances + (means - mean).square()).mean(1, keepdim=True)  # as many tokens in each image
        means = mean
    return means.contiguous(), (variances + eps).rsqrt()


@torch.library.custom_op("ddae_kernels::token_statistics", mutates_args=())
def _statistics(target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over an image's tokens: [.., B, M, D] -> twice [taps, B, D]."""
    mean, variance = _empty_statistics(target)
    tokens, width = target.shape[-2:]
    block_d = min(128, _block(width))
    with torch.cuda.device_of(target):
        kernels.statistics_kernel[(target.shape[:-2].numel(), _ceil(width, block_d))](
            *(target, mean, variance, tokens), D=width, BLOCK_M=16, BLOCK_D=block_d, num_warps=4
        )
    return mean, variance


@_statistics.register_fake
def _(target):
    return _empty_statistics(target)


def _empty_statistics(target: Tensor) -> tuple[Tensor, Tensor]:
    shape = (target.shape[0] if target.ndim == 4 else 1, target.shape[-3], target.shape[-1])
    return torch.empty(shape, device=target.device), torch.empty(shape, device=target.device)


@torch.library.custom_op("ddae_kernels::dynamic_loss", mutates_args=())
def _dynamic_loss(
    pred: Tensor,
    target: Tensor,
    masked: Tensor | None,
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
    """loss, tap_loss, token_error, and the gradients of pred (empty unless with_grad) and beta for an upstream of 1."""
    outputs = _outputs(pred, with_grad)
    loss, tap_loss, token_error, grad, beta_grad = outputs
    num_taps, num_images, num_masked, numbers = pred.shape
    height, width = target.shape[2:] if patch else (0, 0)
    block_k, block_d = _block(num_taps), _block(numbers)
    programs = num_images * _ceil(num_masked, ROWS)
    partial = torch.empty(2, num_taps, programs, device=pred.device)
    with torch.cuda.device_of(pred):
        kernels.loss_kernel[(programs,)](
            *(pred, target, masked, distance, beta, tap_weight, patch_weight, mean, scale, token_error, grad, partial),
            *(num_images, num_masked, num_taps, height, width, eps, 2 * _lift(pred) / pred[0].numel()),
            D=numbers,
            PATCH=patch,
            AFFINE=tuple(affine),
            PER_TAP=not patch and target.ndim == 4,
            NORM=norm,
            SPARE=int(unbiased),
            OVER_BATCH=mean is not None and mean.shape[1] < num_images,
            NORM_PRED=norm_pred,
            WEIGHTED=patch_weight is not None,
            FULL=full,
            WITH_GRAD=with_grad,
            ROWS=ROWS,
            BLOCK_D=block_d,
            BLOCK_K=block_k,
            BLOCK_M=max(16, min(256, 1024 // block_k)),
            num_warps=_warps(block_d, 1024),
        )
        kernels.sum_kernel[(1,)](
            *(partial, tap_weight, loss, tap_loss, beta_grad, num_taps, programs, num_images * num_masked),
            BLOCK_K=block_k,
            BLOCK=max(256, 8192 // block_k),
            num_warps=16,
        )
    return outputs


@_dynamic_loss.register_fake
def _(pred, *arguments):
    return _outputs(pred, with_grad=arguments[-1])


def _outputs(pred: Tensor, with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    taps, images, patches, _ = pred.shape
    loss, tap_loss, beta_grad, token_error = (
        torch.empty(shape, device=pred.device) for shape in ((), taps, taps, (taps, images, patches))
    )
    return loss, tap_loss, token_error, torch.empty_like(pred if with_grad else pred[:0]), beta_grad


def _lift(pred: Tensor) -> float:
    """What the stored gradient of pred is multiplied by until backward: 1, but for fp16 a power of two near B * M * D.

    Divided by B * M * D, gradients underflow in fp16 before a loss scaler's upstream gradient could save them.
    """
    return 2.0 ** round(math.log2(pred[0].numel())) if pred.dtype == torch.float16 else 1.0


@torch.library.custom_op("ddae_kernels::scale_gradients", mutates_args=("grad", "beta_grad"))
def _scale_gradients(grad: Tensor, beta_grad: Tensor, upstream: Tensor, unit: float) -> None:
    """grad *= upstream * unit and beta_grad *= upstream, in place, by few programs: most often they return at once."""
    block, taps = 4096, len(beta_grad)
    programs = min(1024, max(1, _ceil(grad.numel(), block)))
    with torch.cuda.device_of(grad):
        kernels.scale_kernel[(programs,)](grad, beta_grad, upstream, unit, grad.numel(), taps, _block(taps), block)


def _keep(ctx, inputs, output) -> None:
    """Backward writes to the last two outputs, so they never leave this file."""
    ctx.set_materialize_grads(False)  # no zeros for the outputs that are not differentiated
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:])
    ctx.unit = 1 / _lift(inputs[0])


def _backward(ctx, upstream: Tensor, *_):
    """The stored gradients themselves, scaled in place: autograd refuses a second backward over them."""
    if upstream is None:
        return (None,) * NUM_INPUTS
    grad, beta_grad = ctx.saved_tensors
    _scale_gradients(grad, beta_grad, upstream, ctx.unit)
    wants_pred, *_, wants_beta = ctx.needs_input_grad[:5]
    return (grad if wants_pred else None, *[None] * 3, beta_grad if wants_beta else None, *[None] * (NUM_INPUTS - 5))


NUM_INPUTS = len(inspect.signature(_dynamic_loss._init_fn).parameters)
_dynamic_loss.register_autograd(_backward, setup_context=_keep)


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def _block(size: int) -> int:
    """The next power of two, which Triton's blocks need."""
    return 1 << (size - 1).bit_length()


def _warps(numbers: int, numbers_a_warp: int) -> int:
    return min(16, max(1, numbers // numbers_a_warp))
