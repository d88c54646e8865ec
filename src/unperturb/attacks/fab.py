"""FAB-T: the targeted fast adaptive boundary attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unperturb.attacks.apgd import TargetedLoss, target_classes
from unperturb.attacks.base import attacks
from unperturb.attacks.context import AttackContext, PerImage
from unperturb.attacks.kinds import Best, MinimalAttack
from unperturb.attacks.losses import margin
from unperturb.attacks.projections import Norm
from unperturb.threat_models import budget

LEVELS = 65_535  # of a pixel, in 16 bits


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


@dataclass
class _Nearest(PerImage):
    """The nearest success met and its distance; the original and infinity where there is none."""

    context: AttackContext
    best: Tensor
    radius: Tensor

    def keep(self, x: Tensor, logits: Tensor, norm: Norm) -> Tensor:
        """Whether each image is fooled at `x`, `(N,)`; those that are and nearer than before are kept."""
        fooled = self.context.clearly_fooled(logits)
        distance = torch.where(fooled, _size(x - self.context.images, norm), torch.inf)
        nearer = distance < self.radius
        self.best = torch.where(nearer[:, None, None, None], x, self.best)
        self.radius = torch.where(nearer, distance, self.radius)
        return fooled


@dataclass
class _Search(_Nearest):
    """Where the search towards one class stands. rows: the images' places in the answer."""

    loss: TargetedLoss
    rows: Tensor
    x: Tensor


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

    A given start that fools an image is its first success, and where the search towards the class shown there begins;
    it costs one forward pass.

    Source: Croce & Hein 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack",
    algorithm 1; aimed at one class after the other as in "Reliable evaluation of adversarial robustness".
    """

    uses_start: ClassVar[bool] = True

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
        part = context.select(rows)
        classes = target_classes(part, logits[rows], self.target_classes)
        best, left = Best(part.images), torch.arange(len(rows), device=rows.device)
        shown = None if part.start is None else self._look_at(part, part.start, best)  # the class at each start
        for number in range(classes.shape[1]):
            if self.first_success:
                left = (~self._near(-best.value)).nonzero().squeeze(1)
                if not len(left):
                    break
            here, target_class = part.select(left), classes[left, number]
            first = here.images
            if shown is not None and here.start is not None:
                first = torch.where((shown[left] == target_class)[:, None, None, None], here.start, first)
            x, distance = self.attack_target(here, target_class, number, first)
            best.update(x, -distance, rows=left)
        if self.first_success:
            left = (~self._near(-best.value)).nonzero().squeeze(1)
        if len(left):
            x, distance = self._shorten(part.select(left), best.select(left))
            best.update(x, -distance, rows=left)
        found[rows] = torch.where(self._near(-best.value)[:, None, None, None], best.images, part.images)
        return found

    def _look_at(self, context: AttackContext, start: Tensor, best: Best) -> Tensor:
        """Keep in `best` the starts that are successes; the class that the model sees there, -1 elsewhere."""
        logits = context.logits(start)
        fooled = context.clearly_fooled(logits)
        best.update(start, torch.where(fooled, -_size(start - context.images, self.norm), -torch.inf))
        return torch.where(fooled, logits.argmax(1), -1)

    def _near(self, radius: Tensor) -> Tensor:
        """Which distances are those of a success, and within `eps`."""
        return radius < torch.inf if self.eps is None else radius <= self.eps * (1 + 1e-6)

    def attack_target(
        self, context: AttackContext, target_class: Tensor, number: int, first: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """All restarts towards the classes `target_class` `(N,)`, the `number`-th: (nearest success, its distance
        `(N,)`); the original and infinity where there is none. first: where they begin (default: the originals), but
        for the random restarts."""
        found = Best(context.images)
        now = _Search(
            context=context,
            loss=TargetedLoss(target_class, context.targeted),
            rows=torch.arange(len(target_class), device=target_class.device),
            x=context.images if first is None else first,
            best=context.images,
            radius=-found.value.to(context.images.dtype),
        )
        for restart in range(self.restarts):
            if restart:
                images = now.context.images
                now.best, now.radius = images, -found.value[now.rows].to(images.dtype)
                noise = now.context.uniform(number * self.restarts + restart)
                reach = now.radius.clamp(max=1.0 if self.eps is None else self.eps)
                unit = noise / _size(noise, self.norm).clamp(min=1e-30)[:, None, None, None]
                now.x = (images + 0.5 * reach[:, None, None, None] * unit).clamp(0, 1)
            for _ in range(self.steps):
                self._step(now)
                if not self.first_success:
                    continue
                near = self._near(now.radius)
                if bool(near.any()):
                    found.update(now.best, -now.radius, rows=now.rows)
                    now = now.select((~near).nonzero().squeeze(1))
                    if not len(now.rows):
                        return found.images, -found.value
            found.update(now.best, -now.radius, rows=now.rows)
        return found.images, -found.value

    def _step(self, now: _Search) -> None:
        x, images = now.x, now.context.images
        value, w, logits = now.context.gradient(x, now.loss)
        now.keep(x, logits, self.norm)
        flat, w = x.flatten(1), w.flatten(1)
        b = (w * flat).sum(1) - value
        here = onto_plane(flat, w, b, self.norm).reshape_as(x) - x
        there = onto_plane(images.flatten(1), w, b, self.norm).reshape_as(x) - images
        near, far = (_size(d, self.norm).clamp(min=1e-8) for d in (here, there))
        alpha = (near / (near + far)).clamp(max=self.alpha_max)[:, None, None, None]
        new = ((1 - alpha) * (x + self.eta * here) + alpha * (images + self.eta * there)).clamp_(0, 1)
        fooled = now.keep(new, now.context.logits(new), self.norm)
        now.x = torch.where(fooled[:, None, None, None], images + self.beta * (new - images), new)

    def _shorten(self, context: AttackContext, best: Best, steps: int = 3) -> tuple[Tensor, Tensor]:
        """The final search, a few secant steps on the way from the image to its success: (the nearest, its
        distance)."""
        images, way = context.images, best.images - context.images
        now = _Nearest(context=context, best=best.images, radius=-best.value.to(images.dtype))
        low, high = torch.zeros_like(now.radius), torch.ones_like(now.radius)
        low_value = context.value(context.logits(images), margin)
        high_value = context.value(context.logits(best.images), margin)
        for _ in range(steps):
            # Short of the crossing by a tenth, or rounding would leave every other point on the wrong side.
            share = 0.9 * high_value / (high_value - low_value).clamp(min=1e-30)
            t = high - share.clamp(0, 1) * (high - low)
            # On the levels that images are kept in, or what is found so near the boundary would not survive it.
            x = ((images + t[:, None, None, None] * way).clamp_(0, 1) * LEVELS).round_().div_(LEVELS)
            logits = context.logits(x)
            fooled = now.keep(x, logits, self.norm)
            value = context.value(logits, margin)
            low, low_value = torch.where(fooled, low, t), torch.where(fooled, low_value, value)
            high, high_value = torch.where(fooled, t, high), torch.where(fooled, value, high_value)
        return now.best, now.radius
