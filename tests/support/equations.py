"""Paper Eqs. 2, 3, 5 and 6 in float64 NumPy, with explicit loops, independent of the code under test.

Shape letters: B images, N patches, M masked patches, K taps, D values of a patch.
"""

import numpy as np


def nearest_visible(masked: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return the Euclidean distance on the grid to the nearest visible patch: bool [B, N] -> [B, N]."""
    positions = np.stack(np.unravel_index(np.arange(masked.shape[1]), grid), -1).astype(float)
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    return np.stack([distances[:, ~row].min(1) for row in masked])


def softmax_weights(distance: np.ndarray, beta: float) -> np.ndarray:
    """Return w of Eq. 2: [B, M] -> [B, M]."""
    exponential = np.exp(distance**beta)
    return exponential / exponential.sum(1, keepdims=True)


def relative_weights(distance: np.ndarray, beta: float) -> np.ndarray:
    """Return r, the weights divided by the largest of their image: [B, M] -> [B, M]."""
    weight = softmax_weights(distance, beta)
    return weight / weight.max(1, keepdims=True)


def relative_slope(distance: np.ndarray, beta: float, rescale_grad: str) -> np.ndarray:
    """Return d r / d beta: [B, M] -> [B, M]. rescale_grad: as in config.dynamic."""
    power = distance**beta
    power_grad = power * np.log(distance)
    if rescale_grad == "detach":
        weight = softmax_weights(distance, beta)
        norm_grad = (weight * power_grad).sum(1, keepdims=True)
    else:  # gradient of the maximum, divided evenly between ties
        ties = power == power.max(1, keepdims=True)
        norm_grad = (ties * power_grad).sum(1, keepdims=True) / ties.sum(1, keepdims=True)
    return relative_weights(distance, beta) * (power_grad - norm_grad)


def dynamic_loss(pred, target, distance, beta, tap_weight, rescale_grad="full", patch_weight=1.0):
    """Return the dynamic loss of pred [K, B, M, D] and its gradients.

    The tuple is (loss, tap_loss [K], gradient of pred, gradient of beta [K], sum of the absolute terms of the latter).
    """
    taps, images, patches, width = pred.shape
    target = np.broadcast_to(target, pred.shape)
    tap_loss, pred_grad, beta_grad, beta_terms = np.zeros(taps), np.zeros(pred.shape), np.zeros(taps), np.zeros(taps)
    for k in range(taps):
        difference = pred[k] - target[k]
        error = (difference**2).mean(-1)
        relative = patch_weight * relative_weights(distance, beta[k])
        share = tap_weight[k] / (images * patches)
        tap_loss[k] = (relative * error).sum() / (images * patches)
        pred_grad[k] = share * relative[..., None] * 2 * difference / width
        terms = share * error * patch_weight * relative_slope(distance, beta[k], rescale_grad)
        beta_grad[k], beta_terms[k] = terms.sum(), np.abs(terms).sum()
    return (tap_weight * tap_loss).sum(), tap_loss, pred_grad, beta_grad, beta_terms


def weight_norm(distance, beta, ref_batch=1.0):
    """Return sqrt(ref_batch * mean over images of |w|^2) for each beta: [B, M], [K] -> [K]."""
    return np.array([np.sqrt(ref_batch * (softmax_weights(distance, b) ** 2).sum(1).mean()) for b in beta])


def weight_norm_slope(distance, beta):
    """Return d weight_norm / d beta with ref_batch 1: [K]."""
    slopes = []
    for b in beta:
        weight = softmax_weights(distance, b)
        power_grad = distance**b * np.log(distance)
        slope = 2 * weight**2 * (power_grad - (weight * power_grad).sum(1, keepdims=True))
        slopes.append(slope.sum(1).mean() / (2 * weight_norm(distance, [b])[0]))
    return np.array(slopes)


def layer_norm(tokens, eps=1e-6):
    """Return tokens [..., D] normalised over D, without affine parameters."""
    centred = tokens - tokens.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)


def feature_target(tokens, norm, eps=1e-6, standardise_eps=1e-5):
    """Return feature targets [K, B, M, D]: the teacher's masked tokens, normalised per channel, then per token."""
    if norm == "none":
        return tokens
    tokens = np.array(tokens, float)
    for k in range(len(tokens)):
        groups = [slice(None)] if norm == "batch_layer" else [slice(b, b + 1) for b in range(tokens.shape[1])]
        for images in groups if norm != "layer" else ():
            for channel in range(tokens.shape[3]):
                values = tokens[k, images, :, channel]
                tokens[k, images, :, channel] = (values - values.mean()) / np.sqrt(values.var() + standardise_eps)
    return layer_norm(tokens, eps)


def pixel_target(images_u8, masked, patch, mean, std, norm, unbiased, eps):
    """Return the masked patches of images uint8 [B, 3, H, W], masked [B, M]: [B, M, patch * patch * 3].

    A patch is in (row, column, channel) order.
    """
    pixels = (images_u8.astype(float) / 255 - np.reshape(mean, (1, 3, 1, 1))) / np.reshape(std, (1, 3, 1, 1))
    columns = images_u8.shape[3] // patch
    rows = []
    for image, indices in zip(pixels, masked, strict=True):
        for index in indices:
            top, left = (index // columns) * patch, (index % columns) * patch
            tile = image[:, top : top + patch, left : left + patch].transpose(1, 2, 0)
            if norm != "none":
                over = (0, 1) if norm == "per_channel" else (0, 1, 2)
                tile = tile - tile.mean(over, keepdims=True)
                tile = tile / np.sqrt(tile.var(over, ddof=int(unbiased), keepdims=True) + eps)
            rows.append(tile.reshape(-1))
    return np.stack(rows).reshape(*masked.shape, -1)
