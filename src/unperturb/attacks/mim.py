"""Momentum iterative method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unperturb.attacks.base import BallAttack, Best, attacks
from unperturb.attacks.context import AttackContext
from unperturb.attacks.losses import attack_loss
from unperturb.attacks.projections import projection
from unperturb.threat_models import budget


@attacks.register("mim")
@dataclass(frozen=True, kw_only=True)
class MIM(BallAttack):
    """Iterated steps along a momentum of L1-normalized gradients; the highest loss met is returned, that
    of a success before any other.

    alpha: step in pixel units (default eps / steps). steps: forward+backward passes. decay: the momentum's mu.

    Source: Dong et al. 2018, algorithm 1: g <- mu g + grad / ||grad||_1, then the sign of g (the sum first, the sign
    after). The norm is the mean of absolute values, as in the authors' code: it scales every g alike.
    """

    alpha: float | None = None
    steps: int = 10
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            object.__setattr__(self, "alpha", budget(self.alpha, self.norm))
        if self.steps < 1:
            raise ValueError("steps must be at least 1")

    def perturb(self, context: AttackContext) -> Tensor:
        loss = attack_loss(self.loss, targeted=context.targeted)
        alpha = self.eps / self.steps if self.alpha is None else self.alpha
        best, project = Best(context.images), projection(context.images, self.eps, self.norm)
        x, momentum = context.images, torch.zeros_like(context.images)
        for _ in range(self.steps):
            value, gradient, logits = context.gradient(x, loss)
            best.update(x, value, fooled=context.fooled(logits))
            # Clamped: a zero gradient adds nothing, where a division by zero would add NaN.
            gradient /= gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-30)
            momentum = momentum.mul_(self.decay).add_(gradient)
            x = project(self.ascend(x, momentum, alpha))
        logits = context.logits(x)
        best.update(x, context.value(logits, loss), fooled=context.fooled(logits))
        return best.images
