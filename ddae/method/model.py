"""Pretraining model: an encoder of the visible patches, and branches that supervise its taps.

MAE, D-MAE, DS-MAE, DDS-MAE and DDAE are lists of branches, not subclasses. Shape letters: B images, V visible patches,
P values of a patch, K taps.
"""

from typing import NamedTuple

import ddae_kernels as dk
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from ddae.config.pretrain import PretrainConfig, beta_names, tap_name
from ddae.method.branches import Branch, ClsBranch, FeatureBranch, Inputs, PixelBranch, TokenBranch, Tokens
from ddae.models.decoder import Decoder
from ddae.models.patches import normalise
from ddae.models.vit import Block, Encoder, Mlp, initialise


class Losses(NamedTuple):
    """The loss to differentiate, without the betas' regulariser (betas.py), and its parts by branch.

    total is the micro-batch's share of the step's loss: its sum over the micro-batches of a step is the step's mean.
    """

    total: Float[Tensor, ""]
    branches: dict[str, dk.DynamicLoss]
    tokens: dict[int, Float[Tensor, "B T D"]]  # by encoder block, before any norm, without gradient

    def metrics(self) -> list[Tensor]:
        """Return the values of PretrainModel.metric_names(): per branch the loss [K] and mean error [K] of its taps."""
        return [part for each in self.branches.values() for part in (each.tap_loss, each.token_error.mean((1, 2)))]


class PretrainModel(nn.Module):
    """Encoder and branches: forward(Inputs) -> Losses (paper Eq. 6 without the norm of the weights)."""

    def __init__(self, encoder: Encoder, branches: dict[str, Branch], normalisation: str, use_mask_token: bool = False):
        """use_mask_token: the encoder sees a mask token for each masked patch (BEiT), not the visible patches alone."""
        super().__init__()
        self.encoder, self.branches, self.normalisation = encoder, nn.ModuleDict(branches), normalisation
        self.normed_blocks = tuple(sorted({block for branch in branches.values() for block in branch.normed_blocks}))
        raw_blocks = {block for branch in branches.values() for block in branch.raw_blocks}
        self.used_blocks = tuple(sorted(raw_blocks.union(self.normed_blocks)))
        self.mask_token = nn.Parameter(torch.empty(1, 1, encoder.shape.width)) if use_mask_token else None
        self.taps_per_step = max((getattr(branch, "taps_per_step", 0) for branch in branches.values()), default=0)

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
        detached = {block: each.detach() for block, each in tokens.raw.items()}
        total = torch.stack([result.loss for result in losses.values()]).sum()
        if self.taps_per_step:  # later blocks than the step's taps get gradients of zero, not none
            total = total + 0.0 * tokens.normed[self.normed_blocks[-1]].sum()
        return Losses(total, losses, detached)


def build_model(config: PretrainConfig) -> PretrainModel:
    """Return the model of an experiment, initialised from train.seed."""
    model = build_uninitialised_model(config)
    initialise(model, torch.Generator().manual_seed(config.train.seed), config.model.init)
    return model


def build_uninitialised_model(config: PretrainConfig) -> PretrainModel:
    """Return the model of an experiment without setting its parameters."""
    branches: dict[str, Branch] = {}
    if config.pixel.enabled:
        branches["pixel"] = PixelBranch(config)
    if config.feature.enabled:
        branches["feature"] = FeatureBranch(config)
    encoder = Encoder(config.model)
    if config.token.enabled:
        branches["token"] = token_branch = TokenBranch(config.model.width, config.token, config.dynamic.rescale_grad)
        if config.token.cls:
            branches["cls"] = ClsBranch(encoder, token_branch, config.token)
    names = beta_names(config)
    for name, branch in config.branches.items():
        if branch.dynamic:
            prefix = "" if config.dynamic.shared else f"{name}/"
            branches[name].beta_indices = tuple(names.index(f"{prefix}{tap_name(tap)}") for tap in branch.taps)
    model = PretrainModel(encoder, branches, config.data.normalisation, config.mask.use_mask_token)
    _apply_engine_settings(model, config)
    return model


def _apply_engine_settings(model: PretrainModel, config: PretrainConfig) -> None:
    """Apply the settings that change speed and memory, not the results."""
    engine = config.engine
    set_direct_calls(model, engine.direct_calls)
    for module in model.modules():
        if isinstance(module, Encoder | Decoder | ClsBranch):
            of_decoders = isinstance(module, Decoder) and engine.decoder_activation_checkpointing
            module.activation_checkpointing = engine.activation_checkpointing or of_decoders
            for mlp in (each for each in module.modules() if isinstance(each, Mlp)):
                # Its hooks would replace those of activation checkpointing.
                mlp.save_gelu_output = module.activation_checkpointing or engine.tap_execution != "sequential"


def set_direct_calls(model: nn.Module, direct: bool) -> None:
    """Let transformer blocks call the functions of their submodules, not the submodules with their hooks."""
    for module in model.modules():
        if isinstance(module, Block):
            module.direct_calls = direct
