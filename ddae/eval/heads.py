"""Linear heads on frozen features, as many as wanted, each trained as if it were alone.

Batch norm without affine, then a linear layer (MAE's probe); LARS. H heads, B images, C classes, D width.
"""

from typing import Any

import torch
from timm.optim.lars import Lars
from torch import Tensor, nn
from torch.nn import functional as F

from ddae.distributed import mean_over_ranks
from ddae.slices import Fragment

EPS = 1e-6  # of the batch norm
KEPT = 0.9  # of the norm's running mean and variance, a micro-batch


class Heads(nn.Module):
    """Forward: features float32 [H, B, D] -> logits [H, B, C]."""

    def __init__(self, count: int, width: int, num_classes: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.empty(num_classes, width).normal_(std=0.01, generator=generator)
        self.weights = nn.ParameterList([nn.Parameter(weight.clone()) for _ in range(count)])
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(num_classes)) for _ in range(count)])
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("mean", torch.zeros(count * width))
        self.register_buffer("var", torch.ones(count * width))

    def forward(self, features: Tensor) -> Tensor:
        flat = features.transpose(0, 1).flatten(1)  # every feature of every head is normed over the batch
        flat = F.batch_norm(flat, self.mean, self.var, training=self.training, momentum=1 - KEPT, eps=EPS)
        normed = flat.unflatten(1, (len(self.weights), -1)).transpose(0, 1)
        return torch.baddbmm(torch.stack(list(self.biases))[:, None], normed, torch.stack(list(self.weights)).mT)


class Trainer:
    """What updates the heads: LARS on gradients that are the mean over ranks and micro-batches.

    Running means and variances are the mean over the ranks, too: each norms with its own micro-batch, as DDP does.
    """

    sharded = False  # every rank has all of it

    def __init__(self, heads: Heads, momentum: float, weight_decay: float, accumulation: int, device: torch.device):
        self.heads, self.device = heads.to(device), device
        self._accumulation, self._waiting, self._updates = accumulation, accumulation, 0
        groups = [
            {"params": list(heads.weights), "always_adapt": True},
            {"params": list(heads.biases), "always_adapt": False, "weight_decay": 0.0},
        ]
        options: dict[str, Any] = {"momentum": momentum, "weight_decay": weight_decay, "trust_coeff": 0.001}
        self.optimizer = Lars(groups, lr=0.0, **options)
        for parameter in heads.parameters():
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch, whose loss is a share of the step's."""
        loss.backward()

    def update(self, lr: float) -> bool:
        """End a micro-batch; after a step's last one update the heads. Whether they were updated: a gradient that is no
        number, on whichever rank, keeps all as they were."""
        self._waiting -= 1
        if self._waiting:
            return False
        self._waiting = self._accumulation
        parameters = list(self.heads.parameters())
        tensors = [parameter.grad for parameter in parameters if parameter.grad is not None]
        tensors += [self.heads.mean, self.heads.var]
        together = mean_over_ranks(torch.cat([each.flatten() for each in tensors]))
        for each, values in zip(tensors, together.split([each.numel() for each in tensors]), strict=True):
            each.copy_(values.view_as(each))
        applied = bool(together.isfinite().all())
        if applied:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self._updates += 1
        self.optimizer.zero_grad()
        return applied

    def note(self) -> Any:
        """How often the heads were updated."""
        return self._updates

    def prepare(self, note: Any) -> None:
        self._updates = note

    def state(self) -> dict[str, list[Fragment]]:
        tensors = {"weight": self.heads.state_dict()}
        momenta = {name: self.optimizer.state[each]["momentum_buffer"] for name, each in self.heads.named_parameters()}
        tensors["momentum"] = momenta
        return {of: [Fragment(n, 0, t.detach().view(-1)) for n, t in named.items()] for of, named in tensors.items()}

    def publish(self) -> None:
        """The heads are their own masters."""
