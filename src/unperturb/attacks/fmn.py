"""Fast minimum-norm attack, in four norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from unperturb.attacks.base import attacks
from unperturb.attacks.context import AttackContext
from unperturb.attacks.kinds import Best, MinimalAttack
from unperturb.attacks.losses import margin
from unperturb.attacks.projections import column, l2_norm, project_

MinimalNorm = Literal["l2", "linf", "l1", "l0"]
_ORDER = {"l2": 2.0, "linf": math.inf, "l1": 1.0}
_DUAL = {"l2": 2.0, "linf": 1.0, "l1": math.inf}


def size_of(delta: Tensor, norm: MinimalNorm) -> Tensor:
    """The norm of each image's perturbation, `(N,)`; in L0 the number of places at which a channel changes."""
    if norm == "l0":
        return (delta != 0).any(1).flatten(1).sum(1).to(delta.dtype)
    return torch.linalg.vector_norm(delta.flatten(1), _ORDER[norm], dim=1)


def project(x: Tensor, images: Tensor, radius: Tensor, norm: MinimalNorm) -> Tensor:
    """The point of (ball of each image's `radius` `(N,)` around `images`) and [0, 1] that is nearest to `x`."""
    if norm == "l2" or norm == "linf":
        return project_(x, images, radius, norm)
    cut = x.clamp(0, 1)
    if norm == "l1":
        delta, room = (x - images).flatten(1), (cut - images).flatten(1).abs()
        moved = delta.sign() * _shortened(delta.abs(), room, radius)
        return (images + moved.reshape_as(images)).clamp_(0, 1)
    # What keeping a place saves of the squared distance: all of it, less what is cut off.
    gain = ((x - images).square() - (x - cut).square()).sum(1).flatten(1)
    order = gain.argsort(1, descending=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.zeros_like(order).scatter_(1, order, places)
    return torch.where((rank < radius[:, None]).reshape_as(x[:, :1]), cut, images)


def _shortened(size: Tensor, room: Tensor, radius: Tensor) -> Tensor:
    """`size` `(N, D)` less one number per image, no value below zero or above its `room`, so that the sum is at most
    `radius` `(N,)`; the number by bisection."""
    low, high = torch.zeros_like(radius), size.amax(1)
    low = torch.where(room.sum(1) > radius, low, -torch.inf)  # inside the ball nothing is taken
    for _ in range(24):
        middle = (low + high) / 2
        over = torch.minimum((size - middle[:, None]).clamp(min=0), room).sum(1) > radius
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return torch.minimum((size - high[:, None]).clamp(min=0), room)


@attacks.register("fmn")
@dataclass(frozen=True, kw_only=True)
class FMN(MinimalAttack):
    """Gradient steps inside a ball that shrinks below each success and otherwise grows to where the boundary seems to
    be; a minimal-norm attack.

    norm: `"l2"`, `"linf"`, `"l1"` or `"l0"` (pixels; all channels of a place are one). steps: forward+backward passes.
    alpha: the first step, its L2 length in pixel units; it falls to a hundredth by cosine. gamma: the share by which
    the radius changes per step, falling to 0.001, and by which the step grows while there was no success yet. The
    smallest success met is returned, the original where there was none.

    Raises `ValueError` for another norm and for settings out of range.

    Source: Pintor et al. 2021, algorithm 1. Not theirs: before the first success the ball is larger by gamma at least
    than where the image stands, for where the box holds pixels back the boundary seems nearer than it is, and the step
    grows, for a short one may stay on a hill of the margin in a ball of any size; the projection is onto ball and
    [0, 1] together; the last point is looked at too; L0 counts places, not values.
    """

    norm: MinimalNorm = "l2"
    steps: int = 100
    alpha: float = 1.0
    gamma: float = 0.05

    def __post_init__(self) -> None:
        if self.norm not in get_args(MinimalNorm):
            raise ValueError(f"norm must be one of {', '.join(get_args(MinimalNorm))}, not {self.norm!r}")
        if self.steps < 2 or not 0 < self.gamma < 1 or not 0 < self.alpha < math.inf:
            raise ValueError("steps must be at least 2, gamma in (0, 1) and alpha positive")

    def perturb(self, context: AttackContext) -> Tensor:
        images = context.images
        best, x = Best(images), images
        farthest = size_of(torch.maximum(images, 1 - images), self.norm)
        radius = torch.full_like(farthest, 0.0 if self.norm != "l0" else 1.0)
        across, longest = math.sqrt(images[0].numel()), torch.full_like(farthest, self.alpha)
        for step in range(self.steps):
            lead, gradient, logits = context.gradient(x, margin)
            fooled, size = context.clearly_fooled(logits), size_of(x - images, self.norm)
            best.update(x, torch.where(fooled, -size, -torch.inf))
            falling = (1 + math.cos(math.pi * step / self.steps)) / 2
            gamma = 0.001 + (self.gamma - 0.001) * falling
            radius = torch.minimum(self._radius(radius, gamma, fooled, best, size, lead, gradient), farthest)
            length = torch.where(best.value > -torch.inf, self.alpha * (0.01 + 0.99 * falling), longest)
            longest = torch.where(longest < across, longest * (1 + self.gamma), longest)
            moved = x + gradient * column(length / l2_norm(gradient).clamp(min=1e-30), gradient)
            x = project(moved, images, radius, self.norm)
        fooled = context.clearly_fooled(context.logits(x))
        best.update(x, torch.where(fooled, -size_of(x - images, self.norm), -torch.inf))
        return best.images

    def _radius(
        self, radius: Tensor, gamma: float, fooled: Tensor, best: Best, size: Tensor, lead: Tensor, gradient: Tensor
    ) -> Tensor:
        """The next ball: a little below the nearest success, a little above where there is none inside, and while none
        was met at all as far as the linearized boundary, if that is more."""
        smaller, larger = radius * (1 - gamma), radius * (1 + gamma)
        met, nearest = best.value > -torch.inf, best.value.neg().to(radius.dtype)
        if self.norm == "l0":  # by at least one pixel; there is no distance to a boundary to begin with
            smaller, larger = torch.minimum(radius - 1, smaller.floor()), torch.maximum(radius + 1, larger.floor())
            return torch.where(fooled, torch.minimum(smaller, nearest), larger).clamp(min=1)
        slope = torch.linalg.vector_norm(gradient.flatten(1), _DUAL[self.norm], dim=1)
        boundary = size + lead.abs() / slope.clamp(min=1e-12)
        larger = torch.where(met, larger, torch.maximum(size * (1 + gamma), boundary))
        return torch.where(fooled, torch.minimum(smaller, nearest), larger)
