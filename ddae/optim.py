"""Parameter groups of the encoder and the decoders; the betas have their own optimizer (betas.py)."""

import torch
from torch import nn

from ddae.experiment import OptimConfig


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with decoupled decay on matrices only: biases, norms, cls and mask tokens are exempt; mask tokens are not
    where config.decay_mask_tokens."""
    decayed, exempt = [], []
    for name, parameter in module.named_parameters():
        is_token = name.endswith("cls_token" if config.decay_mask_tokens else ("cls_token", "mask_token"))
        (exempt if parameter.ndim <= 1 or is_token else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.adam_betas, fused=True)
