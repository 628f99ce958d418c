"""Public losses: argument checks, choice of the implementation, and the equations of reference.py.

Shape letters: B images, N patches, M masked patches per image, S predicted ones of them (all M without `subset`),
K taps, D width, P values of a patch (side * side * 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ddae_kernels import reference
from ddae_kernels.implementation import check_choice, resolve_impl, should_check_values

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64, UInt8

RESCALE_GRADS = ("full", "detach")
TARGET_NORMS = ("layer", "instance_layer", "batch_layer", "none")  # of features
LAYER_NORM_EPS = 1e-6  # of features
PATCH_NORMS = {"per_channel": (False, 1e-5), "joint": (True, 1e-6), "none": (False, 0.0)}  # norm: (unbiased, eps)


class DynamicLoss(NamedTuple):
    """A differentiable loss and its detached components."""

    loss: Tensor  # []: sum over taps of tap_weight * tap_loss
    tap_loss: Tensor  # [K]: weighted by distance, before the tap weight; detached
    token_error: Tensor  # [K, B, S]: unweighted error of each predicted patch (MSE, except dynamic_error); detached


def distance_weights(
    distance: Float[Tensor, "B M"], beta: Float[Tensor, " K"], *, rescale_grad: str = "full"
) -> Float[Tensor, "K B M"]:
    """Return the weights of masked patches, rescaled so that the largest of each image is 1 (paper Eq. 2).

    distance: [B, M] of the masked patches; beta: [K]. The result, [K, B, M] in (0, 1], is fp32; fp64 for fp64 inputs.
    Raise ValueError if an argument is invalid.
    """
    _check_weights(distance, beta, rescale_grad)
    return reference.relative_weights(distance, beta, rescale_grad)


def weight_norm(distance: Float[Tensor, "B M"], beta: Float[Tensor, " K"], ref_batch: float = 1) -> Float[Tensor, " K"]:
    """Return the norm of the softmax weights that the paper regularises (Eq. 6): [B, M], [K] -> [K].

    The norm is sqrt(ref_batch * mean_b sum_i w_kbi^2), where w are the softmax weights before the rescaling; uniform
    weights minimise it. ref_batch = 1 gives the root mean square over images of the norm of one image's weights.
    ref_batch = 256 gives the norm of a flattened batch of 256 images, independent of the actual batch size.
    Raise ValueError if an argument is invalid.
    """
    _check_weights(distance, beta)
    if ref_batch <= 0:
        raise ValueError(f"ref_batch is {ref_batch}; expected a number of images > 0.")
    return reference.weight_norm(distance, beta, ref_batch)


def weight_norm_and_slope(
    distance: Float[Tensor, "B M"], beta: Float[Tensor, " K"]
) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
    """Return the square of weight_norm() for ref_batch = 1, and its derivative by beta, in closed form: [K], [K].

    Neither is differentiable. Raise ValueError if an argument is invalid.
    """
    _check_weights(distance, beta)
    with torch.no_grad():
        return reference.mean_square_and_slope(distance, beta)


def dynamic_mse(
    pred: Float[Tensor, "K B S D"],
    target: Float[Tensor, "B M D"] | Float[Tensor, "K B M D"],
    distance: Float[Tensor, "B M"],
    beta: Float[Tensor, " K"],
    tap_weight: Float[Tensor, " K"],
    *,
    rescale_grad: str = "full",
    patch_weight: Float[Tensor, "B M"] | None = None,
    subset: Int64[Tensor, "B S"] | None = None,
    impl: str = "auto",
) -> DynamicLoss:
    """Compute the distance-weighted mean squared error over K taps (paper Eqs. 3 and 5).

        loss = sum_k tap_weight_k * mean_b (1/S) sum_i c_bi r_kbi * mean_d (pred - target)^2

    pred: [K, B, S, D]; target: [B, M, D], shared by all taps, or [K, B, M, D]; distance: [B, M] of the masked patches
    in patch units; beta: [K]; tap_weight: [K]; patch_weight: [B, M], the fixed weights c (None: 1). r are the weights
    of `distance_weights`. rescale_grad: "full" differentiates through the maximum of the rescaling, "detach" treats it
    as a constant. subset: int64 [B, S], which of an image's M masked patches are predicted, each once; None: all. The
    weights stay those among all M, so that the mean over all subsets of one size is the loss and gradient of all.

    The loss is differentiable in pred and beta. It is computed in fp32, or in fp64 for fp64 inputs; inputs are not
    modified. impl: "auto" selects Triton for CUDA tensors and the reference otherwise; "triton" never falls back.
    Triton supports one backward pass per call and copies non-contiguous inputs.

    Raise ValueError if a shape, dtype, device or option is invalid, or a value is (on the CPU, or with DDAE_CHECK=1).
    """
    options: dict[str, Any] = {"rescale_grad": rescale_grad, "patch_weight": patch_weight, "subset": subset}
    options |= {"impl": impl}
    vectors = distance, beta, tap_weight
    return dynamic_feature_mse(pred, target, *vectors, norm_pred=False, target_norm="none", eps=0.0, **options)


def dynamic_pixel_mse(
    pred: Float[Tensor, "K B S P"],
    images_u8: UInt8[Tensor, "B 3 H W"],
    masked: Int64[Tensor, "B M"] | Bool[Tensor, "B N"],
    distance: Float[Tensor, "B M"],
    beta: Float[Tensor, " K"],
    tap_weight: Float[Tensor, " K"],
    *,
    patch: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    norm: str = "per_channel",
    unbiased: bool | None = None,
    eps: float | None = None,
    rescale_grad: str = "full",
    patch_weight: Float[Tensor, "B M"] | None = None,
    subset: Int64[Tensor, "B S"] | None = None,
    impl: str = "auto",
) -> DynamicLoss:
    """Compute `dynamic_mse` against the masked patches of the images, normalised patch by patch (paper Eq. 3).

    pred: [K, B, S, P], the values of a patch in (row, column, channel) order; images_u8: uint8 [B, 3, H, W]; masked:
    int64 [B, M] indices of the masked patches, or bool [B, N], which is read in ascending order; patch: side of a
    patch in pixels; mean, std: of the pixels in [0, 1], per channel. The other arguments are those of `dynamic_mse`.

    norm: "per_channel" normalises each colour channel of a patch, "joint" all values of a patch, "none" nothing.
    unbiased: divide the variance by n - 1; eps: added to the variance of pixels that mean and std have normalised.
    Their defaults are the published forms: False, 1e-5 for "per_channel" (BootMAE); True, 1e-6 for "joint" (MAE).

    Raise ValueError if an argument is invalid.
    """
    weights = distance, beta, tap_weight, rescale_grad, patch_weight, subset
    _check_loss(pred, *weights)
    check_choice("norm", norm, PATCH_NORMS)
    _check_images(pred, images_u8, patch, mean, std)
    masked = _masked_indices(masked, distance, images_u8.shape[2] * images_u8.shape[3] // patch**2)
    _check_constants(pred, images_u8=images_u8, masked=masked)
    unbiased = PATCH_NORMS[norm][0] if unbiased is None else unbiased
    eps = PATCH_NORMS[norm][1] if eps is None else eps
    if resolve_impl(impl, pred.device, pred.dtype) == "triton":
        options = {"masked": masked, "patch": patch, "mean": mean, "std": std}
        return _triton_loss(pred, images_u8, *weights, norm=norm, unbiased=unbiased, eps=eps, **options)
    dtype = reference.compute_dtype(pred)
    masked = reference.take(masked, subset)
    target = reference.pixel_target(images_u8, masked, patch, mean, std, norm, unbiased, eps, dtype)
    return _detach_components(*reference.weighted_mse(pred, target, *weights))


def dynamic_feature_mse(
    pred: Float[Tensor, "K B S D"],
    target: Float[Tensor, "B M D"] | Float[Tensor, "K B M D"],
    distance: Float[Tensor, "B M"],
    beta: Float[Tensor, " K"],
    tap_weight: Float[Tensor, " K"],
    *,
    norm_pred: bool = True,
    target_norm: str = "layer",
    eps: float = LAYER_NORM_EPS,
    rescale_grad: str = "full",
    patch_weight: Float[Tensor, "B M"] | None = None,
    subset: Int64[Tensor, "B S"] | None = None,
    impl: str = "auto",
) -> DynamicLoss:
    """Compute `dynamic_mse` against normalised features (paper Eq. 5, which specifies no normalisation).

    target_norm: "layer" applies LayerNorm without affine to each token (BootMAE). "instance_layer" first standardises
    each channel over the masked tokens of an image (data2vec 2.0), "batch_layer" over those of all images in the call.
    "none" leaves the target unchanged. norm_pred: apply the same LayerNorm, but no standardisation, to the prediction.
    eps: of the LayerNorm; the standardisation uses STANDARDISE_EPS of reference.py. A channel or token of zero variance
    becomes 0. The other arguments, shapes and errors are those of `dynamic_mse`.
    """
    weights = distance, beta, tap_weight, rescale_grad, patch_weight, subset
    check_choice("target_norm", target_norm, TARGET_NORMS)
    _check_loss(pred, *weights)
    fix = "Pass one target for all taps, [B, M, D], or one per tap, [K, B, M, D]."
    shape = (*distance.shape, pred.shape[-1])
    _check_tensor("target", target, (len(pred), *shape) if target.ndim == 4 else shape, fix)
    _check_constants(pred, target=target)
    if resolve_impl(impl, pred.device, pred.dtype, target.dtype) == "triton":
        return _triton_loss(pred, target, *weights, norm=target_norm, eps=eps, norm_pred=norm_pred)
    dtype = reference.compute_dtype(pred, target)
    target = reference.feature_target(target, target_norm, eps, dtype)
    if subset is not None:
        target = target.gather(-2, subset[..., None].expand(*target.shape[:-2], -1, target.shape[-1]))
    pred = reference.layer_norm(pred, eps, dtype) if norm_pred else pred
    return _detach_components(*reference.weighted_mse(pred, target, *weights))


def dynamic_error(
    token_error: Float[Tensor, "K B S"],
    distance: Float[Tensor, "B M"],
    beta: Float[Tensor, " K"],
    tap_weight: Float[Tensor, " K"],
    *,
    rescale_grad: str = "full",
    patch_weight: Float[Tensor, "B M"] | None = None,
    subset: Int64[Tensor, "B S"] | None = None,
) -> DynamicLoss:
    """Compute the distance-weighted mean over K taps of any per-patch error, such as a cross-entropy.

        loss = sum_k tap_weight_k * mean_b (1/S) sum_i c_bi r_kbi * token_error_kbi

    token_error: [K, B, S]; the other arguments and errors are those of `dynamic_mse`, which is this loss of squared
    errors. Differentiable in token_error and beta by autograd; there is no Triton version, because [K, B, S] is small.
    """
    weights = distance, beta, tap_weight, rescale_grad, patch_weight, subset
    _check_tensor("token_error", token_error, ("K", "B", "S"), "Pass one value per tap and predicted patch.")
    _check_loss(token_error[..., None], *weights)
    return _detach_components(*reference.weighted_error(token_error, *weights))


def _triton_loss(*args, **options) -> DynamicLoss:
    from ddae_kernels import operators  # imported on first use: Triton may not be installed

    return _detach_components(*operators.dynamic_loss(*args, **options))


def _detach_components(loss: Tensor, tap_loss: Tensor, token_error: Tensor) -> DynamicLoss:
    return DynamicLoss(loss, tap_loss.detach(), token_error.detach())


def _check_tensor(name: str, tensor: Tensor, shape: Sequence[int | str], fix: str, dtype: str = "float") -> None:
    """Raise ValueError unless `tensor` has `dtype` and `shape`, where a letter is any size. Only vectors may be empty.

    dtype: "float" for any floating-point dtype. fix: sentence for the error message.
    """
    has_dtype = tensor.is_floating_point() if dtype == "float" else tensor.dtype == getattr(torch, dtype)
    sizes = [n if isinstance(size, str) else size for n, size in zip(tensor.shape, shape, strict=False)]
    has_shape = tensor.ndim == len(shape) and list(tensor.shape) == sizes
    is_empty = len(shape) > 1 and 0 in tensor.shape
    if not (has_dtype and has_shape) or is_empty:
        expected = f"expected {dtype} [{', '.join(map(str, shape))}]{', not empty' if is_empty else ''}"
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; {expected}. {fix}")


def _check_constants(pred: Tensor, **tensors: Tensor) -> None:
    """Raise ValueError unless the tensors are on pred's device and require no gradient."""
    for name, tensor in tensors.items():
        if tensor.device != pred.device:
            raise ValueError(f"{name} is on {tensor.device}, but pred is on {pred.device}. Move both to one device.")
        if tensor.requires_grad and torch.is_grad_enabled():
            message = "but the loss has gradients of pred and beta only"
            raise ValueError(f"{name} requires a gradient, {message}. Pass {name}.detach().")


def _check_finite(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if should_check_values(tensor) and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} contains a non-finite value; expected finite values.")


def _check_weights(distance: Tensor, beta: Tensor, rescale_grad: str = "full") -> None:
    check_choice("rescale_grad", rescale_grad, RESCALE_GRADS)
    _check_tensor("distance", distance, ("B", "M"), "Pass the distances of the masked patches.")
    _check_tensor("beta", beta, ("K",), "Pass one value per tap.")
    if beta.device != distance.device:
        raise ValueError(f"beta is on {beta.device}, but distance is on {distance.device}. Move both to one device.")
    if should_check_values(distance) and not bool((distance.isfinite() & (distance > 0)).all()):
        fix = "Pass the distances of the masked patches only"
        raise ValueError(f"distance contains a value that is non-finite or <= 0; expected finite values > 0. {fix}.")
    _check_finite(beta=beta)


def _check_loss(
    pred: Tensor,
    distance: Tensor,
    beta: Tensor,
    tap_weight: Tensor,
    rescale_grad: str,
    patch_weight: Tensor | None,
    subset: Tensor | None,
) -> None:
    _check_weights(distance, beta, rescale_grad)
    _check_tensor("pred", pred, ("K", "B", "S", "D"), "Pass the predictions of all taps, at least one.")
    if subset is None:
        _check_tensor("distance", distance, pred.shape[1:3], "Pass one distance per masked patch of pred.")
    else:
        _check_tensor("distance", distance, (pred.shape[1], "M"), "Pass one row per image of pred.")
        fix = f"Pass the places of the predicted patches among the {distance.shape[1]} masked ones."
        _check_tensor("subset", subset, pred.shape[1:3], fix, "int64")
        if should_check_values(subset) and not bool(((subset >= 0) & (subset < distance.shape[1])).all()):
            raise ValueError(f"subset contains an index outside 0 to {distance.shape[1] - 1}. {fix}")
        _check_constants(pred, subset=subset)
    _check_tensor("beta", beta, pred.shape[:1], "Pass one value per tap of pred.")
    _check_tensor("tap_weight", tap_weight, pred.shape[:1], "Pass one value per tap of pred.")
    constants = {"tap_weight": tap_weight}
    if patch_weight is not None:
        _check_tensor("patch_weight", patch_weight, distance.shape, "Pass one value per masked patch.")
        constants["patch_weight"] = patch_weight
    _check_finite(**constants)
    _check_constants(pred, distance=distance, **constants)


def _masked_indices(masked: Tensor, distance: Tensor, num_patches: int) -> Tensor:
    """Return int64 [B, M] indices, given those or a bool mask [B, N] with M masked patches in every row."""
    num_images, num_masked = distance.shape
    if masked.dtype == torch.bool:
        _check_tensor("masked", masked, (num_images, num_patches), "Pass one value per patch of images_u8.", "bool")
        if should_check_values(masked) and not bool((masked.sum(1) == num_masked).all()):
            expected = "expected as many in every image as in distance"
            raise ValueError(f"masked has a row that does not mark {num_masked} patches; {expected}. Mask as many.")
        return masked.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :num_masked]
    fix = f"Pass the indices of the masked patches, or a mask, bool [{num_images}, {num_patches}]."
    _check_tensor("masked", masked, distance.shape, fix, "int64")
    if should_check_values(masked) and not bool(((masked >= 0) & (masked < num_patches)).all()):
        raise ValueError(f"masked contains an index outside 0 to {num_patches - 1}, the patches of images_u8.")
    return masked


def _check_images(pred: Tensor, images_u8: Tensor, patch: int, mean: Sequence[float], std: Sequence[float]) -> None:
    if patch < 1:
        raise ValueError(f"patch is {patch}; expected the side of a patch in pixels, >= 1.")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        expected = "expected three numbers each, one per channel, and those of std all > 0"
        raise ValueError(f"mean is {mean} and std is {std}; {expected}.")
    fix = "Pass the RGB bytes of the images that pred was computed from."
    _check_tensor("images_u8", images_u8, (pred.shape[1], 3, "H", "W"), fix, "uint8")
    height, width = images_u8.shape[2:]
    if height % patch or width % patch:
        raise ValueError(f"images_u8 is {height} x {width} pixels; expected multiples of patch, which is {patch}.")
    if pred.shape[3] != 3 * patch**2:
        raise ValueError(f"pred has {pred.shape[3]} values per patch; expected {3 * patch**2}, 3 * patch * patch.")
