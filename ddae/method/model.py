"""A method: an encoder that sees the visible patches, and branches that supervise its taps.

MAE, D-MAE, DS-MAE, DDS-MAE and DDAE are lists of branches, not subclasses. Shape letters: B images, V visible,
M masked, K taps, D width.
"""

from typing import NamedTuple

import ddae_kernels as dk
import torch
from torch import Tensor, nn

from ddae.config.pretrain import FeatureConfig, PixelConfig, PretrainConfig, beta_names, tap_name
from ddae.method.branches import (
    Branch,
    ClsBranch,
    DecoderBranch,
    FeatureBranch,
    Inputs,
    PixelBranch,
    TokenBranch,
    Tokens,
)
from ddae.models.decoder import Decoder
from ddae.models.patches import normalise
from ddae.models.vit import Encoder, LayerNorm, Mlp, initialise


class Losses(NamedTuple):
    """The loss to differentiate (the betas' own regulariser is added by betas.py), and its parts by branch.

    total is a share of the step's loss: summed over the micro-batches of a step it is their mean.
    """

    total: Tensor
    branches: dict[str, dk.DynamicLoss]

    def metrics(self) -> list[Tensor]:
        """Return the values of PretrainModel.metric_names(): two vectors [K] a branch, loss and mean error of each tap."""
        return [part for each in self.branches.values() for part in (each.tap_loss, each.token_error.mean((1, 2)))]


class PretrainModel(nn.Module):
    """encoder + branches: forward(Inputs) -> Losses (paper Eq. 6 without the norm of the weights)."""

    def __init__(self, encoder: Encoder, branches: dict[str, Branch], normalisation: str, use_mask_token: bool = False):
        super().__init__()
        self.encoder = encoder
        self.branches = nn.ModuleDict(branches)
        self.normalisation = normalisation
        self.normed = tuple(sorted({block for branch in branches.values() for block in branch.reads}))
        raw = {block for branch in branches.values() for block in branch.reads_raw}
        self.blocks_read = tuple(sorted(raw.union(self.normed)))
        self.mask_token = nn.Parameter(torch.empty(1, 1, encoder.shape.width)) if use_mask_token else None

    def encode(self, images: Tensor, visible: Tensor, patches: Tensor | None = None) -> Tokens:
        """uint8 images -> the tokens of all blocks that a branch reads. patches: as in Inputs."""
        if patches is None:
            pixels = normalise(images, self.normalisation, self.encoder.cls_token.dtype)
        else:
            pixels = patches[:, : visible.shape[1]]
        tokens = self.encoder(pixels, layers=self.blocks_read, visible=visible, mask_token=self.mask_token)
        raw = dict(zip(self.blocks_read, tokens, strict=True))
        normed = self.encoder.norm(torch.stack([raw[block] for block in self.normed]))
        return Tokens(raw, dict(zip(self.normed, normed, strict=True)))

    def metric_names(self) -> list[str]:
        """Return loss/BRANCH/TAP and error/BRANCH/TAP of all branches, in the order of Losses.metrics()."""
        return [
            f"{kind}/{name}/{tap_name(tap)}"
            for name, branch in self.branches.items()
            for kind in ("loss", "error")
            for tap in branch.taps  # type: ignore[union-attr]
        ]

    def forward(self, inputs: Inputs) -> Losses:
        tokens = self.encode(inputs.images, inputs.mask.visible, inputs.patches)
        losses = {name: branch(tokens, inputs) for name, branch in self.branches.items()}
        return Losses(torch.stack([result.loss for result in losses.values()]).sum(), losses)


def build_model(config: PretrainConfig) -> PretrainModel:
    """The whole method of this experiment, initialised from train.seed."""
    method = construct_model(config)
    initialise(method, torch.Generator().manual_seed(config.train.seed), config.model.init)
    return method


def construct_model(config: PretrainConfig) -> PretrainModel:
    """The method with its parameters not yet set."""
    model = config.model

    def decoding(branch: PixelConfig | FeatureConfig, out_width: int, context: int) -> tuple:
        """The arguments that a DecoderBranch is built from."""
        shape = branch.decoder_width, branch.decoder_depth, branch.decoder_heads
        heads = len(branch.taps) if branch.per_tap_head else 1
        crosses = branch.cross_attention
        decoder = Decoder(model.width, *shape, out_width, config.grid, model.positions, heads, crosses)
        decoder.places_visible = branch.decoder_positions == "all"
        norms = [LayerNorm(model.width) for _ in branch.taps[:-1]] if branch.per_tap_norm else []
        arguments = branch.taps, branch.tap_weights, config.dynamic.rescale_grad
        return decoder, *arguments, norms, context if crosses else None

    branches: dict[str, Branch] = {}
    if config.pixel.enabled:
        branches["pixel"] = PixelBranch(
            *decoding(config.pixel, model.patch_size**2 * 3, context=1),
            patch=model.patch_size,
            norm=config.pixel.norm,
            normalisation=config.data.normalisation,
        )
    if config.feature.enabled:
        branches["feature"] = FeatureBranch(
            *decoding(config.feature, model.width, context=0), target_norm=config.feature.target_norm
        )
    encoder = Encoder(model)
    if config.token.enabled:
        token = config.token
        branches["token"] = told = TokenBranch(
            model.width, token.codes, token.taps, token.tap_weights, config.dynamic.rescale_grad
        )
        if token.cls:
            branches["cls"] = ClsBranch(encoder, told, token.cls_block, token.cls_depth)
    names = beta_names(config)
    for name in config.branches:
        branch = branches[name]
        if config.branches[name].dynamic:
            prefix = "" if config.dynamic.shared else f"{name}/"
            branch.beta_places = tuple(names.index(f"{prefix}{tap_name(tap)}") for tap in branch.taps)
    method = PretrainModel(encoder, branches, config.data.normalisation, config.mask.use_mask_token)
    _set_up(method, config)
    return method


def _set_up(method: PretrainModel, config: PretrainConfig) -> None:
    """How the modules work; what they compute stays the same."""
    engine = config.engine
    for module in method.modules():
        if isinstance(module, Encoder | Decoder | ClsBranch):
            module.activation_checkpointing = engine.activation_checkpointing or (
                engine.decoder_activation_checkpointing and isinstance(module, Decoder)
            )
            for part in module.modules():
                if isinstance(part, Mlp):  # within a block that is run again its hooks would keep more, not less
                    part.keeps_gelu = module.activation_checkpointing or engine.tap_execution != "sequential"
        if isinstance(module, Decoder):
            module.enter_once = module.leave_masked = engine.skip_unused_tokens
        if isinstance(module, DecoderBranch):
            module.sequential_backward = engine.tap_execution == "sequential"
