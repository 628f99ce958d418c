"""Reference implementation: the equations of the deep dynamic loss in plain torch. This file is the definition.

Shape letters: B images, N patches, M masked patches per image, S predicted ones of them (all M without a subset),
K taps, D width, P values of a patch (side * side * 3).

For masked patch i of image b at distance d_bi from the nearest visible patch, and tap k (paper Eq. 2):

    w_kbi = softmax over i of d_bi ^ beta_k                                   weights of an image, which sum to 1
    r_kbi = w_kbi / max_j w_kbj = exp(d_bi^beta_k - max_j d_bj^beta_k)        rescaled weights, in (0, 1]

For predictions p and targets t (paper Eqs. 3 and 5, with the reduction that METHOD.md defines):

    loss  = sum_k tap_weight_k * mean_b (1/M) sum_i c_bi r_kbi * mean_d (p_kbid - t_kbid)^2

where c_bi is a fixed weight of the patch, 1 by default. If only S of an image's M masked patches are predicted, the sum
is over these and divided by S; r is still rescaled by the largest weight of all M. The mean over all subsets of one
size is then the full loss.

Everything is computed in fp32, or in fp64 if the prediction or its target is fp64 (for the weights: distance or beta).
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

STANDARDISE_EPS = 1e-5  # added to the variance of a channel over tokens, as in torch's instance_norm


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any of `tensors` is float64, otherwise float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def distance_powers(distance: Tensor, beta: Tensor) -> Tensor:
    """Return the logits of the softmax, d^beta: [B, M], [K] -> [K, B, M]."""
    dtype = compute_dtype(distance, beta)
    return distance.to(dtype).pow(beta.to(dtype)[:, None, None])


def relative_weights(distance: Tensor, beta: Tensor, rescale_grad: str, subset: Tensor | None = None) -> Tensor:
    """Return the rescaled weights r: [B, M], [K] -> [K, B, M], or [K, B, S] of a subset, int64 [B, S].

    rescale_grad: "full" differentiates through the maximum (amax shares its gradient evenly between ties), "detach"
    treats the maximum of w as a constant.
    """
    power = distance_powers(distance, beta)
    if rescale_grad == "full":
        relative = torch.exp(power - power.amax(-1, keepdim=True))
    else:
        weight = torch.softmax(power, -1)
        relative = weight / weight.amax(-1, keepdim=True).detach()
    return take(relative, subset)


def take(values: Tensor, subset: Tensor | None) -> Tensor:
    """Return the values of a subset of the masked patches: [.., B, M], int64 [B, S] -> [.., B, S]. None: all."""
    return values if subset is None else values.gather(-1, subset.expand(*values.shape[:-1], -1))


def weight_norm(distance: Tensor, beta: Tensor, ref_batch: float) -> Tensor:
    """Return sqrt(ref_batch * mean_b sum_i w_kbi^2), the norm that Eq. 6 regularises: [B, M], [K] -> [K]."""
    weight = torch.softmax(distance_powers(distance, beta), -1)
    return (ref_batch * weight.square().sum(-1).mean(-1)).sqrt()


def mean_square_and_slope(distance: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean_b sum_i w_kbi^2, the square of the norm above for a batch of 1, and its derivative by beta: [K], [K].

    With p = d^beta, p' = p log d:  dw_i/dbeta = w_i (p'_i - sum_j w_j p'_j).
    """
    power = distance_powers(distance, beta)
    weight = torch.softmax(power, -1)
    slope = power * distance.to(power.dtype).log()
    square = weight.square()
    centred = slope - (weight * slope).sum(-1, keepdim=True)
    return square.sum(-1).mean(-1), 2 * (square * centred).sum(-1).mean(-1)


def weighted_mse(pred: Tensor, target: Tensor, *weights: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return `weighted_error` of the squared errors of pred [K, B, S, D]. weights: the other arguments of that call."""
    dtype = compute_dtype(pred, target)
    return weighted_error((pred.to(dtype) - target.to(dtype)).square().mean(-1), *weights)


def weighted_error(
    token_error: Tensor,
    distance: Tensor,
    beta: Tensor,
    tap_weight: Tensor,
    rescale_grad: str,
    patch_weight: Tensor | None,
    subset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss [], tap_loss [K] and token_error [K, B, S] for any error [K, B, S].

    distance, patch_weight: [B, M], of all masked patches.
    """
    dtype = compute_dtype(token_error)
    relative = relative_weights(distance.to(dtype), beta.to(dtype), rescale_grad, subset)
    if patch_weight is not None:
        relative = relative * take(patch_weight.to(dtype), subset)
    tap_loss = (relative * token_error.to(dtype)).mean((1, 2))
    return (tap_weight.to(dtype) * tap_loss).sum(), tap_loss, token_error


@cache
def _constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a cached tensor of `values`: a host-to-device copy in every step would stall the CUDA stream."""
    return torch.tensor(values, device=device, dtype=dtype)


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images [B, 3, H, W] into patches [B, N, P], row by row; values in (row, column, channel) order."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch, width // patch
    tiles = images.reshape(batch, channels, rows, patch, columns, patch)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch * patch * channels)


def pixel_target(
    images_u8: Tensor,
    masked: Tensor,
    patch: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    norm: str,
    unbiased: bool,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return the masked patches, normalised by mean and std and then patch by patch: [B, M, P] of `dtype`.

    images_u8: uint8 [B, 3, H, W]; masked: int64 [B, M]. norm: "per_channel" uses the statistics of each channel of a
    patch, "joint" those of all P values, "none" skips the normalisation by patch.
    """
    index = masked[:, :, None].expand(-1, -1, patch * patch * 3)
    pixels = patchify(images_u8, patch).gather(1, index).to(dtype) / 255
    pixels = pixels.unflatten(-1, (patch * patch, 3))  # [B, M, patch^2, 3]
    channel_mean, channel_std = (_constant(tuple(values), pixels.device, dtype) for values in (mean, std))
    pixels = (pixels - channel_mean) / channel_std
    if norm != "none":
        dims = (-2,) if norm == "per_channel" else (-2, -1)
        variance = pixels.var(dims, unbiased=unbiased, keepdim=True)
        pixels = (pixels - pixels.mean(dims, keepdim=True)) / (variance + eps).sqrt()
    return pixels.flatten(-2)


def layer_norm(tokens: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Apply LayerNorm without affine over the last axis."""
    return F.layer_norm(tokens.to(dtype), tokens.shape[-1:], eps=eps)


def feature_target(target: Tensor, norm: str, eps: float, dtype: torch.dtype) -> Tensor:
    """Normalise the teacher's tokens [.., B, M, D], which have no gradient.

    norm: "layer" applies LayerNorm to each token. "instance_layer" first standardises each channel over the M masked
    tokens of an image, "batch_layer" over those of all images: (t - mean) / sqrt(variance + STANDARDISE_EPS) with the
    biased variance. "none" leaves the tokens unchanged.
    """
    target = target.to(dtype)
    if norm in ("instance_layer", "batch_layer"):
        mean, variance = token_statistics(target, over_batch=norm == "batch_layer")
        target = (target - mean) / (variance + STANDARDISE_EPS).sqrt()
    return target if norm == "none" else layer_norm(target, eps, dtype)


def token_statistics(target: Tensor, over_batch: bool) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel over the masked tokens of an image, or of all images.

    [.., B, M, D] -> two tensors [.., B, 1, D], or [.., 1, 1, D] if over_batch. The statistics are those of differences
    from the first token. The variance of identical tokens is then exactly 0; with a rounded mean it would be noise,
    which the division by the standard deviation would amplify.
    """
    dims = (-3, -2) if over_batch else (-2,)
    first = target[..., :1, :1, :] if over_batch else target[..., :1, :]
    shifted = target - first
    mean = shifted.mean(dims, keepdim=True)
    return first + mean, (shifted - mean).square().mean(dims, keepdim=True)
