"""Fast gradient (sign) method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from unperturb.attacks.base import attacks
from unperturb.attacks.context import AttackContext
from unperturb.attacks.kinds import BallAttack
from unperturb.attacks.losses import attack_loss


@attacks.register("fgsm")
@dataclass(frozen=True, kw_only=True)
class FGSM(BallAttack):
    """One step of the whole budget along the gradient's sign (L2: along the gradient).

    It does not look at where it lands, and takes no start.

    Source: Goodfellow et al. 2015, section 4; equation (2) of the paper.
    """

    uses_mask: ClassVar[bool] = True

    def perturb(self, context: AttackContext) -> Tensor:
        _, gradient, _ = context.gradient(context.images, attack_loss(self.loss, targeted=context.targeted))
        return self.ascend(context.images, gradient, self.eps)
