"""Scale-invariant Nesterov iterative fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unperturb.attacks.base import attacks
from unperturb.attacks.context import AttackContext
from unperturb.attacks.kinds import Look
from unperturb.attacks.losses import LossFunction
from unperturb.attacks.nifgsm import NIFGSM


@attacks.register("si_ni_fgsm")
@dataclass(frozen=True, kw_only=True)
class SINIFGSM(NIFGSM):
    """NI-FGSM whose gradient is the mean over darker and darker copies of the image, for attacks that are to transfer
    to another model.

    copies: how many, the image itself among them; each is half as bright as the one before. A step costs as many
    forward+backward passes.

    Raises `ValueError` for fewer than one.

    Source: Lin et al. 2020, algorithm 1 with its scale copies.
    """

    copies: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copies < 1:
            raise ValueError(f"copies must be at least 1, not {self.copies}")

    def look(self, context: AttackContext, loss: LossFunction, restart: int) -> Look:
        def look(point: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
            value, gradient, logits = context.gradient(point, loss)
            for copy in range(1, self.copies):
                share = 0.5**copy
                gradient.add_(context.gradient(point * share, loss)[1], alpha=share)
            return value, context.fooled(logits), gradient.div_(self.copies)

        return look
