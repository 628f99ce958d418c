"""Naive reference implementation of MAE, its variants and DDAE without options, a direct transcription of the paper.

Tests compare the training step's losses and gradients with it; benchmarks use it as the baseline. Frozen: it is not
optimised, and shares no code with the optimised implementation, except for the parameter names.

Shape letters: B images, N patches, V visible patches, M masked patches, D width, P values of a patch.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ddae.config.pretrain import FeatureConfig, PixelConfig, PretrainConfig

MEAN_AND_STD = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


norm: Any = partial(nn.LayerNorm, eps=1e-6)


def blocks(width: int, depth: int, heads: int) -> nn.ModuleList:
    return nn.ModuleList([Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)])


def gather(tokens: Tensor, places: Tensor) -> Tensor:
    return torch.gather(tokens, 1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class NaiveEncoder(nn.Module):
    def __init__(self, config: PretrainConfig):
        super().__init__()
        model, patches = config.model, config.grid[0] * config.grid[1]
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(3, model.width, kernel_size=model.patch_size, stride=model.patch_size)}
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, model.width))
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", torch.zeros(1, 1 + patches, model.width))
        self.blocks = blocks(model.width, model.depth, model.heads)
        self.norm = norm(model.width)

    def forward(self, pixels: Tensor, visible: Tensor | None = None) -> list[Tensor]:
        """Return the tokens after each block: [B, 3, H, W] -> [B, 1 + V, D], or [B, 1 + N, D] without `visible`."""
        tokens = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        tokens = tokens + self.pos_embed[:, 1:].to(tokens.dtype)
        if visible is not None:
            tokens = gather(tokens, visible)
        cls = (self.cls_token + self.pos_embed[:, :1].to(tokens.dtype)).expand(len(tokens), -1, -1)
        tokens = torch.cat([cls, tokens], dim=1)
        outputs = []
        for block in self.blocks:
            tokens = block(tokens)
            outputs.append(tokens)
        return outputs


class NaiveDecoder(nn.Module):
    def __init__(self, config: PretrainConfig, branch: PixelConfig | FeatureConfig, out_width: int):
        super().__init__()
        width, patches = branch.decoder_width, config.grid[0] * config.grid[1]
        self.embed = nn.Linear(config.model.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", torch.zeros(1, 1 + patches, width))
        self.blocks = blocks(width, branch.decoder_depth, branch.decoder_heads)
        self.norm = norm(width)
        self.head = nn.Linear(width, out_width)

    def forward(self, tokens: Tensor, restore: Tensor) -> Tensor:
        """Predict all patches: tokens [B, 1 + V, D], restoring permutation int64 [B, N] -> [B, N, P]."""
        tokens = self.embed(tokens)
        mask_tokens = self.mask_token.expand(len(tokens), restore.shape[1] + 1 - tokens.shape[1], -1)
        patches = gather(torch.cat([tokens[:, 1:], mask_tokens], dim=1), restore)
        tokens = torch.cat([tokens[:, :1], patches], dim=1) + self.pos_embed.to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens))[:, 1:]


class NaiveBranch(nn.Module):
    def __init__(self, config: PretrainConfig, branch: PixelConfig | FeatureConfig, out_width: int):
        super().__init__()
        self.decoder = NaiveDecoder(config, branch, out_width)


class NaiveMethod(nn.Module):
    """Return the loss []: forward(images uint8 [B, 3, H, W], visible [B, V], masked [B, M], distance [B, M], betas,
    teacher's tokens after each block, weight of the feature branch)."""

    def __init__(self, config: PretrainConfig):
        super().__init__()
        self.config = config
        if config.mask.neighbour_weight or config.feature.target_norm not in ("layer", "instance_layer"):
            raise ValueError("naive.py knows neither mask.neighbour_weight nor the other target norms")
        self.encoder = NaiveEncoder(config)
        branches = {}
        if config.pixel.enabled:
            branches["pixel"] = NaiveBranch(config, config.pixel, config.model.patch_size**2 * 3)
        if config.feature.enabled:
            branches["feature"] = NaiveBranch(config, config.feature, config.model.width)
        self.branches = nn.ModuleDict(branches)

    def forward(
        self,
        images: Tensor,
        visible: Tensor,
        masked: Tensor,
        distance: Tensor,
        betas: Tensor,
        teacher_tokens: list[Tensor] | None,
        feature_weight: float,
    ) -> Tensor:
        config = self.config
        pixels = to_pixels(images, config.data.normalisation)
        tokens = self.encoder(pixels.to(self.encoder.cls_token.dtype), visible)
        restore = torch.argsort(torch.cat([visible, masked], dim=1), dim=1)
        loss, wide = torch.zeros((), device=images.device), torch.promote_types(distance.dtype, torch.float32)
        for name, branch in (("pixel", config.pixel), ("feature", config.feature)):
            if not branch.enabled:
                continue
            for k, (tap, tap_weight) in enumerate(zip(branch.taps, branch.tap_weights, strict=True)):
                prediction = self.branches[name].decoder(self.encoder.norm(tokens[tap - 1]), restore)  # type: ignore[union-attr]
                prediction = prediction.to(wide)
                if name == "pixel":
                    target = pixel_target(pixels, config.model.patch_size, config.pixel.norm)
                    weight = tap_weight
                else:
                    assert teacher_tokens is not None
                    target = teacher_tokens[tap - 1][:, 1:].to(wide)
                    if branch.target_norm == "instance_layer":  # type: ignore[union-attr]
                        hidden = gather(target, masked)
                        deviation = (hidden.var(dim=1, keepdim=True, unbiased=False) + 1e-5) ** 0.5
                        target = (target - hidden.mean(dim=1, keepdim=True)) / deviation
                    target = F.layer_norm(target, (config.model.width,), eps=1e-6)
                    prediction = F.layer_norm(prediction, (config.model.width,), eps=1e-6)
                    weight = feature_weight * tap_weight
                error = ((prediction - target) ** 2).mean(dim=-1).gather(1, masked)
                if branch.dynamic:
                    power = distance ** betas[k]
                    error = torch.exp(power - power.max(dim=1, keepdim=True).values) * error
                loss = loss + weight * error.mean()
        return loss


def to_pixels(images: Tensor, normalisation: str) -> Tensor:
    mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in MEAN_AND_STD[normalisation])
    return (images.float() / 255 - mean) / std


def pixel_target(pixels: Tensor, patch: int, normalised: str) -> Tensor:
    """Return the normalised patches: [B, 3, H, W] -> [B, N, P]."""
    batch, _, height, width = pixels.shape
    patches = pixels.reshape(batch, 3, height // patch, patch, width // patch, patch)
    patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch, 3)
    if normalised == "per_channel":
        mean, variance = patches.mean(dim=2, keepdim=True), patches.var(dim=2, keepdim=True, unbiased=False)
        patches = (patches - mean) / (variance + 1e-5) ** 0.5
    elif normalised == "joint":
        mean, variance = patches.mean(dim=(2, 3), keepdim=True), patches.var(dim=(2, 3), keepdim=True)
        patches = (patches - mean) / (variance + 1e-6) ** 0.5
    return patches.flatten(2)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: Iterable[tuple[str, Tensor]], momentum: float) -> None:
    """Update every parameter: teacher <- momentum * teacher + (1 - momentum) * student."""
    averages = dict(teacher.named_parameters())
    for name, values in student:
        averages[name].mul_(momentum).add_(values.float(), alpha=1 - momentum)
