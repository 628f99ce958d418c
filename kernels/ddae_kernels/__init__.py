"""Distance-weighted losses for masked image modelling (DDAE), independent of the rest of the project."""

from ddae_kernels.distance import patch_distance
from ddae_kernels.dynamic import (
    DynamicLoss,
    distance_weights,
    dynamic_error,
    dynamic_feature_mse,
    dynamic_mse,
    dynamic_pixel_mse,
    weight_norm,
    weight_norm_and_slope,
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
    "weight_norm_and_slope",
]
