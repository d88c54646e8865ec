"""Elastic-net attack."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unperturb.attacks.base import attacks
from unperturb.attacks.context import AttackContext
from unperturb.attacks.kinds import Best, MinimalAttack
from unperturb.attacks.losses import margin


@attacks.register("ead")
@dataclass(frozen=True, kw_only=True)
class EAD(MinimalAttack):
    """Least `beta` L1 + squared L2 plus `const` times the lead that the label still has, by shrinkage and thresholding
    with momentum (FISTA); a minimal-norm attack whose images differ in few pixels.

    decision: by which distance the nearest success is told, `"elastic_net"` (beta L1 + squared L2) or `"l1"`. beta: how
    far every pixel is drawn back per step, in pixel units; a change below it is none. confidence: by how much the wrong
    logit must lead. lr: of the gradient steps, falling to zero with the square root. steps: per search step, each
    two forward passes and one backward pass. search_steps: how often the weight is changed per image, tenfold up from
    `initial_const` until the image falls, then by bisection. The nearest success met is returned, the original where
    there was none.

    Raises `ValueError` for another decision and for settings out of range.

    Source: Chen et al. 2018, algorithm 1. Not theirs: the extrapolated point is cut to [0, 1],
    and judged too. The threshold is beta whatever the step, as theirs, so a shorter step draws more to zero.
    """

    decision: Literal["elastic_net", "l1"] = "elastic_net"
    beta: float = 0.01
    confidence: float = 0.0
    lr: float = 0.01
    steps: int = 100
    search_steps: int = 9
    initial_const: float = 0.1

    def __post_init__(self) -> None:
        if self.decision not in ("elastic_net", "l1"):
            raise ValueError(f"decision must be 'elastic_net' or 'l1', not {self.decision!r}")
        if self.steps < 1 or self.search_steps < 1:
            raise ValueError("steps and search_steps must be at least 1")
        if self.beta < 0 or self.confidence < 0 or self.lr <= 0 or self.initial_const <= 0:
            raise ValueError("lr and initial_const must be positive, beta and confidence not negative")

    def perturb(self, context: AttackContext) -> Tensor:
        best = Best(context.images)
        const = torch.full_like(context.images[:, 0, 0, 0], self.initial_const)
        low, high = torch.zeros_like(const), torch.full_like(const, torch.inf)
        for _ in range(self.search_steps):
            hit = self._descend(context, const, best)
            low, high = torch.where(hit, low, const), torch.where(hit, const, high)
            const = torch.where(high < torch.inf, (low + high) / 2, const * 10)
        return best.images

    def _descend(self, context: AttackContext, const: Tensor, best: Best) -> Tensor:
        """One search step from the images: whether each of them fell on the way, `(N,)`."""
        images, labels = context.images, context.labels[:, None]
        x = ahead = images
        hit = torch.zeros_like(const, dtype=torch.bool)
        for step in range(self.steps):
            point, logits = context.forward(ahead)
            values = logits.detach()
            lead, _ = self._judge(context, ahead, values, best)
            pull = torch.where(lead < 0, -const if context.targeted else const, 0.0)[:, None]
            rival = values.scatter(1, labels, -torch.inf).argmax(1, keepdim=True)
            weights = torch.zeros_like(values).scatter_(1, rival, -pull).scatter_(1, labels, pull)
            slope = context.backward(point, logits, weights).add_(ahead - images, alpha=2)
            moved = ahead - slope * (self.lr * math.sqrt(1 - step / self.steps))
            last, x = x, (images + F.softshrink(moved - images, self.beta)).clamp_(0, 1)
            hit |= self._judge(context, x, context.logits(x), best)[1]
            ahead = torch.lerp(last, x, 1 + step / (step + 3)).clamp_(0, 1)
        return hit

    def _judge(self, context: AttackContext, x: Tensor, logits: Tensor, best: Best) -> tuple[Tensor, Tensor]:
        """By how much each image leads beyond the confidence, and whether by more than rounding; the best is kept."""
        lead = context.value(logits, margin) - self.confidence
        fooled = lead > context.rounding(logits)
        size = (x - context.images).flatten(1).abs()
        far = size.sum(1)
        if self.decision == "elastic_net":
            far = self.beta * far + size.square().sum(1)
        best.update(x, torch.where(fooled, -far, -torch.inf))
        return lead, fooled
