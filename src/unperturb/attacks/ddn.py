"""Decoupled direction and norm: the cheap minimal-norm L2 attack."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unperturb.attacks.base import attacks
from unperturb.attacks.context import AttackContext
from unperturb.attacks.kinds import Best, MinimalAttack
from unperturb.attacks.losses import margin
from unperturb.attacks.projections import l2_norm


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the log-odds of the label, `(N,)`: cross-entropy's gradient direction, without its saturation."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.logsumexp(1) - logits.gather(1, labels[:, None]).squeeze(1)


def toward_fall(logits: Tensor, labels: Tensor) -> Tensor:
    """The log-odds, and where they speak against a label that still leads, the margin, `(N,)`.

    Cross-entropy has reached its aim there, the label below one half, and rises on to where many classes meet and none
    overtakes: an image wanders off with its growing sphere, or does not, as the last bits of a sum have it.
    """
    odds, lead = log_odds(logits, labels), margin(logits, labels)
    return torch.where((odds > 0) & (lead <= 0), lead, odds)


@attacks.register("ddn")
@dataclass(frozen=True, kw_only=True)
class DDN(MinimalAttack):
    """Normalized gradient steps on a sphere that shrinks after each success and grows after each failure.

    steps: forward+backward passes. gamma: the sphere's radius changes by this share per step. init_norm: its first
    radius. The smallest success met is returned, the original where there was none.

    Source: Rony et al. 2019, algorithm 1, without its quantization. Their gradient of cross-entropy is normalized, so
    only its direction counts; here that of the log-odds, which is the same and does not vanish in float32. Not theirs:
    where a label leads with less than half of the probability, the strongest rival alone is aimed at.
    """

    steps: int = 100
    gamma: float = 0.05
    init_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 2 or not 0 < self.gamma < 1 or self.init_norm <= 0:
            raise ValueError("steps must be at least 2, gamma in (0, 1) and init_norm positive")

    def perturb(self, context: AttackContext) -> Tensor:
        images = context.images
        best = Best(images)
        x, delta = images, torch.zeros_like(images)
        farthest = l2_norm(torch.maximum(images, 1 - images))
        radius = torch.full_like(farthest, self.init_norm)
        for step in range(self.steps):
            _, gradient, logits = context.gradient(x, toward_fall)
            fooled = context.clearly_fooled(logits)
            best.update(x, torch.where(fooled, -l2_norm(delta), -torch.inf))
            # Cosine annealing from 1 to 0.01.
            size = 0.01 + 0.99 * (1 + math.cos(math.pi * step / self.steps)) / 2
            delta = delta + gradient * (size / l2_norm(gradient).clamp(min=1e-30))[:, None, None, None]
            radius = torch.minimum(radius * torch.where(fooled, 1 - self.gamma, 1 + self.gamma), farthest)
            delta = delta * (radius / l2_norm(delta).clamp(min=1e-30))[:, None, None, None]
            x = (images + delta).clamp_(0, 1)
            delta = x - images
        fooled = context.clearly_fooled(context.logits(x))
        best.update(x, torch.where(fooled, -l2_norm(delta), -torch.inf))
        return best.images
