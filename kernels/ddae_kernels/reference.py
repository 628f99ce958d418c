"""The deep dynamic loss as its equations stand: plain torch, no tricks. This file is the definition.

Shape letters: B images, N patches, M masked patches, K taps, D width, P numbers of a patch (side x side x 3).

For a masked patch i of image b at distance d_bi from the nearest visible patch, and tap k (paper Eq. 2):

    w_kbi = softmax over i of d_bi ^ beta_k                the weight of a patch, summing to 1 over an image
    r_kbi = w_kbi / max_j w_kbj = exp(d_bi^beta_k - max_j d_bj^beta_k)        re-scaled, in (0, 1]

and for predictions p and targets t (paper Eqs. 3 and 5, reduced as METHOD.md says):

    loss  = sum_k tap_weight_k * mean_b (1/M) sum_i c_bi r_kbi * mean_d (p_kbid - t_kbid)^2

where c is a fixed weight of each patch, 1 unless one is given.

Everything is computed in fp32; in fp64 where a prediction or its target (for the weights: a distance or beta) is fp64.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 where any of `tensors` is fp64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def powers(distance: Tensor, beta: Tensor) -> Tensor:
    """The exponent of the softmax, d^beta: [B, M], [K] -> [K, B, M]."""
    dtype = compute_dtype(distance, beta)
    return distance.to(dtype).pow(beta.to(dtype)[:, None, None])


def relative_weights(distance: Tensor, beta: Tensor, rescale_grad: str) -> Tensor:
    """r of the file's head: [B, M], [K] -> [K, B, M].

    rescale_grad "full" differentiates through the maximum (amax: its gradient is shared evenly between ties),
    "detach" holds the maximum of w fixed.
    """
    power = powers(distance, beta)
    if rescale_grad == "full":
        return torch.exp(power - power.amax(-1, keepdim=True))
    weight = torch.softmax(power, -1)
    return weight / weight.amax(-1, keepdim=True).detach()


def weight_norm(distance: Tensor, beta: Tensor, ref_batch: float) -> Tensor:
    """sqrt(ref_batch * mean_b sum_i w_kbi^2): [B, M], [K] -> [K]; the norm that Eq. 6 regularises."""
    weight = torch.softmax(powers(distance, beta), -1)
    return (ref_batch * weight.square().sum(-1).mean(-1)).sqrt()


def weighted_mse(
    pred: Tensor,
    target: Tensor,
    distance: Tensor,
    beta: Tensor,
    tap_weight: Tensor,
    rescale_grad: str,
    patch_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss [], tap_loss [K] and token_error [K, B, M] of the file's head; pred [K, B, M, D], patch_weight [B, M]."""
    dtype = compute_dtype(pred, target)
    token_error = (pred.to(dtype) - target.to(dtype)).square().mean(-1)
    return weighted_error(token_error, distance, beta, tap_weight, rescale_grad, patch_weight)


def weighted_error(
    token_error: Tensor,
    distance: Tensor,
    beta: Tensor,
    tap_weight: Tensor,
    rescale_grad: str,
    patch_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of errors [K, B, M] of whatever kind, one a patch."""
    dtype = compute_dtype(token_error)
    relative = relative_weights(distance.to(dtype), beta.to(dtype), rescale_grad)
    if patch_weight is not None:
        relative = relative * patch_weight.to(dtype)
    tap_loss = (relative * token_error.to(dtype)).mean((1, 2))
    return (tap_weight.to(dtype) * tap_loss).sum(), tap_loss, token_error


@cache
def _numbers(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """These numbers on the device, sent there once: a copy each step would stall the stream."""
    return torch.tensor(values, device=device, dtype=dtype)


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, 3, H, W] -> [B, N, P]: patches row by row, the numbers of a patch in (row, column, channel) order."""
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
    """The masked patches of the images, scaled by mean and std and then normalised patch by patch: [B, M, P].

    norm "per_channel" takes the statistics of each colour over the patch, "joint" over all P numbers, "none" leaves
    the patch as it is.
    """
    rows = masked[:, :, None].expand(-1, -1, patch * patch * 3)
    pixels = patchify(images_u8, patch).gather(1, rows).to(dtype) / 255
    pixels = pixels.unflatten(-1, (patch * patch, 3))  # [B, M, patch^2, 3]
    centre, spread = (_numbers(tuple(values), pixels.device, dtype) for values in (mean, std))
    pixels = (pixels - centre) / spread
    if norm != "none":
        over = (-2,) if norm == "per_channel" else (-2, -1)
        variance = pixels.var(over, unbiased=unbiased, keepdim=True)
        pixels = (pixels - pixels.mean(over, keepdim=True)) / (variance + eps).sqrt()
    return pixels.flatten(-2)


def plain_layer_norm(tokens: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm over the last axis without scale and shift."""
    return F.layer_norm(tokens.to(dtype), tokens.shape[-1:], eps=eps)


def feature_target(target: Tensor, norm: str, eps: float, standardise_eps: float, dtype: torch.dtype) -> Tensor:
    """Normalise the teacher's tokens [.., B, M, D], which have no gradient.

    norm "layer" is a LayerNorm of each token. "instance_layer" first standardises each channel over the M masked tokens
    of an image, "batch_layer" over those of all images: (t - mean) / sqrt(variance + standardise_eps), with the biased
    variance. "none" leaves the tokens as they are.
    """
    target = target.to(dtype)
    if norm in ("instance_layer", "batch_layer"):
        mean, variance = token_statistics(target, over_batch=norm == "batch_layer")
        target = (target - mean) / (variance + standardise_eps).sqrt()
    return target if norm == "none" else plain_layer_norm(target, eps, dtype)


def token_statistics(target: Tensor, over_batch: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over the masked tokens of an image, or of all images: [.., B, M, D] ->
    twice [.., B, 1, D] or [.., 1, 1, D].

    Differences from the first token are averaged: the variance of tokens that are all alike is then exactly 0, where
    that of a rounded mean would be noise, which the division would amplify.
    """
    over = (-3, -2) if over_batch else (-2,)
    first = target[..., :1, :1, :] if over_batch else target[..., :1, :]
    shifted = target - first
    mean = shifted.mean(over, keepdim=True)
    return first + mean, (shifted - mean).square().mean(over, keepdim=True)
