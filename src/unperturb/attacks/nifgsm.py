"""Nesterov iterative fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unperturb.attacks.base import attacks
from unperturb.attacks.mim import MIM


@attacks.register("ni_fgsm")
@dataclass(frozen=True, kw_only=True)
class NIFGSM(MIM):
    """MIM whose gradient is taken where its momentum is about to lead.

    Source: Lin et al. 2020, algorithm 1. Not theirs: L2, and that the point ahead is projected, so that it may be
    returned.
    """

    def gradient_point(self, x: Tensor, last: Tensor | None, alpha: float) -> Tensor:
        if last is None:
            return x
        ahead = alpha * self.decay
        return x + last * ahead if self.norm == "linf" else self.ascend(x, last, ahead)
