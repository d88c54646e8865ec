"""Carlini and Wagner's L2 attack."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unperturb.attacks.base import attacks
from unperturb.attacks.context import AttackContext, PerImage
from unperturb.attacks.kinds import Best, MinimalAttack
from unperturb.attacks.losses import margin
from unperturb.attacks.projections import l2_norm

_CHECKS = 10  # how often per search step the loss is asked whether it still falls
_SHARPNESS = 40.0  # of the smooth maximum over the rivals, times the label's lead on the clean image


@dataclass
class _Descent(PerImage):
    """Where Adam stands. rows: the images' places in the answer; lowest: the lowest loss met at a check."""

    context: AttackContext
    rows: Tensor
    w: Tensor
    m: Tensor
    v: Tensor
    const: Tensor
    lr: Tensor
    sharpness: Tensor
    lowest: Tensor


@attacks.register("cw")
@dataclass(frozen=True, kw_only=True)
class CW(MinimalAttack):
    """Least squared L2 distance plus `const` times the lead that the label still has; a minimal-norm attack.

    confidence: by how much the wrong logit must lead. steps: passes per search step, by Adam with `lr`, which in the
    last third of the search decays within each (cosine, to a twentieth): the first search steps are to come far, the
    last ones to meet their best images while coming to rest on the boundary. search_steps: how often the weight of the
    second term is changed per image, tenfold up from `initial_const` until the image falls, then by bisection; each
    search step begins where the last one ended. smoothing: pixels are `(tanh(w) / smoothing + 1) / 2`, cut to [0, 1],
    so that those at exactly 0 or 1 begin where tanh still has a slope.
    abort_early: an image whose loss has not fallen over a tenth of a search step leaves it.

    Source: Carlini & Wagner 2017, sections V.B-D, f6; smoothing, warm start, decay and the smooth maximum in f6's
    gradient are not theirs.
    """

    confidence: float = 0.0
    lr: float = 0.05
    steps: int = 100
    search_steps: int = 9
    initial_const: float = 0.1
    smoothing: float = 0.99
    abort_early: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1 or self.search_steps < 1:
            raise ValueError("steps and search_steps must be at least 1")
        if self.confidence < 0 or self.lr <= 0 or self.initial_const <= 0:
            raise ValueError("lr and initial_const must be positive, confidence not negative")
        if not 0 < self.smoothing < 1:
            raise ValueError(
                f"smoothing must lie in (0, 1), not {self.smoothing}: at 1 black and white pixels are stuck"
            )

    def perturb(self, context: AttackContext) -> Tensor:
        found = context.images.clone()
        fooled, lead = self._fooled(context, context.logits(found))
        active = (~fooled).nonzero().squeeze(1)
        if not len(active):
            return found
        context, sharpness = context.select(active), _SHARPNESS / lead[active].abs().clamp(min=1e-12)
        best = Best(context.images)
        w = torch.atanh((2 * context.images - 1) * self.smoothing)
        const = torch.full_like(sharpness, self.initial_const)
        low, high = torch.zeros_like(const), torch.full_like(const, torch.inf)
        for search in range(self.search_steps):
            # Adam moves every pixel, by up to lr / 2: no step may be longer than half the distance already met.
            lr = (best.value.neg().sqrt() / math.sqrt(w[0].numel())).clamp(max=self.lr).to(w.dtype)
            decay = search >= self.search_steps - max(self.search_steps // 3, 1)
            w, hit = self._descend(context, w, const, lr, sharpness, best, decay=decay)
            low, high = torch.where(hit, low, const), torch.where(hit, const, high)
            const = torch.where(high < torch.inf, (low + high) / 2, const * 10)
        found[active] = best.images
        return found

    def _fooled(self, context: AttackContext, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each image leads by the confidence and more than rounding, and by how much it does."""
        lead = context.value(logits, margin) - self.confidence
        return lead > context.rounding(logits), lead

    def _descend(
        self,
        context: AttackContext,
        start: Tensor,
        const: Tensor,
        lr: Tensor,
        sharpness: Tensor,
        best: Best,
        *,
        decay: bool,
    ) -> tuple[Tensor, Tensor]:
        """One search step from `start`: where each image's w came to, and whether the image fell on the way."""
        end, hit = start.clone(), torch.zeros_like(const, dtype=torch.bool)
        now = _Descent(
            context=context,
            rows=torch.arange(len(start), device=start.device),
            w=start.clone(),
            m=torch.zeros_like(start),
            v=torch.zeros_like(start),
            const=const,
            lr=lr,
            sharpness=sharpness,
            lowest=torch.full_like(const, torch.inf),
        )
        for step in range(1, self.steps + 1):
            bend = torch.tanh(now.w)
            x = (bend * (0.5 / self.smoothing)).add_(0.5).clamp_(0, 1)
            point, logits = now.context.forward(x)
            logits_now = logits.detach()
            fooled, lead = self._fooled(now.context, logits_now)
            delta = x - now.context.images
            distance = l2_norm(delta).square_()
            best.update(x, torch.where(fooled, -distance, -torch.inf), rows=now.rows)
            hit[now.rows] |= fooled

            # The gradient of the hinge, then of the distance, then through tanh. Where several rivals are near, their
            # mixture leads to nearer images than the leader of the moment: a softmax, its sharpness in units of the
            # lead to be made up, stands for the maximum. The cut to [0, 1] is left out: a pixel pushed past it must
            # come back.
            labels = now.context.labels[:, None]
            pull = torch.where(lead < 0, -now.const if context.targeted else now.const, 0.0)[:, None]
            others = (logits_now.scatter(1, labels, -torch.inf) * now.sharpness[:, None]).softmax(1)
            weights = (others * -pull).scatter_(1, labels, pull)
            slope = now.context.backward(point, logits, weights).add_(delta, alpha=2)
            slope.addcmul_(slope, bend.square_(), value=-1)

            # Adam, with the two bias corrections.
            now.m.lerp_(slope, 0.1)
            now.v.mul_(0.999).addcmul_(slope, slope, value=0.001)
            share = 0.525 + 0.475 * math.cos(math.pi * step / self.steps) if decay else 1.0
            size, grown = now.lr * (share / (1 - 0.9**step)), math.sqrt(1 - 0.999**step)
            now.w.addcdiv_(now.m, now.v.sqrt().add_(1e-8 * grown).div_((grown * size)[:, None, None, None]), value=-1)

            if self.abort_early and step % max(self.steps // _CHECKS, 1) == 0 and step < self.steps:
                loss = distance - now.const * lead.clamp(max=0)
                falling = (loss <= 0.9999 * now.lowest).nonzero().squeeze(1)
                now.lowest = torch.minimum(loss, now.lowest)
                if len(falling) < len(now.w):
                    end[now.rows] = now.w
                    now = now.select(falling)
                    if not len(now.w):
                        break
        end[now.rows] = now.w
        return end, hit
