"""The learnable exponents of the distances, one a tap (paper Eq. 2), with their optimizer and their regulariser.

They stand outside the DeepSpeed engine: bf16 would round them and a clipping of the encoder's gradients would clip
them. Their gradient has three parts, of the global batch each (B images, K betas, M masked patches):

    the loss's                  by autograd, summed over accumulation; averaged over ranks here
    weight_norm_coef * sum_k R_k     R_k = sqrt(norm_batch * mean_b sum_i w_kbi^2), the norm of Eq. 6; its mean runs over
                                all images of the step, so S_k = R_k^2 / norm_batch is averaged before the root
    beta_l2 / 2 * beta^2     keeps beta from running away (METHOD.md, "What holds beta")
"""

import copy
import logging
from typing import Any

import ddae_kernels as dk
import torch
from torch import Tensor

from ddae.config.pretrain import DynamicConfig
from ddae.distributed.comm import mean_over_ranks

logger = logging.getLogger(__name__)


class Betas:
    """One fp32 tensor [K], its AdamW, and what a step has gathered for its gradient."""

    def __init__(self, names: list[str], config: DynamicConfig, adam_betas: tuple[float, float], device: torch.device):
        self.names = names
        self.config = config
        start = torch.tensor(config.beta_init, device=device).expand(len(names)).clone()
        self.values = start.requires_grad_()
        self.optimizer = torch.optim.AdamW([self.values], lr=0.0, betas=adam_betas, weight_decay=0.0, fused=True)
        self.gradient = torch.zeros_like(start)  # of the last step
        self.last_values = start.detach().clone()  # with which the last step was computed
        self.regulariser = torch.zeros((), device=device)  # of the last step, for the log
        self._squares, self._slopes = torch.zeros_like(start), torch.zeros_like(start)
        self._micro_batches = 0
        self._warned = False

    def used(self) -> Tensor:
        """The betas as the loss uses them, held in the clamp's range; differentiable."""
        return self.values.clamp(*self.config.clamp)

    def add_norm(self, distance: Tensor) -> None:
        """Add one micro-batch's share of the norm and of its slope: distance [B, M]."""
        if self.names:
            mean_square = dk.weight_norm(distance, self.used()).square()
            (slope,) = torch.autograd.grad(mean_square.sum(), self.values)
            self._squares += mean_square.detach()
            self._slopes += slope
        self._micro_batches += 1

    def step(self, lr: float, applied: Tensor) -> None:
        """Complete the gradient over accumulation and ranks, and follow it where the engine took its step too (applied,
        [], is 1 and not 0).

        The loss's own part is in values.grad: summed over the micro-batches, each of which is a share of the step.
        """
        self.last_values = self.values.detach().clone()
        if self.names:
            loss_part = torch.zeros_like(self.gradient) if self.values.grad is None else self.values.grad
            parts = [loss_part, self._squares / self._micro_batches, self._slopes / self._micro_batches]
            loss_part, squares, slopes = mean_over_ranks(torch.stack(parts))
            norm = (self.config.norm_batch * squares).sqrt()
            values, weight, decay = self.values.detach(), self.config.weight_norm_coef, self.config.beta_l2
            self.regulariser = weight * norm.sum() + decay / 2 * values.square().sum()
            self.gradient = loss_part + weight * self.config.norm_batch * slopes / (2 * norm) + decay * values
            if self.config.learnable:
                self.optimizer.param_groups[0]["lr"] = lr * self.config.lr_mult
                self.optimizer.found_inf = 1 - applied  # type: ignore[attr-defined]
                self.values.grad = self.gradient
                self.optimizer.step()
        self.values.grad = None
        self._squares.zero_()
        self._slopes.zero_()
        self._micro_batches = 0

    def warn_if_clamped(self) -> None:
        """Log once when a beta has reached the clamp, where the loss has no gradient. Synchronises."""
        low, high = self.config.clamp
        clamped = [n for n, value in zip(self.names, self.last_values.tolist(), strict=True) if not low < value < high]
        if clamped and not self._warned:
            logger.info("beta of %s has reached dynamic.clamp %s", ", ".join(clamped), self.config.clamp)
            self._warned = True

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the values and of AdamW's averages."""
        return copy.deepcopy({"values": self.values.detach().cpu(), "optimizer": self.optimizer.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict() returned."""
        with torch.no_grad():
            self.values.copy_(state["values"])
        saved = copy.deepcopy(state["optimizer"])
        for group in saved["param_groups"]:  # the implementation of AdamW is not state
            group |= {"fused": True, "foreach": None}
        self.optimizer.load_state_dict(saved)
