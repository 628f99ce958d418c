"""An encoder with a linear head, and the learning rates of its layers.

B images, C classes, D width.
"""

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddae.experiment import OptimConfig
from ddae.model.vit import Encoder, LayerNorm


class Classifier(nn.Module):
    """Mean of the patches and a fresh norm, or the cls token and the encoder's norm; then a linear head (BEiT, MAE)."""

    def __init__(self, encoder: Encoder, num_classes: int, pool: str, head_std: float, generator: torch.Generator):
        super().__init__()
        self.encoder, self.pool = encoder, pool
        self.fc_norm = LayerNorm(encoder.shape.width) if pool == "mean" else nn.Identity()
        if pool == "mean":
            encoder.norm = nn.Identity()  # type: ignore[assignment]  # no token is normed but their mean
        self.head = nn.Linear(encoder.shape.width, num_classes)
        nn.init.normal_(self.head.weight, std=head_std, generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, pixels: Tensor, targets: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] -> logits [B, C]; with targets [B, C], whose rows add up to 1, the mean cross-entropy."""
        (tokens,) = self.encoder(pixels, layers=(self.encoder.shape.depth,))
        pooled = tokens[:, 1:].mean(1) if self.pool == "mean" else self.encoder.norm(tokens[:, 0])
        logits = self.head(self.fc_norm(pooled))
        return logits if targets is None else F.cross_entropy(logits.float(), targets)


def layer_of(name: str, depth: int) -> int:
    """0 for what makes tokens, I for block I (counted from 1), depth + 1 for all that comes after (BEiT, BootMAE)."""
    name = name.removeprefix("encoder.")
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1


def layer_groups(module: nn.Module, depth: int, layer_decay: float, weight_decay: float) -> list[dict]:
    """Parameter groups by layer, whose learning rate is layer_decay ^ (depth + 1 - layer) of the step's (`lr_scale`).

    Biases, norms, cls token and positions are exempt from weight decay.
    """
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in module.named_parameters():
        layer, decayed = layer_of(name, depth), parameter.ndim > 1 and not name.endswith(("cls_token", "pos_embed"))
        scale = layer_decay ** (depth + 1 - layer)
        empty = {"params": [], "weight_decay": weight_decay * decayed, "lr_scale": scale}
        groups.setdefault((layer, decayed), empty)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(module: nn.Module, depth: int, layer_decay: float, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW with a learning rate a layer."""
    groups = layer_groups(module, depth, layer_decay, optim.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.adam_betas, fused=True)
