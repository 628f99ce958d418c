"""A method: an encoder that sees the visible patches, and branches that supervise its taps.

MAE, D-MAE, DS-MAE, DDS-MAE and DDAE are lists of branches, not subclasses. Shape letters: B images, V visible,
M masked, K taps, D width.
"""

from typing import NamedTuple

import ddae_kernels as dk
import torch
from torch import Tensor, nn

from ddae.branches import Branch, FeatureBranch, Inputs, PixelBranch
from ddae.config import Config, beta_names, tap_name
from ddae.model.decoder import Decoder
from ddae.model.vit import Encoder, initialise
from ddae.patches import normalise


class Losses(NamedTuple):
    """The loss to differentiate (the betas' own regulariser is added by betas.py), and its parts by branch.

    total is a share of the step's loss: summed over the micro-batches of a step it is their mean.
    """

    total: Tensor
    branches: dict[str, dk.DynamicLoss]


class Method(nn.Module):
    """encoder + branches: forward(Inputs) -> Losses (paper Eq. 6 without the norm of the weights)."""

    def __init__(self, encoder: Encoder, branches: dict[str, Branch], normalisation: str):
        super().__init__()
        self.encoder = encoder
        self.branches = nn.ModuleDict(branches)
        self.normalisation = normalisation
        self.taps = tuple(sorted({tap for branch in branches.values() for tap in branch.taps}))

    def encode(self, images: Tensor, visible: Tensor) -> dict[int, Tensor]:
        """uint8 images -> {tap: [B, 1 + V, D]}: each tap's tokens under the encoder's own final norm."""
        pixels = normalise(images, self.normalisation, self.encoder.cls_token.dtype)
        tokens = self.encoder(pixels, layers=self.taps, visible=visible)
        normed = self.encoder.norm(torch.stack(tokens))
        return dict(zip(self.taps, normed, strict=True))

    def forward(self, inputs: Inputs) -> Losses:
        tokens = self.encode(inputs.images, inputs.mask.visible)
        losses = {
            name: branch([tokens[tap] for tap in branch.taps], inputs)  # type: ignore[index]
            for name, branch in self.branches.items()
        }
        return Losses(torch.stack([result.loss for result in losses.values()]).sum(), losses)


def build_method(config: Config) -> Method:
    """The whole method of this experiment, initialised from train.seed."""
    method = assemble(config)
    initialise(method, torch.Generator().manual_seed(config.train.seed))
    return method


def assemble(config: Config) -> Method:
    """The method with its parameters not yet set."""
    model = config.model

    def decoder(branch, out_width: int) -> Decoder:
        shape = branch.decoder_width, branch.decoder_depth, branch.decoder_heads
        return Decoder(model.width, *shape, out_width, config.grid, model.positions)

    branches: dict[str, Branch] = {}
    if config.pixel.enabled:
        pixel = config.pixel
        branches["pixel"] = PixelBranch(
            decoder(pixel, model.patch_size**2 * 3),
            *(pixel.taps, pixel.tap_weights, config.dynamic.rescale_grad),
            patch=model.patch_size,
            norm=pixel.norm,
            normalisation=config.data.normalisation,
        )
    if config.feature.enabled:
        feature = config.feature
        branches["feature"] = FeatureBranch(
            decoder(feature, model.width), feature.taps, feature.tap_weights, config.dynamic.rescale_grad
        )
    names = beta_names(config)
    for name, branch in branches.items():
        if getattr(config, name).dynamic:
            prefix = "" if config.dynamic.shared else f"{name}/"
            branch.beta_places = tuple(names.index(f"{prefix}{tap_name(tap)}") for tap in branch.taps)
    method = Method(Encoder(config.model), branches, config.data.normalisation)
    for module in (method.encoder, *(branch.decoder for branch in branches.values())):
        module.recompute = config.engine.recompute
    return method
