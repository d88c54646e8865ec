"""DeepFool."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unperturb.attacks.base import MinimalAttack, attacks
from unperturb.attacks.context import AttackContext
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
        x, rows = context.images, torch.arange(len(found), device=found.device)
        target_classes = torch.empty(0)
        stretch = torch.ones_like(x[:, 0, 0, 0])
        lead = torch.full_like(stretch, torch.inf)
        for step in range(self.steps):
            point, logits = context.forward(x)
            if not step:
                others = logits.detach().scatter(1, context.labels[:, None], -torch.inf)
                target_classes = others.topk(min(self.top_k, logits.shape[1]) - 1).indices
            fooled = context.clearly_fooled(logits.detach())
            found[rows[fooled]] = x[fooled]
            active = (~fooled).nonzero().squeeze(1)
            if not len(active):
                return found
            # The images just fooled would sit through every backward pass of this graph, each worth some two forward
            # passes. Where that costs more than another forward pass of the others, start over without them; else they
            # leave after this step.
            now = context.value(logits.detach(), margin)
            stretch, lead = torch.where((now - lead).abs() <= 1e-3 * now.abs(), _LONGER * stretch, 1.0), now
            passes = 1 if context.targeted else target_classes.shape[1]
            if 2 * (len(x) - len(active)) * passes > len(active):
                context, x, rows, target_classes = context.take(active), x[active], rows[active], target_classes[active]
                stretch, lead = stretch[active], lead[active]
                active = torch.arange(len(x), device=x.device)
                del point, logits  # the old graph goes before the new one comes
                point, logits = context.forward(x)
            x = x + self._to_nearest_boundary(context, point, logits, target_classes, stretch, step >= _AUTHORS_STEPS)
            if len(active) < len(x):
                context, x, rows, target_classes = context.take(active), x[active], rows[active], target_classes[active]
                stretch, lead = stretch[active], lead[active]
            x = x.clamp_(0, 1)
        fooled = context.clearly_fooled(context.logits(x))
        found[rows[fooled]] = x[fooled]
        return found

    def _to_nearest_boundary(
        self,
        context: AttackContext,
        point: Tensor,
        logits: Tensor,
        target_classes: Tensor,
        stretch: Tensor,
        in_box: bool,
    ) -> Tensor:
        """The step `(N, C, H, W)` onto the nearest boundary between the label and a rival, and a little past it; its
        length times `stretch` `(N,)`."""
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
        length = length * stretch
        if self.norm == "linf":
            return direction.sign() * length[:, None, None, None]
        return direction * (length / slope)[:, None, None, None]
