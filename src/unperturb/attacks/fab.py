"""FAB-T: the targeted fast adaptive boundary attack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unperturb.attacks.apgd import TargetedLoss, target_classes
from unperturb.attacks.base import Best, MinimalAttack, attacks
from unperturb.attacks.context import AttackContext
from unperturb.attacks.losses import LossFunction, margin
from unperturb.attacks.projections import Norm
from unperturb.threat_models import budget


def onto_plane(x: Tensor, w: Tensor, b: Tensor, norm: Norm) -> Tensor:
    """The point of [0, 1]^D with <w, z> = b that is nearest to `x` in `norm`; where there is none, a corner of the box
    nearest to that plane. x, w: `(N, D)`, x in [0, 1]; b: `(N,)`.

    Every coordinate moves at its own rate (Linf: 1, L2: |w|) until it meets the box, so <w, z> is concave and piecewise
    linear in the time; its corners are sorted and the piece that reaches b is solved.
    """
    gap = b - (w * x).sum(1)
    toward = w.sign() * gap.sign()[:, None]
    weight = w.abs()
    rate = weight if norm == "l2" else weight.sign()
    room = torch.where(toward > 0, 1 - x, x)
    meets = torch.where(weight > 0, room / rate, 0)  # when each coordinate is stopped by the box
    times, order = meets.sort(dim=1)
    done = (weight * room).gather(1, order).cumsum(1)  # gained by those that are stopped
    slope = (weight * rate).gather(1, order)
    ahead = slope.flip(1).cumsum(1).flip(1)  # speed of those that are not: a suffix sum, so that it ends at exactly 0
    still = ahead - slope
    gap = gap.abs()[:, None]
    piece = torch.searchsorted((done + times * still).contiguous(), gap)  # the first corner that is far enough
    short = piece == x.shape[1]  # not even all coordinates at the box
    piece = piece.clamp(max=x.shape[1] - 1)
    before = done.gather(1, piece) - (weight * room).gather(1, order).gather(1, piece)
    time = (gap - before) / ahead.gather(1, piece).clamp(min=1e-30)
    time = torch.where(short, torch.inf, time.clamp(min=0))
    # 0 * inf is NaN: a coordinate with no weight does not move.
    moved = torch.where(weight > 0, torch.minimum(time * rate, room), 0)
    return x + toward * moved


def _size(delta: Tensor, norm: Norm) -> Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), 2 if norm == "l2" else torch.inf, dim=1)


@attacks.register("fab-t")
@dataclass(frozen=True, kw_only=True)
class FAB(MinimalAttack):
    """Steps onto the linearized boundary with one class after the other, pulled back to the original; a minimal-norm
    attack.

    norm: `"linf"` or `"l2"`, what is minimized. eps: a success farther than this is a failure (default: none is).
    steps: passes (two forward, one backward) per class and restart. restarts: the later ones start at random, half as
    far as the best success. target_classes: how many classes to aim at, the strongest others first. alpha_max: the most
    weight of the original's own projection. eta: how far past the boundary. beta: share of the way out that is kept
    after a success. first_success: an image leaves at its first success within `eps`, however far: for those who ask
    only whether there is one, as `autoattack` does. Without it every class is tried, and the nearest success returned.

    Source: Croce & Hein 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack",
    algorithm 1; aimed at one class after the other as in "Reliable evaluation of adversarial robustness".
    """

    norm: Norm = "linf"
    eps: float | None = None
    steps: int = 100
    restarts: int = 1
    target_classes: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    first_success: bool = False

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be 'linf' or 'l2', not {self.norm!r}")
        if self.eps is not None:
            object.__setattr__(self, "eps", budget(self.eps, self.norm))
        if self.steps < 1 or self.restarts < 1 or self.target_classes < 1:
            raise ValueError("steps, restarts and target_classes must be at least 1")

    def perturb(self, context: AttackContext) -> Tensor:
        found = context.images.clone()
        logits = context.logits(found)
        rows = (~context.clearly_fooled(logits)).nonzero().squeeze(1)
        if not len(rows):
            return found
        part = context.take(rows)
        classes = target_classes(part, logits[rows], self.target_classes)
        best, left = Best(part.images), torch.arange(len(rows), device=rows.device)
        for number in range(classes.shape[1]):
            x, distance = self.attack_target(part.take(left), classes[left, number], number)
            best.update(x, -distance, rows=left)
            if self.first_success:
                left = (~self._near(-best.value)).nonzero().squeeze(1)
                if not len(left):
                    break
        if len(left):
            x, distance = self._shorten(part.take(left), best.images[left], -best.value[left].to(best.images.dtype))
            best.update(x, -distance, rows=left)
        found[rows] = torch.where(self._near(-best.value)[:, None, None, None], best.images, part.images)
        return found

    def _near(self, radius: Tensor) -> Tensor:
        """Which distances are those of a success, and within `eps`."""
        return radius < torch.inf if self.eps is None else radius <= self.eps * (1 + 1e-6)

    def attack_target(self, context: AttackContext, target_class: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """All restarts towards the classes `target_class` `(N,)`, the `number`-th: (nearest success, its distance
        `(N,)`); the original and infinity where there is none."""
        loss, found = TargetedLoss(target_class, context.targeted), Best(context.images)
        rows = torch.arange(len(target_class), device=target_class.device)
        for restart in range(self.restarts):
            x, best, radius = context.images, context.images, -found.value[rows].to(context.images.dtype)
            if restart:
                noise = context.uniform(number * self.restarts + restart)
                reach = radius.clamp(max=1.0 if self.eps is None else self.eps)
                unit = noise / _size(noise, self.norm).clamp(min=1e-30)[:, None, None, None]
                x = (x + 0.5 * reach[:, None, None, None] * unit).clamp(0, 1)
            for _ in range(self.steps):
                x, best, radius = self._step(context, x, loss, best, radius)
                if not self.first_success:
                    continue
                near = self._near(radius)
                if bool(near.any()):
                    found.update(best, -radius, rows=rows)
                    left = (~near).nonzero().squeeze(1)
                    context, loss, rows = context.take(left), loss.take(left), rows[left]
                    x, best, radius = x[left], best[left], radius[left]
                    if not len(left):
                        return found.images, -found.value
            found.update(best, -radius, rows=rows)
        return found.images, -found.value

    def _step(
        self, context: AttackContext, x: Tensor, loss: LossFunction, best: Tensor, radius: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        images = context.images
        value, w, logits = context.gradient(x, loss)
        best, radius = self._keep(context, x, logits, best, radius)[1:]
        flat, w = x.flatten(1), w.flatten(1)
        b = (w * flat).sum(1) - value
        here = onto_plane(flat, w, b, self.norm).reshape_as(x) - x
        there = onto_plane(images.flatten(1), w, b, self.norm).reshape_as(x) - images
        near, far = (_size(d, self.norm).clamp(min=1e-8) for d in (here, there))
        alpha = (near / (near + far)).clamp(max=self.alpha_max)[:, None, None, None]
        new = ((1 - alpha) * (x + self.eta * here) + alpha * (images + self.eta * there)).clamp_(0, 1)
        fooled, best, radius = self._keep(context, new, context.logits(new), best, radius)
        return torch.where(fooled[:, None, None, None], images + self.beta * (new - images), new), best, radius

    def _keep(
        self, context: AttackContext, x: Tensor, logits: Tensor, best: Tensor, radius: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(fooled `(N,)`, the nearer success, its distance)."""
        fooled = context.clearly_fooled(logits)
        distance = torch.where(fooled, _size(x - context.images, self.norm), torch.inf)
        nearer = distance < radius
        return fooled, torch.where(nearer[:, None, None, None], x, best), torch.where(nearer, distance, radius)

    def _shorten(self, context: AttackContext, best: Tensor, radius: Tensor, steps: int = 3) -> tuple[Tensor, Tensor]:
        """The final search: a few secant steps on the way from the image to its success."""
        images = context.images
        way = best - images
        low, high = torch.zeros_like(radius), torch.ones_like(radius)
        low_value = context.value(context.logits(images), margin)
        high_value = context.value(context.logits(best), margin)
        for _ in range(steps):
            # Short of the crossing by a tenth, or rounding would leave every other point on the wrong side.
            share = 0.9 * high_value / (high_value - low_value).clamp(min=1e-30)
            t = high - share.clamp(0, 1) * (high - low)
            x = (images + t[:, None, None, None] * way).clamp_(0, 1)
            logits = context.logits(x)
            fooled, best, radius = self._keep(context, x, logits, best, radius)
            value = context.value(logits, margin)
            low, low_value = torch.where(fooled, low, t), torch.where(fooled, low_value, value)
            high, high_value = torch.where(fooled, t, high), torch.where(fooled, value, high_value)
        return best, radius
