"""Jacobian-based saliency map attack, with an exact search for the best pair that never looks at all pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unperturb.attacks.base import attacks
from unperturb.attacks.context import AttackContext, PerImage
from unperturb.attacks.kinds import MinimalAttack

_SATURATED = 0.01  # a value this near to its limit counts as there: what is left of it could change nothing
_PAIRS_AT_ONCE = 1 << 22  # bounds the memory of the pair scores, whatever the image size


@dataclass
class _Search(PerImage):
    """Where each image that is still searched has come to. rows: its place in the answer; target: `(N, 1)`, the class
    to raise; up, down: `(N, C*H*W)`, what a change of each value does to it and to the rest."""

    context: AttackContext
    rows: Tensor
    x: Tensor
    target: Tensor
    up: Tensor
    down: Tensor


@attacks.register("jsma")
@dataclass(frozen=True, kw_only=True)
class JSMA(MinimalAttack):
    """Moves the two values per step that raise the target most while lowering the rest; a minimal-norm attack (L0).

    theta: what is added to a chosen value, negative to darken; a value leaves the search once it is saturated.
    gamma: share of an image's values that may be changed. pixels: how many are chosen per step, 2 (by the sum of
    their slopes, as in the paper), 1, or more, each for itself: fewer passes, for training against. output: slopes of
    `"logits"` (two backward passes per step) or of `"softmax"` (one: its outputs sum to 1, so the rest falls as the
    target rises). Untargeted, the target is the runner-up class on the clean image, and any wrong class ends the
    search. An image without a pair to raise is given up.

    Source: Papernot et al. 2016, algorithm 3, equations (8)-(10).
    """

    theta: float = 1.0
    gamma: float = 0.145
    pixels: int = 2
    output: Literal["logits", "softmax"] = "logits"

    def __post_init__(self) -> None:
        if not 0 < abs(self.theta) <= 1 or not 0 < self.gamma <= 1:
            raise ValueError("theta must lie in [-1, 1] and not be 0, gamma in (0, 1]")
        if self.pixels < 1:
            raise ValueError(f"pixels must be at least 1, not {self.pixels!r}")
        if self.output not in ("logits", "softmax"):
            raise ValueError(f"output must be 'logits' or 'softmax', not {self.output!r}")

    def perturb(self, context: AttackContext) -> Tensor:
        found = context.images.clone()
        flat = found.flatten(1)
        now = _Search(
            context=context,
            rows=torch.arange(len(found), device=found.device),
            x=context.images,
            target=context.labels[:, None],
            up=flat,
            down=flat,
        )
        stuck = torch.zeros_like(now.rows, dtype=torch.bool)
        for step in range(int(flat.shape[1] * self.gamma / self.pixels)):
            point, logits = now.context.forward(now.x)
            values = logits.detach()
            if not step and not context.targeted:
                now.target = values.scatter(1, now.target, -torch.inf).argmax(1, keepdim=True)
            fooled = now.context.clearly_fooled(values)
            found[now.rows[fooled]] = now.x[fooled]
            active = (~(fooled | stuck)).nonzero().squeeze(1)
            if not len(active):
                return found
            now.up, now.down = self._slopes(now.context, point, logits, now.target)
            if len(active) < len(now.x):
                now = now.select(active)
            flat = now.x.flatten(1)
            free = flat < 1 - _SATURATED if self.theta > 0 else flat > _SATURATED
            if self.pixels == 2:
                chosen, score = best_pair(now.up, now.down, free)
                score = score[:, None].expand(chosen.shape)
            else:
                chosen, score = best_singles(now.up, now.down, free, min(self.pixels, flat.shape[1]))
            stuck = (score < 0).all(1)
            # Added, not set: without a pair both places may be the same, and nothing is added.
            change = torch.where(score < 0, 0.0, self.theta)
            now.x = flat.scatter_add(1, chosen, change).clamp_(0, 1).reshape_as(now.x)
        fooled = now.context.clearly_fooled(now.context.logits(now.x))
        found[now.rows[fooled]] = now.x[fooled]
        return found

    def _slopes(self, context: AttackContext, point: Tensor, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Per value `(N, C*H*W)`: how a step of theta's sign raises the target, and how it lowers the rest."""
        sign = 1.0 if self.theta > 0 else -1.0
        raised = torch.zeros_like(logits.detach()).scatter_(1, target, sign)
        if self.output == "softmax":  # the slope of p_t over p_t: the same order, and it cannot underflow
            up = context.backward(point, logits, raised - sign * logits.detach().softmax(1)).flatten(1)
            return up, up
        up = context.backward(point, logits, raised, keep=True).flatten(1)
        return up, context.backward(point, logits, raised - sign).flatten(1)


def best_singles(up: Tensor, down: Tensor, free: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """The places `(N, count)` of the largest `up * down` with both positive among `free`, and these scores; -1 where
    there are not so many."""
    score, chosen = torch.where(free & (up > 0) & (down > 0), up * down, -1.0).topk(count, dim=1)
    return chosen, score


def best_pair(up: Tensor, down: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """The pair p < q with the largest `(up_p + up_q) (down_p + down_q)`, both sums positive, among `free` places.

    up, down, free: `(N, n)`. Returns the places `(N, 2)` and the score `(N,)`, -1 where there is no such pair. The
    score is brute force's to the bit; of pairs that tie, the lowest places among the candidates are taken.

    If a third place is at least as good as p in both numbers and better in one, putting it in p's stead raises both
    factors. So a best pair lies among the places that at most one other dominates: two Pareto fronts, some dozens of
    places in 150,528. Of equal places the first two are kept.
    """
    up, down = up.masked_fill(~free, -torch.inf), down.masked_fill(~free, -torch.inf)
    # Most places go at once: those below the corner that two good places share.
    scale_up, scale_down = (v.amax(1, keepdim=True).clamp(min=1e-30) for v in (up, down))
    good = torch.minimum(up / scale_up, down / scale_down).topk(min(2, up.shape[1])).indices
    corner_up, corner_down = (v.gather(1, good).amin(1, keepdim=True) for v in (up, down))
    on_corner = (up == corner_up) & (down == corner_down)
    places, up, down = _compact(free & ((up > corner_up) | (down > corner_down) | on_corner), up, down)
    # The two fronts: by falling `up`, a place stays unless two before it have its `down` or more.
    order = down.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, up.gather(1, order).argsort(dim=1, descending=True, stable=True))
    ranked = down.gather(1, order)
    first = ranked.cummax(1).values
    second = torch.minimum(ranked[:, 1:], first[:, :-1]).cummax(1).values
    before = torch.full_like(ranked, -torch.inf)
    before[:, 2:] = second[:, :-1]
    on_fronts = torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, ranked > before)
    inner, up, down = _compact(on_fronts, up, down)
    places = places.gather(1, inner)

    N, M = up.shape
    best, pair = up.new_full((N,), -1.0), places.new_zeros((N, 2))
    rows = max(1, _PAIRS_AT_ONCE // (N * M))
    for start in range(0, M, rows):
        sum_up = up[:, start : start + rows, None] + up[:, None]
        sum_down = down[:, start : start + rows, None] + down[:, None]
        later = torch.ones_like(sum_up[0], dtype=torch.bool).triu_(start + 1)
        scores = torch.where(later & (sum_up > 0) & (sum_down > 0), sum_up * sum_down, -1.0)
        score, at = scores.flatten(1).max(1)
        chosen = torch.stack([places.gather(1, i[:, None]).squeeze(1) for i in (start + at // M, at % M)], 1)
        pair = torch.where((score > best)[:, None], chosen, pair)
        best = torch.maximum(best, score)
    return pair, best


def _compact(keep: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The places kept in each row, moved together: their numbers `(N, M)`, `up` and `down` there, -inf as filling."""
    row, place = keep.nonzero(as_tuple=True)
    counts = keep.sum(1)
    slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    size = (len(keep), max(2, int(counts.max())))
    places = row.new_zeros(size).index_put_((row, slot), place)
    up, down = (v.new_full(size, -torch.inf).index_put_((row, slot), v[row, place]) for v in (up, down))
    return places, up, down
