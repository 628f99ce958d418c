"""Betas: the learnable exponents of the distances, one per tap (paper Eq. 2), with their optimizer and regulariser.

They are kept outside the DeepSpeed engine, so that they are neither rounded to bf16 nor clipped with the encoder's
gradients. Their gradient is the sum of three terms, each over the global batch (B images, K betas, M masked patches):

    of the loss                     by autograd, summed over micro-batches, averaged over ranks
    weight_norm_coef * sum_k R_k    R_k = sqrt(norm_batch * mean_b sum_i w_kbi^2), the norm of Eq. 6; the mean is over
                                    all images of the step, so R_k^2 / norm_batch is averaged before the root is taken
    beta_l2 / 2 * beta^2            keeps the betas bounded (METHOD.md, "What keeps beta bounded")
"""

import copy
import logging
from typing import Any

import ddae_kernels as dk
import torch
from jaxtyping import Float
from torch import Tensor

from ddae.config.pretrain import DynamicConfig
from ddae.distributed.comm import mean_over_ranks

logger = logging.getLogger(__name__)


class Betas:
    """The betas, fp32 [K], with their AdamW optimizer and the sums from which a step's gradient is computed."""

    def __init__(self, names: list[str], config: DynamicConfig, adam_betas: tuple[float, float], device: torch.device):
        self.names, self.config = names, config
        start = torch.tensor(config.beta_init, device=device).expand(len(names)).clone()
        self.values = start.requires_grad_()
        self.optimizer = torch.optim.AdamW([self.values], lr=0.0, betas=adam_betas, weight_decay=0.0, fused=True)
        self.gradient = torch.zeros_like(start)  # of the last step
        self.last_values = start.detach().clone()  # values that the last step used
        self._norm = torch.zeros_like(start)  # R of the last step
        self._sums: list[Tensor] = []  # of squared norms and of their slopes, over the step's micro-batches so far
        self._micro_batches, self._warned = 0, False

    @property
    def regulariser(self) -> Float[Tensor, ""]:
        """Return the loss of which the last two terms are the gradient, of the last step."""
        decay = self.config.beta_l2 / 2 * self.last_values.square().sum()
        return self.config.weight_norm_coef * self._norm.sum() + decay

    def clamped(self) -> Float[Tensor, " K"]:
        """Return the betas clamped to dynamic.clamp, as the loss uses them; differentiable."""
        return self.values.clamp(*self.config.clamp)

    def accumulate_norm(self, distance: Float[Tensor, "B M"]) -> None:
        """Add a micro-batch's squared norm of the weights and its slope to the step's sums."""
        if self.names:
            low, high = self.config.clamp
            values = self.values.detach()
            clamped = values.clamp(low, high)
            square, slope = dk.weight_norm_and_slope(distance, clamped)
            terms = [square, slope * (clamped == values)]  # clamped exponents have no gradient
            if self._sums:
                torch._foreach_add_(self._sums, terms)
            else:
                self._sums = terms
        self._micro_batches += 1

    def step(self, lr: float, applied: Float[Tensor, ""]) -> None:
        """Complete the gradient over micro-batches and ranks, and update the betas. lr: the encoder's learning rate.

        applied: 1, or 0 to skip the update because the engine skipped its step. values.grad holds the loss's gradient,
        summed over the micro-batches, each of which is a share of the step's loss.
        """
        self.last_values = self.values.detach().clone()
        if self.names:
            loss_part = torch.zeros_like(self.gradient) if self.values.grad is None else self.values.grad
            parts = torch.stack([loss_part, *self._sums])
            parts[1:] /= self._micro_batches
            loss_part, squares, slopes = mean_over_ranks(parts)
            self._norm = (self.config.norm_batch * squares).sqrt()
            half_slope = self.config.weight_norm_coef * self.config.norm_batch / 2 * slopes
            self.gradient = loss_part + half_slope / self._norm + self.config.beta_l2 * self.last_values
            if self.config.learnable:
                self.optimizer.param_groups[0]["lr"] = lr * self.config.lr_mult
                self.optimizer.found_inf = 1 - applied  # type: ignore[attr-defined]
                self.values.grad = self.gradient
                self.optimizer.step()
        self.values.grad = None
        self._sums, self._micro_batches = [], 0

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
        for group in saved["param_groups"]:  # the AdamW implementation is not part of the state
            group |= {"fused": True, "foreach": None}
        self.optimizer.load_state_dict(saved)
