"""AdamW's parameter groups: weight decay, learning rates by layer. The betas have their own optimizer (betas.py)."""

import re
from typing import Protocol

import torch
from torch import Tensor, nn

from ddae.config.base import OptimConfig


class Optimizable(Protocol):
    """A module with its optimizer: an Engine, or something smaller."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def device(self) -> torch.device: ...

    def backward(self, loss: Tensor) -> None:
        """Compute gradients of one micro-batch, whose loss [] is its share of the step's."""

    def step(self, lr: float) -> Tensor:
        """End a micro-batch; after the last one of a step update the weights.

        Return float32 [], on the device: 1 if the weights were updated, 0 if a gradient was non-finite.
        """
        ...


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW with decoupled weight decay on matrices.

    Biases, norms, cls and mask tokens, and learned positions are exempt; mask tokens decay if config.decay_mask_tokens.
    """
    decayed, exempt = [], []
    for name, parameter in module.named_parameters():
        tokens = ("cls_token", "pos_embed") if config.decay_mask_tokens else ("cls_token", "pos_embed", "mask_token")
        is_token = name.endswith(tokens)
        (exempt if parameter.ndim <= 1 or is_token else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.adam_betas, fused=True)


def build_layerwise_optimizer(
    module: nn.Module, depth: int, layer_decay: float, config: OptimConfig
) -> torch.optim.AdamW:
    """Return AdamW with a learning rate for each layer of a module that contains an encoder."""
    groups = layer_groups(module, depth, layer_decay, config.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.adam_betas, fused=True)


def layer_groups(module: nn.Module, depth: int, layer_decay: float, weight_decay: float) -> list[dict]:
    """Return parameter groups by layer, whose `lr_scale` is layer_decay ^ (depth + 1 - layer).

    Biases, norms, cls token and positions are exempt from weight decay.
    """
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in module.named_parameters():
        is_token = name.endswith(("cls_token", "reg_token", "pos_embed"))
        layer, decayed = layer_of(name, depth), parameter.ndim > 1 and not is_token
        scale = layer_decay ** (depth + 1 - layer)
        empty = {"params": [], "weight_decay": weight_decay * decayed, "lr_scale": scale}
        groups.setdefault((layer, decayed), empty)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def layer_of(name: str, depth: int) -> int:
    """Return the layer of a parameter: 0 for embeddings, I for block I (from 1), depth + 1 for the rest (BEiT)."""
    name = name.removeprefix("encoder.")
    if name.startswith(("cls_token", "reg_token", "pos_embed", "patch_embed")):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1
