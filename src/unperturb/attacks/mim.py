"""Momentum iterative method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unperturb.attacks.base import attacks
from unperturb.attacks.kinds import IterativeAttack


@attacks.register("mim")
@dataclass(frozen=True, kw_only=True)
class MIM(IterativeAttack):
    """Iterated steps along a momentum of L1-normalized gradients; the highest loss met is returned, that
    of a success before any other.

    decay: the momentum's mu. The rest is that of every iterative attack: alpha is eps / steps unless it is given.

    Source: Dong et al. 2018, algorithm 1: g <- mu g + grad / ||grad||_1, then the sign of g (the sum first, the sign
    after). The norm is the mean of absolute values, as in the authors' code: it scales every g alike.
    """

    decay: float = 1.0

    def direction(self, gradient: Tensor, last: Tensor | None) -> Tensor:
        # Clamped: a zero gradient adds nothing, where a division by zero would add NaN.
        gradient /= gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-30)
        return gradient if last is None else last.mul_(self.decay).add_(gradient)
