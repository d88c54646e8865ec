"""HopSkipJump: a black-box attack in L2 that sees decisions only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from unperturb import per_image_rng
from unperturb.attacks.base import attacks
from unperturb.attacks.context import AttackContext, PerImage
from unperturb.attacks.kinds import Best, MinimalAttack
from unperturb.attacks.projections import column, l2_norm

_TRIALS = 64  # random images that are shown until one is of another class
_HALVINGS = 12  # of a step that leads back to the label's side, at most
_FEWEST = 10  # queries that an estimate of the gradient is worth making with


@attacks.register("hop_skip_jump")
@dataclass(frozen=True, kw_only=True)
class HopSkipJump(MinimalAttack):
    """From a random image of another class to the boundary, then along it: its normal is estimated from decisions, a
    step is taken that way, and bisection leads back; a minimal-norm attack in L2 that asks for the predicted class
    alone.

    queries: forward passes per image at most, all told. evaluations: queries of the first estimate; that of iteration t
    takes sqrt(t) times as many. gamma: how wide the estimates look and how exact the bisections are, which end within
    gamma D^-1.5 of the way to the image, for D values of an image. A given start costs one query and is where the
    search begins, if it is of another class; random images seldom are of a class that is to be reached.
    The nearest success met is returned, the original where there was none.

    Raises `ValueError` for settings out of range.

    Source: Chen, Jordan & Wainwright 2020, algorithms 1 and 2, with the mean decision as a baseline. Not theirs: of the
    random images three of four are coarse, in blocks.
    """

    needs_gradient: ClassVar[bool] = False
    uses_start: ClassVar[bool] = True

    queries: int = 10_000
    evaluations: int = 100
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if self.queries < 1 or self.evaluations < 1:
            raise ValueError("queries and evaluations must be at least 1")
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma must be positive, not {self.gamma}")

    def perturb(self, context: AttackContext) -> Tensor:
        answer = context.images.clone()
        rows = (~context.fooled(context.logits(answer))).nonzero().squeeze(1)
        if not len(rows):
            return answer
        context = context.select(rows)
        walk = _Walk(context, rows, context.images, torch.ones_like(rows), Best(context.images), self.queries)
        walk = walk.select(walk.begin())
        size = answer[0].numel()
        bisections = max(math.ceil(1.5 * math.log2(size) - math.log2(self.gamma)), 1)
        walk.to_boundary(bisections)
        reserve, iteration = bisections + 1, 0
        while len(walk.rows):
            iteration += 1
            count = torch.full_like(walk.asked, int(self.evaluations * math.sqrt(iteration)))
            count = torch.minimum(count, self.queries - walk.asked - reserve)
            enough = count >= min(_FEWEST, self.evaluations)
            answer[walk.rows] = walk.best.images
            walk, count = walk.select(enough), count[enough]
            if not len(walk.rows):
                break
            far = l2_norm(walk.x - walk.context.images)
            width = far * (self.gamma / size) if iteration > 1 else torch.full_like(far, 0.1)
            normal = walk.normal(count, width, iteration)
            walk.step(normal, far / math.sqrt(iteration), bisections)
            walk.to_boundary(bisections)
        return answer


@dataclass
class _Walk(PerImage):
    """Where the search stands for each image: a success `x`, what it has asked, the nearest success so far.

    rows: the images' places in the answer. queries: what each may ask, all told.
    """

    context: AttackContext
    rows: Tensor
    x: Tensor
    asked: Tensor
    best: Best
    queries: int

    def fooled(self, x: Tensor, who: Tensor, reserve: int = 0) -> Tensor:
        """`(N,)` bool: one query at `x` for those of `who` `(N,)` that have more than `reserve` left, False for the
        others."""
        who = who & (self.asked + reserve < self.queries)
        rows, hit = who.nonzero().squeeze(1), torch.zeros_like(who)
        if len(rows):
            part = self.context if len(rows) == len(who) else self.context.select(rows)
            hit[rows] = part.fooled(part.logits(x[rows]))
            self.asked = self.asked + who
        return hit

    def begin(self) -> Tensor:
        """Leave `x` at a first success, `(N,)` bool where one was found: the start, or a random image."""
        context, images = self.context, self.context.images
        missing = torch.ones_like(self.rows, dtype=torch.bool)
        for trial in range(_TRIALS):
            if not trial and context.start is not None:
                shown = context.start
            else:
                sides = [max(-(-side >> trial % 4), min(side, 2)) for side in images.shape[2:]]
                noise = per_image_rng.uniform(context.seed, context.index, trial, (images.shape[1], *sides))
                shown = F.interpolate(noise, size=images.shape[2:])
            hit = self.fooled(shown, missing)
            self._keep(shown, hit)
            missing = missing & ~hit
            if not bool(missing.any()):
                break
        return ~missing

    def _keep(self, x: Tensor, hit: Tensor) -> None:
        self.x = torch.where(column(hit, x), x, self.x)
        self.best.update(x, torch.where(hit, -l2_norm(x - self.context.images), -torch.inf))

    def to_boundary(self, bisections: int) -> None:
        """Bring `x` as near to the image as it stays a success on the straight way."""
        images, far = self.context.images, self.x
        low, high = torch.zeros_like(far[:, 0, 0, 0]), torch.ones_like(far[:, 0, 0, 0])
        everyone = torch.ones_like(self.rows, dtype=torch.bool)
        for _ in range(bisections):
            middle = (low + high) / 2
            x = torch.lerp(images, far, column(middle, far)).clamp_(0, 1)
            could = self.asked < self.queries
            hit = self.fooled(x, everyone)
            low, high = torch.where(hit | ~could, low, middle), torch.where(hit, middle, high)
            self._keep(x, hit)

    def normal(self, count: Tensor, width: Tensor, iteration: int) -> Tensor:
        """Where another class lies, of L2 norm 1: the mean of `count` `(N,)` random directions, each with the sign of
        what the model says at `width` `(N,)` from `x` that way, less the mean sign."""
        signed, plain = torch.zeros_like(self.x), torch.zeros_like(self.x)
        total = torch.zeros_like(width)
        for draw in range(int(count.max())):
            who = draw < count
            direction = self.context.normal((iteration << 20) + draw)
            direction = direction * column(width / l2_norm(direction).clamp(min=1e-12), direction)
            shown = (self.x + direction).clamp_(0, 1)
            sign = torch.where(self.fooled(shown, who), 1.0, -1.0) * who
            moved = (shown - self.x) * column(who / width.clamp(min=1e-12), shown)
            signed, plain, total = signed + moved * column(sign, moved), plain + moved, total + sign
        mean = total / count
        mean = torch.where(mean.abs() == 1, 0.0, mean)
        normal = signed - plain * column(mean, plain)
        return normal / column(l2_norm(normal).clamp(min=1e-12), normal)

    def step(self, normal: Tensor, length: Tensor, bisections: int) -> None:
        """Move `x` along `normal`, by `length` `(N,)` or the first of its halves at which it stays a success."""
        missing = torch.ones_like(self.rows, dtype=torch.bool)
        for _ in range(_HALVINGS):
            x = (self.x + normal * column(length, normal)).clamp_(0, 1)
            hit = self.fooled(x, missing, reserve=bisections)
            self._keep(x, hit)
            missing, length = missing & ~hit, length / 2
            if not bool(missing.any()):
                break
