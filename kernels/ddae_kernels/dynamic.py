"""The public calls: checks, choice of implementation, and the equations of reference.py behind one signature each.

Shape letters: B images, N patches, M masked patches, K taps, D width, P numbers of a patch (side x side x 3).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ddae_kernels import reference
from ddae_kernels.implementation import choose, values_are_checked

RESCALE_GRADS = ("full", "detach")
TARGET_NORMS = ("layer", "instance_layer", "batch_layer", "none")  # of features
STANDARDISE_EPS = 1e-5  # added to a channel's variance over tokens, as torch's instance_norm does
PATCH_NORMS = {"per_channel": (False, 1e-5), "joint": (True, 1e-6), "none": (False, 0.0)}  # norm -> unbiased, eps


class DynamicLoss(NamedTuple):
    """A loss to differentiate and two readings of it, which are detached."""

    loss: Tensor  # []: sum over taps of tap_weight * tap_loss
    tap_loss: Tensor  # [K]: weighted by distance, before the tap weight
    token_error: Tensor  # [K, B, M]: of each masked patch, unweighted; mean squared error but for dynamic_error


def distance_weights(distance: Tensor, beta: Tensor, *, rescale_grad: str = "full") -> Tensor:
    """Weights of masked patches by distance, re-scaled so that each image's largest is 1 (paper Eq. 2).

    distance [B, M] of masked patches, beta [K] -> [K, B, M] in (0, 1]; fp32, or fp64 for fp64 inputs.
    """
    _check_weights(distance, beta, rescale_grad)
    return reference.relative_weights(distance, beta, rescale_grad)


def weight_norm(distance: Tensor, beta: Tensor, ref_batch: float = 1) -> Tensor:
    """The norm of the weights that the paper regularises (Eq. 6): [B, M], [K] -> [K].

    sqrt(ref_batch * mean_b sum_i w_kbi^2) with w the softmax weights, not re-scaled: smallest for a uniform w.
    ref_batch = 1 is the root mean square norm of one image's weights; ref_batch = 256 the norm over a flattened
    batch of 256 images, whatever the batch at hand.
    """
    _check_weights(distance, beta, "full")
    if ref_batch <= 0:
        raise ValueError(f"ref_batch is {ref_batch}: expected a positive number of images")
    return reference.weight_norm(distance, beta, ref_batch)


def dynamic_mse(
    pred: Tensor,
    target: Tensor,
    distance: Tensor,
    beta: Tensor,
    tap_weight: Tensor,
    *,
    rescale_grad: str = "full",
    patch_weight: Tensor | None = None,
    impl: str = "auto",
) -> DynamicLoss:
    """Distance-weighted mean squared error over K taps (paper Eqs. 3 and 5).

        loss = sum_k tap_weight_k * mean_b (1/M) sum_i c_bi r_kbi * mean_d (pred - target)^2

    pred [K, B, M, D]; target [B, M, D], shared by the taps, or [K, B, M, D]; distance [B, M] of the masked patches in
    patch units; beta [K]; tap_weight [K]. Differentiable in pred and beta; inputs are never written to. Computed in
    fp32, in fp64 for fp64 inputs. patch_weight [B, M]: the fixed weights c, 1 where None. rescale_grad: "full"
    differentiates through the re-scale's maximum, "detach" not.
    impl: "auto" is Triton for CUDA tensors and the reference elsewhere; "triton" never falls back to the reference.
    Triton allows one backward a call, and copies inputs that are not contiguous first.
    Raises ValueError for shapes, dtypes, devices that do not fit, and for values (CPU, or DDAE_CHECK=1).
    """
    _check_loss(pred, distance, beta, tap_weight, rescale_grad, patch_weight)
    _check_target(pred, target)
    weights = distance, beta, tap_weight, rescale_grad, patch_weight
    if choose(impl, pred.device, pred.dtype, target.dtype) == "triton":
        return _in_triton(pred, target, *weights)
    return _detached(*reference.weighted_mse(pred, target, *weights))


def dynamic_pixel_mse(
    pred: Tensor,
    images_u8: Tensor,
    masked: Tensor,
    distance: Tensor,
    beta: Tensor,
    tap_weight: Tensor,
    *,
    patch: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    norm: str = "per_channel",
    unbiased: bool | None = None,
    eps: float | None = None,
    rescale_grad: str = "full",
    patch_weight: Tensor | None = None,
    impl: str = "auto",
) -> DynamicLoss:
    """`dynamic_mse` against the images' own masked patches, normalised patch by patch.

    pred [K, B, M, P], the numbers of a patch in (row, column, channel) order; images_u8 uint8 [B, 3, H, W];
    masked: int64 [B, M] positions of the masked patches (or bool [B, N], read in ascending order); mean and std of
    the pixels in [0, 1]. norm: "per_channel" statistics of each colour, "joint" of the whole patch, "none".
    unbiased (variance over n - 1) and eps (added to the variance, in units after mean and std) default to each
    norm's published form: per_channel False, 1e-5 (BootMAE); joint True, 1e-6 (MAE).
    """
    _check_loss(pred, distance, beta, tap_weight, rescale_grad, patch_weight)
    if norm not in PATCH_NORMS:
        raise ValueError(f"norm is {norm!r}: choose one of {', '.join(PATCH_NORMS)}")
    _check_images(pred, images_u8, patch, mean, std)
    masked = _masked_positions(masked, distance, images_u8.shape[2] * images_u8.shape[3] // patch**2)
    _check_device(pred, images_u8=images_u8, masked=masked)
    unbiased = PATCH_NORMS[norm][0] if unbiased is None else unbiased
    eps = PATCH_NORMS[norm][1] if eps is None else eps
    weights = distance, beta, tap_weight, rescale_grad, patch_weight
    if choose(impl, pred.device, pred.dtype) == "triton":
        how = {"masked": masked, "patch": patch, "mean": mean, "std": std}
        return _in_triton(pred, images_u8, *weights, norm=norm, unbiased=unbiased, eps=eps, **how)
    dtype = reference.compute_dtype(pred)
    target = reference.pixel_target(images_u8, masked, patch, mean, std, norm, unbiased, eps, dtype)
    return _detached(*reference.weighted_mse(pred, target, *weights))


def dynamic_feature_mse(
    pred: Tensor,
    target: Tensor,
    distance: Tensor,
    beta: Tensor,
    tap_weight: Tensor,
    *,
    norm_pred: bool = True,
    target_norm: str = "layer",
    eps: float = 1e-6,
    rescale_grad: str = "full",
    patch_weight: Tensor | None = None,
    impl: str = "auto",
) -> DynamicLoss:
    """`dynamic_mse` against normalised features (paper Eq. 5, which states no normalisation).

    target_norm: "layer" is a LayerNorm of each token without affine (BootMAE); "instance_layer" standardises each
    channel over the masked tokens of an image first (data2vec 2.0), "batch_layer" over those of all images of the call;
    "none" leaves the target as it is. norm_pred: the prediction passes the same LayerNorm, and no other normalisation.
    eps: of the LayerNorm; a channel's variance over tokens has STANDARDISE_EPS. A channel or a token of zero variance
    becomes 0. Shapes as in `dynamic_mse`.
    """
    if target_norm not in TARGET_NORMS:
        raise ValueError(f"target_norm is {target_norm!r}: choose one of {', '.join(TARGET_NORMS)}")
    _check_loss(pred, distance, beta, tap_weight, rescale_grad, patch_weight)
    _check_target(pred, target)
    weights = distance, beta, tap_weight, rescale_grad, patch_weight
    if choose(impl, pred.device, pred.dtype, target.dtype) == "triton":
        how = {"norm": target_norm, "eps": eps, "norm_pred": norm_pred, "standardise_eps": STANDARDISE_EPS}
        return _in_triton(pred, target, *weights, **how)
    dtype = reference.compute_dtype(pred, target)
    target = reference.feature_target(target, target_norm, eps, STANDARDISE_EPS, dtype)
    pred = reference.plain_layer_norm(pred, eps, dtype) if norm_pred else pred
    return _detached(*reference.weighted_mse(pred, target, *weights))


def dynamic_error(
    token_error: Tensor,
    distance: Tensor,
    beta: Tensor,
    tap_weight: Tensor,
    *,
    rescale_grad: str = "full",
    patch_weight: Tensor | None = None,
) -> DynamicLoss:
    """Distance-weighted mean over K taps of an error of your own, one number a masked patch (cross-entropy, say).

        loss = sum_k tap_weight_k * mean_b (1/M) sum_i c_bi r_kbi * token_error_kbi

    token_error [K, B, M]; the rest as in `dynamic_mse`. Differentiable in token_error and beta, by autograd: what it
    works on is small. The other losses are this one of a squared error.
    """
    if token_error.ndim != 3:
        raise ValueError(f"token_error is {_shape(token_error)}: expected [K, B, M], one number a masked patch")
    _check_loss(token_error[..., None], distance, beta, tap_weight, rescale_grad, patch_weight)
    return _detached(*reference.weighted_error(token_error, distance, beta, tap_weight, rescale_grad, patch_weight))


def _in_triton(*arguments, **options) -> DynamicLoss:
    from ddae_kernels import operators  # at need: it imports Triton, which may not be there

    return _detached(*operators.dynamic_loss(*arguments, **options))


def _detached(loss: Tensor, tap_loss: Tensor, token_error: Tensor) -> DynamicLoss:
    return DynamicLoss(loss, tap_loss.detach(), token_error.detach())


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _check_device(pred: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.device != pred.device:
            raise ValueError(f"{name} is on {tensor.device}, pred on {pred.device}: move both to one device")


def _check_weights(distance: Tensor, beta: Tensor, rescale_grad: str) -> None:
    if rescale_grad not in RESCALE_GRADS:
        raise ValueError(f"rescale_grad is {rescale_grad!r}: choose one of {', '.join(RESCALE_GRADS)}")
    if distance.ndim != 2 or 0 in distance.shape or not distance.is_floating_point():
        raise ValueError(f"distance is {distance.dtype} {_shape(distance)}: expected floats [B, M], none of them 0")
    if beta.ndim != 1 or not beta.is_floating_point():
        raise ValueError(f"beta is {beta.dtype} {_shape(beta)}: expected floats [K]")
    if beta.device != distance.device:
        raise ValueError(f"beta is on {beta.device}, distance on {distance.device}: move both to one device")
    if values_are_checked(distance) and not bool((distance.isfinite() & (distance > 0)).all()):
        raise ValueError("distance holds a value that is not finite and above 0: pass masked patches only")
    if values_are_checked(beta) and not bool(beta.isfinite().all()):
        raise ValueError("beta holds a value that is not finite")


def _check_loss(
    pred: Tensor,
    distance: Tensor,
    beta: Tensor,
    tap_weight: Tensor,
    rescale_grad: str,
    patch_weight: Tensor | None = None,
) -> None:
    _check_weights(distance, beta, rescale_grad)
    if pred.ndim != 4 or 0 in pred.shape or not pred.is_floating_point():
        raise ValueError(f"pred is {pred.dtype} {_shape(pred)}: expected floats [K, B, M, D], none of them 0")
    taps, images, patches, _ = pred.shape
    if distance.shape != (images, patches):
        raise ValueError(f"distance is {_shape(distance)}: expected [{images}, {patches}], to fit pred {_shape(pred)}")
    for name, tensor in (("beta", beta), ("tap_weight", tap_weight)):
        if tensor.shape != (taps,) or not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype} {_shape(tensor)}: expected floats [{taps}], one a tap of pred")
    if values_are_checked(tap_weight) and not bool(tap_weight.isfinite().all()):
        raise ValueError("tap_weight holds a value that is not finite")
    _check_device(pred, distance=distance, beta=beta, tap_weight=tap_weight)
    _check_constant(distance=distance, tap_weight=tap_weight)
    if patch_weight is None:
        return
    if patch_weight.shape != distance.shape or not patch_weight.is_floating_point():
        given = f"{patch_weight.dtype} {_shape(patch_weight)}"
        raise ValueError(f"patch_weight is {given}: expected floats {_shape(distance)}, as distance")
    if values_are_checked(patch_weight) and not bool(patch_weight.isfinite().all()):
        raise ValueError("patch_weight holds a value that is not finite")
    _check_device(pred, patch_weight=patch_weight)
    _check_constant(patch_weight=patch_weight)


def _check_target(pred: Tensor, target: Tensor) -> None:
    if target.shape not in (pred.shape, pred.shape[1:]) or not target.is_floating_point():
        wanted = f"{_shape(pred)} or {_shape(pred[0])}"
        raise ValueError(f"target is {target.dtype} {_shape(target)}: expected floats {wanted}, to fit pred")
    _check_device(pred, target=target)
    _check_constant(target=target)


def _check_constant(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, and only pred and beta are given one: pass {name}.detach()")


def _masked_positions(masked: Tensor, distance: Tensor, patches: int) -> Tensor:
    """int64 [B, M] from positions or from a bool [B, N] that marks M patches in every row."""
    images, count = distance.shape
    if masked.dtype == torch.bool and masked.shape == (images, patches):
        if values_are_checked(masked) and not bool((masked.sum(1) == count).all()):
            raise ValueError(f"masked marks another number of patches than the {count} of distance in some row")
        return masked.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
    if masked.shape != distance.shape or masked.dtype != torch.int64:
        wanted = f"int64 {_shape(distance)}, as distance, or bool [{images}, {patches}]"
        raise ValueError(f"masked is {masked.dtype} {_shape(masked)}: expected {wanted}")
    if values_are_checked(masked) and not bool(((masked >= 0) & (masked < patches)).all()):
        raise ValueError(f"masked names a patch outside 0 to {patches - 1}")
    return masked


def _check_images(pred: Tensor, images_u8: Tensor, patch: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    if patch < 1:
        raise ValueError(f"patch is {patch}: expected the side of a patch in pixels, 1 or more")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3 or (name == "std" and min(values) <= 0):
            raise ValueError(f"{name} is {values}: expected three numbers, one a colour, and of std above 0")
    if images_u8.dtype != torch.uint8 or images_u8.ndim != 4 or images_u8.shape[:2] != (pred.shape[1], 3):
        raise ValueError(
            f"images_u8 is {images_u8.dtype} {_shape(images_u8)}: expected uint8 [{pred.shape[1]}, 3, H, W]"
        )
    if images_u8.shape[2] % patch or images_u8.shape[3] % patch:
        raise ValueError(f"images of {images_u8.shape[2]} x {images_u8.shape[3]} do not divide into patches of {patch}")
    if pred.shape[3] != patch * patch * 3:
        raise ValueError(f"pred predicts {pred.shape[3]} numbers a patch: a patch of side {patch} has {patch**2 * 3}")
