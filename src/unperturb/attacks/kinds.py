"""The kinds of attacks that a new one builds on: in a ball, in steps, of the least norm; and the best point met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from unperturb.attacks.base import Attack
from unperturb.attacks.context import AttackContext, PerImage
from unperturb.attacks.losses import LossFunction, attack_loss, checked_loss
from unperturb.attacks.projections import Norm, column, l2_norm, project_, projection
from unperturb.threat_models import budget

# (a point, the step's number) -> its value `(N,)`, whether it fooled `(N,)`, and the gradient to follow.
Look = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class BallAttack(Attack):
    """An attack with a fixed budget: a ball of radius `eps` in pixel units, cut with [0, 1].

    norm: `"linf"` or `"l2"`. eps: radius, a number or a fraction such as `"8/255"`. loss: what is maximized,
    `"cross_entropy"`, or `"margin"` or `"dlr"` (which still have a gradient where the softmax saturates; towards a
    target `"dlr"` is the margin), or a function of one's own: (logits `(N, K)`, labels `(N,)`) -> `(N,)`. With targets
    minus the loss of the target is maximized.
    """

    norm: Norm = "linf"
    eps: float
    loss: str | LossFunction = "cross_entropy"

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", budget(self.eps, self.norm))
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be 'linf' or 'l2', not {self.norm!r}")
        object.__setattr__(self, "loss", checked_loss(self.loss))

    def limit(self, x: Tensor, images: Tensor) -> Tensor:
        return project_(x, images, self.eps, self.norm)

    def first_point(self, context: AttackContext, restart: int, *, random_start: bool) -> Tensor:
        """Where the search numbered `restart` begins: the first at the call's `start`, if there is one; the others, and
        with `random_start` all, at random in the ball."""
        if context.start is not None and not restart:
            return context.start
        return context.random_start(self.eps, self.norm, restart) if random_start or restart else context.images

    def ascend(self, x: Tensor, direction: Tensor, step: float) -> Tensor:
        """`x` moved by `step` along the steepest ascent of this norm; a zero direction moves nothing."""
        if self.norm == "linf":
            return direction.sign().mul_(step).add_(x)
        # First to a size whose square float32 can hold: of a nearly saturated softmax the gradient is tiny, not zero.
        unit = direction / direction.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-37)
        return x + unit * column(step / l2_norm(unit).clamp(min=1e-12), unit)


@dataclass(frozen=True, kw_only=True)
class IterativeAttack(BallAttack):
    """Steps of `alpha` along a direction made of gradients, projected after each; the highest loss met is returned,
    that of a success before any other.

    A variant writes `direction`, `gradient_point` if its gradient is not that of the point it stands at, and `look` if
    it takes more than one pass.

    alpha: step in pixel units (default `reach` eps / steps, `reach` being the class's). steps: forward+backward passes
    per restart. random_start: start uniformly in the ball. restarts: independent starts, of which the best per image is
    kept (only the first may start at the image itself, or at a given start).
    """

    uses_start: ClassVar[bool] = True
    uses_mask: ClassVar[bool] = True
    reach: ClassVar[float] = 1.0

    alpha: float | None = None
    steps: int = 10
    random_start: bool = False
    restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            object.__setattr__(self, "alpha", budget(self.alpha, self.norm))
        if self.steps < 1 or self.restarts < 1:
            raise ValueError("steps and restarts must be at least 1")

    def direction(self, gradient: Tensor, last: Tensor | None) -> Tensor:
        """Where the next step goes; both may be worked on in place. last: the step before's, None at the first."""
        return gradient

    def gradient_point(self, x: Tensor, last: Tensor | None, alpha: float) -> Tensor:
        """Where the gradient of the step from `x` is taken; it is projected, for it may be the best point met."""
        return x

    def look(self, context: AttackContext, loss: LossFunction, restart: int) -> Look:
        """What a step learns of the model, made anew for each restart, so that it may remember. The value is minus
        infinity, and nothing fooled, where the model was not shown the point itself."""

        def look(point: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
            value, gradient, logits = context.gradient(point, loss)
            return value, context.fooled(logits), gradient

        return look

    def perturb(self, context: AttackContext) -> Tensor:
        loss = attack_loss(self.loss, targeted=context.targeted)
        alpha = self.reach * self.eps / self.steps if self.alpha is None else self.alpha
        best, project = Best(context.images), projection(context.images, self.eps, self.norm)
        for restart in range(self.restarts):
            x, last = self.first_point(context, restart, random_start=self.random_start), None
            look = self.look(context, loss, restart)
            for step in range(self.steps):
                point = self.gradient_point(x, last, alpha)
                point = point if point is x else project(point)
                value, fooled, gradient = look(point, step)
                best.update(point, value, fooled=fooled)
                last = self.direction(gradient, last)
                x = project(self.ascend(x, last, alpha))
            logits = context.logits(x)
            best.update(x, context.value(logits, loss), fooled=context.fooled(logits))
        return best.images


class MinimalAttack(Attack):
    """An attack without a budget: it seeks the nearest success."""

    def for_random_model(self, eot_samples: int = 20) -> Attack:
        name = type(self).__name__
        raise ValueError(
            f"{name} seeks the nearest point at which one answer changes, and a random model's answer is a draw; "
            "attack it with a budget instead: pgd, apgd, autoattack or square"
        )


@dataclass(eq=False)
class Best(PerImage):
    """The best point met per image: a fooled one before all others, among these the one with the highest value.

    images: `(N, C, H, W)`. value: `(N,)`, float64, so that it is kept as it was compared. fooled: `(N,)` bool.
    """

    images: Tensor
    value: Tensor = field(init=False)
    fooled: Tensor = field(init=False)

    def __post_init__(self) -> None:
        images = self.images
        self.images = images.clone()
        self.value = torch.full((len(images),), -torch.inf, dtype=torch.float64, device=images.device)
        self.fooled = torch.zeros_like(self.value, dtype=torch.bool)

    def update(self, x: Tensor, value: Tensor, *, fooled: Tensor | None = None, rows: Tensor | None = None) -> None:
        """Keep `x` `(N, C, H, W)` where it beats what was met before.

        value, fooled: `(N,)`, what the model says of `x` and of no other point; without `fooled` the value decides
        alone. rows: the positions of `x` among all images, where some have left the batch.
        """
        every = rows is None or len(rows) == len(self.images)
        met, hit = (self.value, self.fooled) if every else (self.value[rows], self.fooled[rows])
        better = value > met
        if fooled is not None:
            better = (better & (fooled | ~hit)) | (fooled & ~hit)
            hit = hit | fooled
        value = torch.where(better, value.double(), met)
        # Weights of 0 and 1 copy exactly, and several times as fast as `where` with a condition that is spread out.
        weight = column(better.to(x.dtype), x)
        if every:
            self.value, self.fooled = value, hit
            self.images.lerp_(x, weight)
        else:
            self.value[rows], self.fooled[rows] = value, hit
            self.images[rows] = self.images[rows].lerp_(x, weight)

    def merge(self, other: Best, rows: Tensor | None = None) -> None:
        """Keep what `other` met, its images at `rows` among these, where that is better."""
        self.update(other.images, other.value, fooled=other.fooled, rows=rows)


def best_of(context: AttackContext, draw: Callable[[int], Tensor], trials: int, loss: LossFunction) -> Tensor:
    """The best of what `draw` gives for 0, 1, ..., one pass each; of a single one, without a pass, that one."""
    if trials == 1:
        return draw(0)
    best = Best(context.images)
    for number in range(trials):
        x = draw(number)
        logits = context.logits(x)
        best.update(x, context.value(logits, loss), fooled=context.fooled(logits))
    return best.images
