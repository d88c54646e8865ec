"""RayS: a black-box attack that sees decisions only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from unperturb.attacks.base import attacks
from unperturb.attacks.context import SHARED, AttackContext, PerImage
from unperturb.attacks.kinds import MinimalAttack
from unperturb.threat_models import budget

_CORNERS = 64


@attacks.register("rays")
@dataclass(frozen=True, kw_only=True)
class RayS(MinimalAttack):
    """The sign vector along which the boundary is nearest in Linf, found by turning over ever smaller blocks of it; a
    minimal-norm attack that asks for the predicted class alone.

    queries: forward passes per image, all told. eps: an image leaves once it is that near, and one that never gets
    there has failed (default: all queries go into coming nearer). tolerance: of the binary search along a ray.

    Each image is at its own point of the search, and every query of the batch serves all of them. While an image has
    met no other class yet, every other one of its first 64 queries shows it a random corner of the box. A given start
    costs one query; where it is of another class, only nearer points count, and the first ray is the one towards it.

    Source: Chen & Gu 2020, "RayS: a ray searching method for hard-label adversarial attack", algorithms 1-3 (but for
    the corners and the start).
    """

    needs_gradient: ClassVar[bool] = False
    uses_start: ClassVar[bool] = True

    queries: int = 10_000
    eps: float | None = None
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.eps is not None:
            object.__setattr__(self, "eps", budget(self.eps, "linf"))
        if self.queries < 1:
            raise ValueError("queries must be at least 1")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must lie in (0, 1), not {self.tolerance}")

    def perturb(self, context: AttackContext) -> Tensor:
        answer = context.images.clone()
        rows = (~context.fooled(context.logits(answer))).nonzero().squeeze(1)
        if not len(rows):
            return answer
        search = _Search.of(context.select(rows), rows, self.tolerance)
        for query in range(1, self.queries):
            if query == 1 and search.context.start is not None:
                search.ask_at_start(search.context.start)
            else:
                search.ask(query if query < _CORNERS and query % 2 == 0 else None)
            if self.eps is None:
                continue
            near = search.found & (search.radius <= self.eps)
            if bool(near.any()):  # the one look at the device per query, and only where images may leave
                answer[search.rows[near]] = search.point()[near]
                search = search.select((~near).nonzero().squeeze(1))
            if not len(search.rows):
                return answer
        if self.eps is None:
            answer[search.rows] = torch.where(search.found[:, None, None, None], search.point(), search.context.images)
        return answer


@dataclass
class _Search(PerImage):
    """Where the search stands for each image: its best direction and radius, the block that is tried, the bracket.

    rows: the images' places in the answer. low: the radius along `sign` that is known to be too small. level, block:
    how often the image has been halved, and which part is turned over. at_start: whether the nearest success is still
    the given start, at `radius`, and not on a ray. place: the number of each value of an image.
    """

    context: AttackContext
    rows: Tensor
    tolerance: float
    sign: Tensor
    radius: Tensor
    low: Tensor
    found: Tensor
    bisecting: Tensor
    level: Tensor
    block: Tensor
    at_start: Tensor
    place: Tensor = field(metadata=SHARED)

    @classmethod
    def of(cls, context: AttackContext, rows: Tensor, tolerance: float) -> _Search:
        count, size = len(rows), context.images[0].numel()
        one, no = context.images.new_ones(count), torch.zeros_like(rows, dtype=torch.bool)
        return cls(
            context=context,
            rows=rows,
            tolerance=tolerance,
            sign=context.images.new_ones(count, size),
            radius=one,  # at radius 1 every ray has met the corner of the box
            low=torch.zeros_like(one),
            found=no,
            bisecting=no,
            level=torch.zeros_like(rows),
            block=torch.full_like(rows, -1),  # the first ray is tried as it is, nothing turned over
            at_start=no,
            place=torch.arange(size, device=rows.device),
        )

    def ask_at_start(self, start: Tensor) -> None:
        """One query at the start: where it is a success, it is the first, and the first ray goes its way."""
        way = (start - self.context.images).flatten(1)
        self.at_start = self.found = self.context.fooled(self.context.logits(start))
        self.sign = torch.where(self.found[:, None] & (way < 0), -1.0, self.sign)
        self.radius = torch.where(self.found, way.abs().amax(1), self.radius)

    def point(self) -> Tensor:
        """The nearest success so far, where there is one, `(N, C, H, W)`."""
        on_ray = self._along(self.sign, self.radius)
        if self.context.start is None:
            return on_ray
        return torch.where(self.at_start[:, None, None, None], self.context.start, on_ray)

    def _along(self, sign: Tensor, radius: Tensor) -> Tensor:
        images = self.context.images
        return torch.addcmul(images, sign.reshape_as(images), radius[:, None, None, None]).clamp_(0, 1)

    def ask(self, corner: int | None) -> None:
        """One query for every image: halve its bracket, or try its next block at the best radius; with a number in
        `corner`, images that have met no other class try the corner of that number instead."""
        size = self.place.numel()
        length = ((size - 1) >> self.level) + 1  # ceil(size / 2^level)
        begin = (self.block * length)[:, None]
        turned = (self.place >= begin) & (self.place < begin + length[:, None]) & ~self.bisecting[:, None]
        trial = torch.where(turned, -self.sign, self.sign)
        cornered = torch.zeros_like(self.found)
        if corner is not None:
            cornered = ~self.found
            signs = torch.where(self.context.uniform(corner).flatten(1) < 0, -1.0, 1.0)
            trial = torch.where(cornered[:, None], signs, trial)
        radius = torch.where(self.bisecting, (self.low + self.radius) / 2, self.radius)
        hit = self.context.fooled(self.context.logits(self._along(trial, radius)))
        # Bisecting, a hit moves the bracket's upper end and a miss its lower; trying, a hit opens a bracket.
        self.low = torch.where(self.bisecting, torch.where(hit, self.low, radius), 0)
        self.sign = torch.where(hit[:, None], trial, self.sign)
        self.radius = torch.where(hit, radius, self.radius)
        self.found, self.at_start = self.found | hit, self.at_start & ~hit
        self.bisecting = (self.bisecting | hit) & (self.radius - self.low > self.tolerance)
        # Whoever is done with a block goes on to the next one, or to blocks of half the length.
        block = torch.where(cornered | self.bisecting, self.block, self.block + 1)
        over = block * length >= size
        self.block = torch.where(over, 0, block)
        self.level = torch.where(over, self.level + 1, self.level).clamp_(max=(size - 1).bit_length())
