"""What is supervised: a branch decodes some taps of the encoder and compares them with a target.

    PixelBranch     the masked patches' own pixels, normalised patch by patch            (paper Eq. 3)
    FeatureBranch   the teacher's tokens after the same blocks, at the masked patches     (paper Eq. 5)

Shape letters: B images, V visible, M masked, K taps of the branch, D width, P numbers of a patch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import ddae_kernels as dk
import torch
from torch import Tensor, nn

from ddae.masks import Mask
from ddae.model.decoder import Decoder
from ddae.patches import NORMALISATIONS, constant


class Inputs(NamedTuple):
    """What a step gives to every branch; a branch takes what it needs."""

    images: Tensor  # uint8 [B, 3, H, W]
    mask: Mask
    distance: Tensor  # float32 [B, M]: of masked patches to the nearest visible one
    betas: Tensor  # float32: all betas of the method
    teacher_tokens: Tensor | None  # [K, B, M, D]: after the feature branch's taps, at masked patches
    feature_weight: Tensor  # float32 []: the feature branch's ramp, 0 to 1
    share: float  # 1 / micro-batches of a step, taken within the loss: its gradient needs no scaling afterwards
    kernels: str  # implementation of the loss: auto, reference or triton


class Branch(nn.Module):
    """A decoder, the taps it reads, their weights, and which of the method's betas weigh their patches."""

    def __init__(self, decoder: Decoder, taps: Sequence[int], tap_weights: Sequence[float], rescale_grad: str):
        super().__init__()
        self.decoder = decoder
        self.taps = tuple(taps)
        self.tap_weights = tuple(tap_weights)
        self.rescale_grad = rescale_grad
        self.beta_places: tuple[int, ...] = ()  # one a tap; empty: every patch weighs the same

    def predict(self, taps: list[Tensor], mask: Mask) -> Tensor:
        """K tensors [B, 1 + V, D] -> [K, B, M, P], all taps in one batch through the decoder."""
        num_taps = len(taps)
        decoded = self.decoder(torch.cat(taps), mask.visible.repeat(num_taps, 1), mask.masked.repeat(num_taps, 1))
        return decoded.unflatten(0, (num_taps, -1))

    def weights(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """beta [K] and tap weight [K]. A branch that is not dynamic has beta 0: all weights are exactly 1."""
        tap_weight = constant(tuple(inputs.share * weight for weight in self.tap_weights), inputs.betas.device)
        if not self.beta_places:
            return torch.zeros_like(tap_weight), tap_weight
        return torch.stack([inputs.betas[place] for place in self.beta_places]), tap_weight

    def forward(self, taps: list[Tensor], inputs: Inputs) -> dk.DynamicLoss:
        raise TypeError("a branch says in its own forward what its target is")


class PixelBranch(Branch):
    def __init__(self, decoder: Decoder, taps, tap_weights, rescale_grad, patch: int, norm: str, normalisation: str):
        super().__init__(decoder, taps, tap_weights, rescale_grad)
        self.patch, self.norm = patch, norm
        self.mean, self.std = NORMALISATIONS[normalisation]

    def forward(self, taps: list[Tensor], inputs: Inputs) -> dk.DynamicLoss:
        beta, tap_weight = self.weights(inputs)
        return dk.dynamic_pixel_mse(
            self.predict(taps, inputs.mask),
            inputs.images,
            inputs.mask.masked,
            inputs.distance,
            beta,
            tap_weight,
            patch=self.patch,
            mean=self.mean,
            std=self.std,
            norm=self.norm,
            rescale_grad=self.rescale_grad,
            impl=inputs.kernels,
        )


class FeatureBranch(Branch):
    def forward(self, taps: list[Tensor], inputs: Inputs) -> dk.DynamicLoss:
        if inputs.teacher_tokens is None:
            raise ValueError("the feature branch needs the teacher's tokens")
        beta, tap_weight = self.weights(inputs)
        return dk.dynamic_feature_mse(
            self.predict(taps, inputs.mask),
            inputs.teacher_tokens,
            inputs.distance,
            beta,
            tap_weight * inputs.feature_weight,
            rescale_grad=self.rescale_grad,
            impl=inputs.kernels,
        )
