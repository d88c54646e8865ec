"""DeepFool."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unperturb.attacks.base import attacks
from unperturb.attacks.context import AttackContext, PerImage
from unperturb.attacks.kinds import MinimalAttack
from unperturb.attacks.losses import margin
from unperturb.attacks.projections import Norm

# The least step, L2 and per pixel. Without it float32 steps shrink to nothing just short of the boundary.
_LEAST = {"l2": 1e-4, "linf": 1e-5}
# The first steps are the authors': short where the box holds pixels back, which costs steps but finds nearer images.
# Later ones count only the pixels that can move, or the last stretch is crawled (measured on MNIST: the same mean
# distance in 7 forward passes instead of 11).
_AUTHORS_STEPS = 4
# Behind rounding, or with bfloat16 inside, a short step changes nothing that the model says. The next one is longer.
_LONGER = 4.0


@dataclass
class _Walk(PerImage):
    """Where each image that still stands has come to. rows: its place in the answer; stretch: what the next step's
    length is multiplied by; lead: the margin at the step before; target_classes: `(N, M)`, those that count."""

    context: AttackContext
    rows: Tensor
    x: Tensor
    target_classes: Tensor
    stretch: Tensor
    lead: Tensor


@attacks.register("deepfool")
@dataclass(frozen=True, kw_only=True)
class DeepFool(MinimalAttack):
    """Steps to the nearest boundary of the linearized model, until the class changes; a minimal-norm attack.

    norm: whose nearest boundary, `"l2"` or `"linf"`. steps: at most so many, each one forward pass and one backward
    pass per rival class, for the images that still stand. overshoot: how far past the boundary, as a share of the
    step. top_k: the classes that count, the true one among them, by their logits on the clean image. Targeted, the
    only rival is the class that leads.

    Source: Moosavi-Dezfooli et al. 2016, algorithm 2 and equations (10)-(11) for the other norms.
    """

    norm: Norm = "l2"
    steps: int = 50
    overshoot: float = 0.02
    top_k: int = 10

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be 'linf' or 'l2', not {self.norm!r}")
        if self.steps < 1 or self.overshoot < 0 or self.top_k < 2:
            raise ValueError("steps must be at least 1, overshoot not negative and top_k at least 2")

    def perturb(self, context: AttackContext) -> Tensor:
        found = context.images.clone()
        one = torch.ones_like(found[:, 0, 0, 0])
        now = _Walk(
            context=context,
            rows=torch.arange(len(found), device=found.device),
            x=context.images,
            target_classes=context.labels[:, None],
            stretch=one,
            lead=torch.full_like(one, torch.inf),
        )
        for step in range(self.steps):
            point, logits = now.context.forward(now.x)
            if not step:
                others = logits.detach().scatter(1, context.labels[:, None], -torch.inf)
                now.target_classes = others.topk(min(self.top_k, logits.shape[1]) - 1).indices
            fooled = now.context.clearly_fooled(logits.detach())
            found[now.rows[fooled]] = now.x[fooled]
            active = (~fooled).nonzero().squeeze(1)
            if not len(active):
                return found
            # The images just fooled would sit through every backward pass of this graph, each worth some two forward
            # passes. Where that costs more than another forward pass of the others, start over without them; else they
            # leave after this step.
            lead = now.context.value(logits.detach(), margin)
            stuck = (lead - now.lead).abs() <= 1e-3 * lead.abs()
            now.stretch, now.lead = torch.where(stuck, _LONGER * now.stretch, 1.0), lead
            passes = 1 if context.targeted else now.target_classes.shape[1]
            if 2 * (len(now.x) - len(active)) * passes > len(active):
                now = now.select(active)
                active = torch.arange(len(now.x), device=now.x.device)
                del point, logits  # the old graph goes before the new one comes
                point, logits = now.context.forward(now.x)
            now.x = now.x + self._to_nearest_boundary(now, point, logits, in_box=step >= _AUTHORS_STEPS)
            if len(active) < len(now.x):
                now = now.select(active)
            now.x = now.x.clamp_(0, 1)
        fooled = now.context.clearly_fooled(now.context.logits(now.x))
        found[now.rows[fooled]] = now.x[fooled]
        return found

    def _to_nearest_boundary(self, now: _Walk, point: Tensor, logits: Tensor, *, in_box: bool) -> Tensor:
        """The step `(N, C, H, W)` onto the nearest boundary between the label and a rival, and a little past it; its
        length times `stretch`."""
        context, target_classes = now.context, now.target_classes
        values, labels, x = logits.detach(), context.labels[:, None], point.detach()
        if context.targeted:  # the target has to rise above whichever class leads
            target_classes = values.scatter(1, labels, -torch.inf).argmax(1, keepdim=True)[:, : target_classes.shape[1]]
        low, high = torch.where(x <= 0, 0.0, -torch.inf), torch.where(x >= 1, 0.0, torch.inf)
        least = torch.full((len(x),), torch.inf, device=x.device)
        direction, slope = torch.zeros_like(x), torch.ones_like(least)
        for j in range(target_classes.shape[1]):
            target_class = target_classes[:, j : j + 1]
            sign = -1.0 if context.targeted else 1.0
            weights = torch.zeros_like(values).scatter_(1, target_class, sign).scatter_(1, labels, -sign)
            w = context.backward(point, logits, weights, keep=j + 1 < target_classes.shape[1])
            if in_box:
                w = w.clamp_(low, high)
            order = 2 if self.norm == "l2" else 1  # the dual norm
            norm = torch.linalg.vector_norm(w.flatten(1), order, dim=1)
            gap = (values.gather(1, labels) - values.gather(1, target_class)).squeeze(1).abs()
            distance = torch.where(norm > 0, gap / norm, torch.inf)
            nearer = distance < least
            least, slope = torch.where(nearer, distance, least), torch.where(nearer, norm, slope)
            direction = torch.where(nearer[:, None, None, None], w, direction)
        length = torch.where(least < torch.inf, least * (1 + self.overshoot), 0).clamp_(min=_LEAST[self.norm])
        length = length * now.stretch
        if self.norm == "linf":
            return direction.sign() * length[:, None, None, None]
        return direction * (length / slope)[:, None, None, None]
