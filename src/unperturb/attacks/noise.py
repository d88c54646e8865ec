"""Random noise: the attack that every table needs as its zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unperturb.attacks.base import attacks
from unperturb.attacks.context import AttackContext
from unperturb.attacks.kinds import BallAttack, best_of
from unperturb.attacks.losses import attack_loss
from unperturb.attacks.projections import l2_norm


@attacks.register("noise")
@dataclass(frozen=True, kw_only=True)
class Noise(BallAttack):
    """Noise whose norm is the budget: what an attacker without any knowledge does.

    kind: `"uniform"` or `"gaussian"`; either is scaled to norm `eps`, so the two spend the same. In L2 the length is
    `eps` after the cut with [0, 1] too, as far as the box has room. num_trials: independent tries, of which the one
    with the highest loss is kept per image, a success before any other, at one forward pass each; a single one does
    not meet the model.
    """

    needs_gradient: ClassVar[bool] = False
    kind: Literal["uniform", "gaussian"] = "uniform"
    num_trials: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("uniform", "gaussian"):
            raise ValueError(f"kind must be 'uniform' or 'gaussian', not {self.kind!r}")
        if self.num_trials < 1:
            raise ValueError("num_trials must be at least 1")

    def perturb(self, context: AttackContext) -> Tensor:
        loss = attack_loss(self.loss, targeted=context.targeted)
        return best_of(context, lambda draw: self._draw(context, draw), self.num_trials, loss)

    def _draw(self, context: AttackContext, draw: int) -> Tensor:
        noise = context.uniform(draw) if self.kind == "uniform" else context.normal(draw)
        if self.norm == "linf":
            length = self.eps / noise.flatten(1).abs().amax(1).clamp(min=1e-30)
        else:
            # Far outside the ball: the projection then scales down to `eps`, counting only what the box leaves.
            length = 1e3 * self.eps / l2_norm(noise).clamp(min=1e-30)
        return self.limit(torch.addcmul(context.images, noise, length[:, None, None, None]), context.images)
