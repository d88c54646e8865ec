"""Square: a score-based black-box attack by random search."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from unperturb import per_image_rng
from unperturb.attacks.base import attacks
from unperturb.attacks.context import AttackContext, PerImage
from unperturb.attacks.kinds import BallAttack
from unperturb.attacks.losses import margin
from unperturb.attacks.projections import l2_norm

# The share of pixels under the square is halved after so many of 10,000 queries (after 500 in the
# authors' code alone).
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass
class _Held(PerImage):
    """What each image that still stands holds: its best point, and the margin there. rows: its place in the answer."""

    context: AttackContext
    rows: Tensor
    x: Tensor
    value: Tensor


# (context, the held images, query) -> images with a new square.
Paint = Callable[[AttackContext, Tensor, int], Tensor]


def _signs(numbers: Tensor) -> Tensor:
    return torch.where(numbers < 0.5, -1.0, 1.0)


@functools.lru_cache(maxsize=64)  # a schedule knows ten sides, and thousands of queries
def pyramids(side: int, device: torch.device) -> Tensor:
    """`(2, side, side)` of norm 1: two adjacent pyramids of opposite sign, side by side and one above the other.

    A pyramid's height at Chebyshev distance d from its center is the sum of 1/k^2 over k > d.
    """
    halves = []
    for rows in (side // 2, side - side // 2):
        center = (rows // 2, side // 2)
        distance = torch.maximum(
            (torch.arange(rows) - center[0]).abs()[:, None], (torch.arange(side) - center[1]).abs()[None, :]
        )
        layers = torch.arange(1, max(rows, side) // 2 + 2, dtype=torch.float32)
        height = ((distance[..., None] < layers) / layers.square()).sum(-1)
        halves.append(height / height.norm().clamp(min=1e-12))
    both = torch.cat([halves[0], -halves[1]])
    both = both / both.norm().clamp(min=1e-12)
    return torch.stack([both, both.T]).to(device)


@attacks.register("square")
@dataclass(frozen=True, kw_only=True)
class Square(BallAttack):
    """Random squares at the ball's surface, kept where they raise the margin; asks for logits, never for gradients.

    queries: forward passes per image at most. p_init: share of the pixels under the first squares. first_success: an
    image leaves with its first success; without it, for a random model, all stay to the end, and of three queries two
    ask at the new image and one again at the held one, which is judged by the mean of its answers, so that a lucky one
    does not last. The margin is what is maximized, targeted too, so `loss` has no say. A given start is asked first,
    the stripes next.

    Source: Andriushchenko et al. 2020, algorithms 1, 2 (Linf) and 3 (L2).
    """

    needs_gradient: ClassVar[bool] = False
    uses_start: ClassVar[bool] = True

    loss: str = "margin"
    queries: int = 5000
    p_init: float = 0.8
    first_success: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss != "margin":
            raise ValueError(f"square maximizes the margin, loss cannot be {self.loss!r}")
        if self.queries < 1:
            raise ValueError("queries must be at least 1")
        if not 0 < self.p_init <= 1:
            raise ValueError(f"p_init must lie in (0, 1], not {self.p_init}")

    def for_random_model(self, eot_samples: int = 20) -> Square:
        return replace(self, first_success=False)

    def perturb(self, context: AttackContext) -> Tensor:
        found = context.images.clone()
        begin, square = (self._stripes, self._paint_linf) if self.norm == "linf" else (self._tiles, self._paint_l2)

        def paint(part: AttackContext, x: Tensor, query: int) -> Tensor:
            late = query == 1 and part.start is not None  # the start was asked in place of what the search begins with
            return begin(part) if late else square(part, x, query, self._share(query))

        x = begin(context) if context.start is None else context.start
        logits = context.logits(x)
        value, fooled = context.value(logits, margin), context.clearly_fooled(logits)
        if not self.first_success:
            return self._to_the_end(context, x, value, paint)
        now = _Held(context=context, rows=torch.arange(len(x), device=x.device), x=x, value=value)
        for query in range(1, self.queries):
            # The one look at the device per query: exact counts are the point of a query-limited attack.
            if bool(fooled.any()):
                found[now.rows[fooled]] = now.x[fooled]
                now = now.select((~fooled).nonzero().squeeze(1))
            if not len(now.rows):
                return found
            new = paint(now.context, now.x, query)
            logits = now.context.logits(new)
            new_value, fooled = now.context.value(logits, margin), now.context.clearly_fooled(logits)
            better = (new_value > now.value) | fooled
            now.x = torch.where(better[:, None, None, None], new, now.x)
            now.value = torch.where(better, new_value, now.value)
        found[now.rows] = now.x
        return found

    def _to_the_end(self, context: AttackContext, x: Tensor, value: Tensor, paint: Paint) -> Tensor:
        answers = torch.ones_like(value)  # how many of them `value` is the mean of
        for query in range(1, self.queries - 2, 3):
            new = paint(context, x, query)
            new_value = (context.value(context.logits(new), margin) + context.value(context.logits(new), margin)) / 2
            answers += 1
            value = value + (context.value(context.logits(x), margin) - value) / answers
            better = new_value > value
            x = torch.where(better[:, None, None, None], new, x)
            value, answers = torch.where(better, new_value, value), torch.where(better, 2.0, answers)
        return x

    def _share(self, query: int) -> float:
        passed = query * 10_000 // self.queries
        return self.p_init / 2 ** sum(passed > limit for limit in _HALVED_AFTER)

    def _stripes(self, context: AttackContext) -> Tensor:
        _, channels, _, width = context.images.shape
        signs = _signs(per_image_rng.uniform(context.seed, context.index, 0, (channels, 1, width)))
        return (context.images + self.eps * signs).clamp_(0, 1)

    def _paint_linf(self, context: AttackContext, x: Tensor, query: int, share: float) -> Tensor:
        _, channels, height, width = x.shape
        side = max(1, min(round(math.sqrt(share * height * width)), height, width))
        numbers = per_image_rng.uniform(context.seed, context.index, query, (2 + channels,))
        top, left = _corners(numbers[:, :2], side, height, width)
        rows, columns = (torch.arange(n, device=x.device) for n in (height, width))
        inside = ((rows >= top) & (rows < top + side))[:, None, :, None]
        inside = inside & ((columns >= left) & (columns < left + side))[:, None, None, :]
        signs = _signs(numbers[:, 2:])[:, :, None, None]
        return torch.where(inside, (context.images + self.eps * signs).clamp_(0, 1), x)

    def _tiles(self, context: AttackContext) -> Tensor:
        # 5 tiles along a side; what is left over is margin.
        n, channels, height, width = context.images.shape
        side = max(1, min(height, width) // 5)
        down, across = height // side, width // side
        numbers = per_image_rng.uniform(context.seed, context.index, 0, (1 + channels * down * across,))
        tile = self._pyramid(numbers[:, 0], side)[:, None, None, :, None, :]
        signs = _signs(numbers[:, 1:]).reshape(n, channels, down, 1, across, 1)
        delta = torch.zeros_like(context.images)
        top, left = (height - down * side) // 2, (width - across * side) // 2
        delta[:, :, top : top + down * side, left : left + across * side] = (signs * tile).reshape(
            n, channels, down * side, across * side
        )
        return self._onto_sphere(context, delta)

    def _paint_l2(self, context: AttackContext, x: Tensor, query: int, share: float) -> Tensor:
        n, channels, height, width = x.shape
        # Odd, and at least 3: smaller pyramids have no shape.
        side = min(max(round(math.sqrt(share * height * width)), 3) | 1, height, width)
        numbers = per_image_rng.uniform(context.seed, context.index, query, (5 + channels,))
        delta = (x - context.images).flatten(2)
        here = self._window(numbers[:, :2], side, height, width).expand(n, channels, -1)
        there = self._window(numbers[:, 2:4], side, height, width).expand(n, channels, -1)
        old = delta.gather(2, here)
        rest = delta.scatter(2, here, 0).scatter(2, there, 0)
        # The first window spends what both held, channel by channel, and what the ball has left, in equal parts.
        freed = delta.square().sum(2) - rest.square().sum(2)
        unspent = (self.eps**2 - delta.square().sum((1, 2))).clamp(min=0)
        fresh = self._pyramid(numbers[:, 4], side).flatten(1)[:, None] * _signs(numbers[:, 5:])[:, :, None]
        fresh = fresh + old / torch.linalg.vector_norm(old, dim=2, keepdim=True).clamp(min=1e-12)
        fresh = fresh / torch.linalg.vector_norm(fresh, dim=2, keepdim=True).clamp(min=1e-12)
        size = (unspent[:, None] / channels + freed).clamp(min=0).sqrt()[:, :, None]
        return self._onto_sphere(context, rest.scatter(2, here, fresh * size).reshape_as(x))

    def _window(self, numbers: Tensor, side: int, height: int, width: int) -> Tensor:
        """`(N, 1, side * side)` positions in the flattened image of a window drawn by `numbers` `(N, 2)`."""
        top, left = _corners(numbers, side, height, width)
        steps = torch.arange(side, device=numbers.device)
        return ((top + steps)[:, :, None] * width + (left + steps)[:, None, :]).flatten(1)[:, None]

    def _pyramid(self, numbers: Tensor, side: int) -> Tensor:
        """`(N, side, side)`: one of the two orientations each, by `numbers` `(N,)`."""
        return pyramids(side, numbers.device)[(numbers < 0.5).long()]

    def _onto_sphere(self, context: AttackContext, delta: Tensor) -> Tensor:
        unit = delta / l2_norm(delta).clamp(min=1e-12)[:, None, None, None]
        return (context.images + self.eps * unit).clamp_(0, 1)


def _corners(numbers: Tensor, side: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Two `(N, 1)` integers: top and left of a square within the image, drawn by `numbers` `(N, 2)` in [0, 1)."""
    # The clamp: a number just below 1 times a large side rounds up in float32.
    top = (numbers[:, :1] * (height - side + 1)).long().clamp_(max=height - side)
    left = (numbers[:, 1:] * (width - side + 1)).long().clamp_(max=width - side)
    return top, left
