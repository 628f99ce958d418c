"""Pretraining model: an encoder of the visible patches, and branches that supervise its taps.

MAE, D-MAE, DS-MAE, DDS-MAE and DDAE are lists of branches, not subclasses. Shape letters: B images, V visible patches,
P values of a patch, K taps.
"""

from typing import NamedTuple

import ddae_kernels as dk
import torch
from jaxtyping import Float, Int64, UInt8
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
    """The loss to differentiate, without the betas' regulariser (betas.py), and its parts by branch.

    total is the micro-batch's share of the step's loss: its sum over the micro-batches of a step is the step's mean.
    """

    total: Float[Tensor, ""]
    branches: dict[str, dk.DynamicLoss]

    def metrics(self) -> list[Tensor]:
        """Return the values of PretrainModel.metric_names(): per branch the loss [K] and mean error [K] of its taps."""
        return [part for each in self.branches.values() for part in (each.tap_loss, each.token_error.mean((1, 2)))]


class PretrainModel(nn.Module):
    """Encoder and branches: forward(Inputs) -> Losses (paper Eq. 6 without the norm of the weights)."""

    def __init__(self, encoder: Encoder, branches: dict[str, Branch], normalisation: str, use_mask_token: bool = False):
        """use_mask_token: the encoder sees a mask token for each masked patch (BEiT), not the visible patches alone."""
        super().__init__()
        self.encoder = encoder
        self.branches = nn.ModuleDict(branches)
        self.normalisation = normalisation
        self.normed_blocks = tuple(sorted({block for branch in branches.values() for block in branch.normed_blocks}))
        raw_blocks = {block for branch in branches.values() for block in branch.raw_blocks}
        self.used_blocks = tuple(sorted(raw_blocks.union(self.normed_blocks)))
        self.mask_token = nn.Parameter(torch.empty(1, 1, encoder.shape.width)) if use_mask_token else None

    def encode(
        self,
        images: UInt8[Tensor, "B 3 H W"],
        visible: Int64[Tensor, "B V"],
        patches: Float[Tensor, "B _ P"] | None = None,
    ) -> Tokens:
        """Return the tokens of all blocks that a branch uses. patches: used instead of the images; see Inputs."""
        if patches is None:
            pixels = normalise(images, self.normalisation, self.encoder.cls_token.dtype)
        else:
            pixels = patches[:, : visible.shape[1]]
        tokens = self.encoder(pixels, layers=self.used_blocks, visible=visible, mask_token=self.mask_token)
        raw = dict(zip(self.used_blocks, tokens, strict=True))
        normed = self.encoder.norm(torch.stack([raw[block] for block in self.normed_blocks]))
        return Tokens(raw, dict(zip(self.normed_blocks, normed, strict=True)))

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
    """Return the model of an experiment, initialised from train.seed."""
    model = build_uninitialised_model(config)
    initialise(model, torch.Generator().manual_seed(config.train.seed), config.model.init)
    return model


def build_uninitialised_model(config: PretrainConfig) -> PretrainModel:
    """Return the model of an experiment without setting its parameters."""
    shape = config.model

    def decoder_args(branch: PixelConfig | FeatureConfig, out_width: int, context: int) -> tuple:
        """Return the positional arguments of a DecoderBranch."""
        decoder = Decoder(
            *(shape.width, branch.decoder_width, branch.decoder_depth, branch.decoder_heads, out_width),
            *(config.grid, shape.positions),
            num_tap_heads=len(branch.taps) if branch.per_tap_head else 1,
            cross_attention=branch.cross_attention,
        )
        decoder.visible_positions = branch.decoder_positions == "all"
        norms = [LayerNorm(shape.width) for _ in branch.taps[:-1]] if branch.per_tap_norm else []
        taps = branch.taps, branch.tap_weights, config.dynamic.rescale_grad
        return decoder, *taps, norms, context if branch.cross_attention else None

    branches: dict[str, Branch] = {}
    if config.pixel.enabled:
        branches["pixel"] = PixelBranch(
            *decoder_args(config.pixel, shape.patch_size**2 * 3, context=1),
            patch=shape.patch_size,
            norm=config.pixel.norm,
            normalisation=config.data.normalisation,
        )
    if config.feature.enabled:
        branches["feature"] = FeatureBranch(
            *decoder_args(config.feature, shape.width, context=0), target_norm=config.feature.target_norm
        )
    encoder = Encoder(shape)
    if config.token.enabled:
        token = config.token
        token_branch = TokenBranch(shape.width, token.codes, token.taps, token.tap_weights, config.dynamic.rescale_grad)
        branches["token"] = token_branch
        if token.cls:
            branches["cls"] = ClsBranch(encoder, token_branch, token.cls_block, token.cls_depth)
    names = beta_names(config)
    for name in config.branches:
        branch = branches[name]
        if config.branches[name].dynamic:
            prefix = "" if config.dynamic.shared else f"{name}/"
            branch.beta_indices = tuple(names.index(f"{prefix}{tap_name(tap)}") for tap in branch.taps)
    model = PretrainModel(encoder, branches, config.data.normalisation, config.mask.use_mask_token)
    _apply_engine_settings(model, config)
    return model


def _apply_engine_settings(model: PretrainModel, config: PretrainConfig) -> None:
    """Apply the settings that change speed and memory, not the results."""
    engine = config.engine
    for module in model.modules():
        if isinstance(module, Encoder | Decoder | ClsBranch):
            module.activation_checkpointing = engine.activation_checkpointing or (
                engine.decoder_activation_checkpointing and isinstance(module, Decoder)
            )
            for submodule in module.modules():
                if isinstance(submodule, Mlp):  # its hooks would replace those of activation checkpointing
                    checkpointed = module.activation_checkpointing
                    submodule.save_gelu_output = checkpointed or engine.tap_execution != "sequential"
        if isinstance(module, Decoder):
            module.skip_unused_tokens = engine.skip_unused_tokens
        if isinstance(module, DecoderBranch):
            module.sequential_backward = engine.tap_execution == "sequential"
