"""Sparse-RS: a score-based black-box attack on few pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from unperturb import per_image_rng
from unperturb.attacks.base import Attack, attacks
from unperturb.attacks.context import AttackContext, PerImage
from unperturb.attacks.losses import margin
from unperturb.attacks.projections import column

# The share of the pixels that are exchanged is divided by so much after so many of 10,000 queries.
_DIVIDED = ((0, 2), (50, 4), (200, 5), (500, 6), (1000, 8), (2000, 10), (4000, 12), (6000, 15), (8000, 20))
_ORDER, _COLORS = 1 << 42, 1 << 43  # which draws are which


@attacks.register("sparse_rs")
@dataclass(frozen=True, kw_only=True)
class SparseRS(Attack):
    """Random search over which `pixels` are changed, each to 0 or 1 in every channel: some are exchanged for others,
    and kept where that raises the margin; asks for logits, never for gradients.

    pixels: places that may change, all channels of a place together. queries: forward passes per image at most.
    alpha: twice the share of the pixels that the first queries exchange; it shrinks with their number. first_success:
    an image leaves with its first success; without it, for a random model, all stay to the end, and of three queries
    two ask at the new image and one again at the held one, which is judged by the mean of its answers, so that a lucky
    one does not last.

    Raises `ValueError` for settings out of range.

    Source: Croce et al. 2022, "Sparse-RS", algorithm 1 for L0, with the schedule of their code. Not
    theirs: where one pixel alone is exchanged, its colors are drawn like all others, without another query for them.
    """

    needs_gradient: ClassVar[bool] = False

    pixels: int = 10
    queries: int = 5000
    alpha: float = 0.3
    first_success: bool = True

    def __post_init__(self) -> None:
        if self.pixels < 1 or self.queries < 1:
            raise ValueError("pixels and queries must be at least 1")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must lie in (0, 1], not {self.alpha}")

    def for_random_model(self, eot_samples: int = 20) -> SparseRS:
        return replace(self, first_success=False)

    def perturb(self, context: AttackContext) -> Tensor:
        answer = context.images.clone()
        rows = torch.arange(len(answer), device=answer.device)
        places = answer[0, 0].numel()
        count = min(self.pixels, places)
        spare = places - count or count
        ranks = _ranks(context, 0, places)
        chosen = ranks < count
        x = _painted(context, context.images, chosen, 0)
        logits = context.logits(x)
        held = _Held(context, rows, x, chosen, context.value(logits, margin), torch.ones_like(rows))
        if self.first_success:
            held = self._leave(held, answer, context.clearly_fooled(logits))
        # Without it, of three queries two are of the new image.
        for query in range(1, self.queries) if self.first_success else range(1, self.queries - 2, 3):
            if not len(held.rows):
                break
            x, chosen = held.exchanged(min(self._exchange(query, count), spare), query)
            logits = held.context.logits(x)
            value, fooled = held.context.value(logits, margin), held.context.clearly_fooled(logits)
            if self.first_success:
                held.take(x, chosen, value, (value > held.value) | fooled)
                held = self._leave(held, answer, fooled)
            else:
                value = (value + held.context.value(held.context.logits(x), margin)) / 2
                held.ask_again()
                held.take(x, chosen, value, value > held.value)
        answer[held.rows] = held.x
        return answer

    def _exchange(self, query: int, count: int) -> int:
        """How many of `count` pixels the query numbered `query` exchanges."""
        at = query * 10_000 / self.queries
        share = self.alpha / max(by for after, by in _DIVIDED if at > after)
        return max(1, math.floor(share * count))

    def _leave(self, held: _Held, answer: Tensor, fooled: Tensor) -> _Held:
        if not bool(fooled.any()):  # the one look at the device per query
            return held
        answer[held.rows[fooled]] = held.x[fooled]
        return held.select((~fooled).nonzero().squeeze(1))


@dataclass
class _Held(PerImage):
    """What each image that still stands holds: its best point, which places it changes `(N, P)`, the mean margin there.

    rows: its place in the answer. answers: how many answers the mean is of.
    """

    context: AttackContext
    rows: Tensor
    x: Tensor
    chosen: Tensor
    value: Tensor
    answers: Tensor

    def exchanged(self, many: int, query: int) -> tuple[Tensor, Tensor]:
        """The held images with `many` of their places, drawn at random, put back, and as many others painted."""
        order = _ranks(self.context, query, self.chosen.shape[1])
        inside = torch.where(self.chosen, order, self.chosen.shape[1]).argsort(1).argsort(1)
        outside = torch.where(self.chosen, self.chosen.shape[1], order).argsort(1).argsort(1)
        taken = self.chosen & (inside < many)
        # Where every place is changed already, what is taken is painted anew.
        new = torch.where(self.chosen.all(1, keepdim=True), taken, ~self.chosen & (outside < many))
        back = torch.where(_as_mask(taken, self.x), self.context.images, self.x)
        return _painted(self.context, back, new, query), (self.chosen & ~taken) | new

    def take(self, x: Tensor, chosen: Tensor, value: Tensor, better: Tensor) -> None:
        self.x = torch.where(column(better, x), x, self.x)
        self.chosen = torch.where(better[:, None], chosen, self.chosen)
        self.value = torch.where(better, value, self.value)
        self.answers = torch.where(better, 2, self.answers)

    def ask_again(self) -> None:
        """One more answer at the held images, so that a lucky one does not last."""
        value = self.context.value(self.context.logits(self.x), margin)
        self.value = (self.value * self.answers + value) / (self.answers + 1)
        self.answers = self.answers + 1


def _ranks(context: AttackContext, query: int, places: int) -> Tensor:
    """A random order of the places, each image's own: `(N, P)`."""
    numbers = per_image_rng.uniform(context.seed, context.index, _ORDER + query, (places,))
    return numbers.argsort(1).argsort(1)


def _as_mask(places: Tensor, like: Tensor) -> Tensor:
    return places.reshape(len(like), 1, *like.shape[2:])


def _painted(context: AttackContext, x: Tensor, places: Tensor, query: int) -> Tensor:
    """`x` with 0 or 1 at random in every channel of `places` `(N, P)`."""
    colors = per_image_rng.uniform(context.seed, context.index, _COLORS + query, x.shape[1:]).round()
    return torch.where(_as_mask(places, x), colors, x)
