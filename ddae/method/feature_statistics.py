"""Label-free statistics of features and of the feature branch's targets, by which a collapse shows.

Shape letters: n vectors, B images, P patches of an image (all, visible or masked ones), N patches of the grid, D width.
Leading dimensions `..` are separate sets.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

MAX_IMAGES = 256  # of a micro-batch, for statistics over images
PATCH_IMAGES, PATCHES = 32, 16  # images, and patches of each, for statistics over patches
TARGET_IMAGES = 16  # of a micro-batch, for the shares of the targets that trivial predictors explain


def effective_rank(features: Float[Tensor, "n D"]) -> Float[Tensor, ""]:
    """Return the exponential of the entropy of the normalised singular values (RankMe, Garrido et al. 2023).

    From 1, if all features are collinear, to min(n, D). The features are not centred.
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum() + 1e-7
    return torch.exp(-(shares * shares.log()).sum()).float()


def participation_ratio(features: Float[Tensor, "*sets n D"]) -> Float[Tensor, "*sets"]:
    """Return the effective rank of the covariance as its participation ratio, (sum l)^2 / sum l^2 of its eigenvalues l.

    From 1, if the features vary along one line, to min(n - 1, D). It needs one matrix product and no decomposition.
    NaN if all features are equal.
    """
    centred = features - features.mean(-2, keepdim=True)
    products = centred.mT @ centred if features.shape[-1] < features.shape[-2] else centred @ centred.mT
    return centred.square().sum((-2, -1)).square() / products.square().sum((-2, -1))


def feature_std(features: Float[Tensor, "*sets n D"]) -> Float[Tensor, "*sets"]:
    """Return the standard deviation over the features, averaged over the dimensions.

    Each feature is scaled to norm sqrt(D) first: 1 for isotropic features, 0 if all are equal.
    """
    unit = F.normalize(features, dim=-1) * features.shape[-1] ** 0.5
    centred = unit - unit.mean(-2, keepdim=True)  # faster on a CPU than std(-2)
    return (centred.square().sum(-2) / (unit.shape[-2] - 1)).sqrt().mean(-1)


def token_statistics(tokens: Float[Tensor, "K B P D"]) -> dict[str, Float[Tensor, " K"]]:
    """Return participation ratio and standard deviation over patches and over images' mean patches, by tap.

    The first MAX_IMAGES images are used; over patches, PATCHES spread evenly over each of the first PATCH_IMAGES.
    """
    images = tokens[:, :MAX_IMAGES].float().mean(2)
    num_patches = tokens.shape[2]
    chosen = torch.arange(min(PATCHES, num_patches), device=tokens.device) * num_patches // min(PATCHES, num_patches)
    patches = tokens[:, :PATCH_IMAGES, chosen].float().flatten(1, 2)
    return {
        "patch_rank": participation_ratio(patches),
        "patch_std": feature_std(patches),
        "image_rank": participation_ratio(images),
        "image_std": feature_std(images),
    }


def explained_shares(
    targets: Float[Tensor, "K B P D"], positions: Int64[Tensor, "B P"], num_positions: int
) -> dict[str, Float[Tensor, " K"]]:
    """Return the share of the targets' mean square that three trivial predictors explain, by tap.

    constant: the mean of all targets. position: the mean of the targets at the same position of the grid. image: the
    mean of the targets of the same image. The estimates are unbiased: products of different images, of different images
    at the same position, and of different patches of an image. A share is NaN if there are no such pairs.
    """
    num_images, num_patches = positions.shape
    square = targets.square().sum(-1)  # [K, B, P]
    sums = targets.sum(2)  # over an image's patches: [K, B, D]
    image = sums.square().sum(-1) - square.sum(-1)  # [K, B]: over pairs of different patches
    constant = sums.sum(1).square().sum(-1) - sums.square().sum((1, 2))  # [K]: over pairs of different images
    flat = positions.flatten()
    at_position = targets.new_zeros(len(targets), num_positions, targets.shape[-1])
    at_position.index_add_(1, flat, targets.flatten(1, 2))
    squares = targets.new_zeros(len(targets), num_positions).index_add_(1, flat, square.flatten(1))
    counts = torch.zeros(num_positions, device=targets.device).index_add_(0, flat, torch.ones_like(flat).float())
    pairs = at_position.square().sum(-1) - squares  # [K, N]: over pairs of different images at a position
    repeated = counts > 1
    position = (pairs * repeated / (counts - 1).clamp(min=1)).sum(-1) / (counts * repeated).sum()
    mean_square = square.mean((1, 2))
    return {
        "constant": constant / (num_images * (num_images - 1) * num_patches**2) / mean_square,
        "position": position / mean_square,
        "image": image.mean(1) / (num_patches * (num_patches - 1)) / mean_square,
    }
