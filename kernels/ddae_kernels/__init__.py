"""The deep dynamic loss of masked image modelling, as a plug-in for any training code."""

from ddae_kernels.distance import patch_distance
from ddae_kernels.dynamic import (
    DynamicLoss,
    distance_weights,
    dynamic_error,
    dynamic_feature_mse,
    dynamic_mse,
    dynamic_pixel_mse,
    weight_norm,
)

__all__ = [
    "DynamicLoss",
    "distance_weights",
    "dynamic_error",
    "dynamic_feature_mse",
    "dynamic_mse",
    "dynamic_pixel_mse",
    "patch_distance",
    "weight_norm",
]
