"""Variance-tuned momentum iterative fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unperturb.attacks.base import attacks
from unperturb.attacks.context import AttackContext
from unperturb.attacks.kinds import Look
from unperturb.attacks.losses import LossFunction
from unperturb.attacks.mim import MIM

_DRAWS = 1 << 42  # other draws than those of the start


@attacks.register("vmi_fgsm")
@dataclass(frozen=True, kw_only=True)
class VMIFGSM(MIM):
    """MIM whose gradient is corrected by how much that of the step before differed from its neighbors', for attacks
    that are to transfer to another model.

    samples: neighbors that are looked at in each step but the last, at one forward+backward pass each. beta: how far
    from the point they are drawn, uniformly, in units of eps.

    Raises `ValueError` for fewer than one neighbor or a distance that is not positive.

    Source: Wang & He 2021, algorithm 1. Not theirs: L2, and neighbors lie in [0, 1].
    """

    samples: int = 5
    beta: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1 or self.beta <= 0:
            raise ValueError("samples must be at least 1 and beta positive")

    def look(self, context: AttackContext, loss: LossFunction, restart: int) -> Look:
        variance: Tensor | None = None

        def look(point: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
            nonlocal variance
            value, gradient, logits = context.gradient(point, loss)
            tuned = gradient.clone() if variance is None else gradient + variance
            if step + 1 < self.steps:
                around, mean = replace(context, images=point), torch.zeros_like(gradient)
                first = _DRAWS + (restart * self.steps + step) * self.samples
                for draw in range(first, first + self.samples):
                    neighbor = around.random_start(self.beta * self.eps, self.norm, draw)
                    mean.add_(context.gradient(neighbor, loss)[1], alpha=1 / self.samples)
                variance = mean - gradient
            return value, context.fooled(logits), tuned

        return look
