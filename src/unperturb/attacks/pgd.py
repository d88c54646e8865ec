"""Projected gradient descent."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unperturb.attacks.base import BallAttack, Best, attacks
from unperturb.attacks.context import AttackContext
from unperturb.attacks.losses import attack_loss
from unperturb.attacks.projections import projection
from unperturb.threat_models import budget


@attacks.register("pgd")
@dataclass(frozen=True, kw_only=True)
class PGD(BallAttack):
    """Steps of `alpha` along the gradient's sign, projected after each; the highest loss met is returned,
    that of a success before any other.

    alpha: step in pixel units (default 2.5 eps / steps, so that the far side of the ball can be reached).
    steps: forward+backward passes per restart. random_start: start uniformly in the ball. restarts: independent
    starts, of which the best per image is kept (only the first may start at the image itself).

    Source: Madry et al. 2018, section 2.1.
    """

    alpha: float | None = None
    steps: int = 40
    random_start: bool = True
    restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            object.__setattr__(self, "alpha", budget(self.alpha, self.norm))
        if self.steps < 1 or self.restarts < 1:
            raise ValueError("steps and restarts must be at least 1")

    def perturb(self, context: AttackContext) -> Tensor:
        loss = attack_loss(self.loss, targeted=context.targeted)
        alpha = 2.5 * self.eps / self.steps if self.alpha is None else self.alpha
        best, project = Best(context.images), projection(context.images, self.eps, self.norm)
        for restart in range(self.restarts):
            x = context.images
            if self.random_start or restart:
                x = context.random_start(self.eps, self.norm, restart)
            for _ in range(self.steps):
                value, gradient, logits = context.gradient(x, loss)
                best.update(x, value, fooled=context.fooled(logits))
                x = project(self.ascend(x, gradient, alpha))
            logits = context.logits(x)
            best.update(x, context.value(logits, loss), fooled=context.fooled(logits))
        return best.images
