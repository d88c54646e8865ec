"""Occlusion: squares of the image covered."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unperturb import per_image_rng
from unperturb.attacks.base import Attack, attacks
from unperturb.attacks.context import AttackContext
from unperturb.attacks.kinds import best_of
from unperturb.attacks.losses import attack_loss


@attacks.register("occlusion")
@dataclass(frozen=True, kw_only=True)
class Occlusion(Attack):
    """`count` squares at random places, each image's own, covered with `fill`.

    area: share of the image that one square may cover. fill: in [0, 1]. num_trials: independent tries, of which the one
    with the highest margin is kept per image, a success before any other; a single one does not meet the model. Pairs
    of it teach a purifier to complete what the masks of `certify_patch` cover.

    Source: Zeiler and Fergus 2014, "Visualizing and understanding convolutional networks", section 4.2.
    """

    needs_gradient: ClassVar[bool] = False

    area: float = 0.1
    count: int = 2
    fill: float = 0.5
    num_trials: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.area <= 1:
            raise ValueError(f"area is a share of the image in (0, 1], not {self.area}")
        if self.count < 1 or self.num_trials < 1:
            raise ValueError("count and num_trials must be at least 1")
        if not 0 <= self.fill <= 1:
            raise ValueError(f"fill lies in [0, 1], not {self.fill}")

    def perturb(self, context: AttackContext) -> Tensor:
        loss = attack_loss("margin", targeted=context.targeted)
        return best_of(context, lambda draw: self._covered(context, draw), self.num_trials, loss)

    def _covered(self, context: AttackContext, draw: int) -> Tensor:
        x = context.images
        height, width = x.shape[2:]
        side = max(1, min(math.floor(math.sqrt(self.area * height * width) + 1e-9), height, width))
        numbers = per_image_rng.uniform(context.seed, context.index, draw, (self.count, 2))
        covered = torch.zeros(len(x), 1, height, width, dtype=torch.bool, device=x.device)
        for square in range(self.count):
            inside = []
            for axis, size in enumerate((height, width)):
                first = (numbers[:, square, axis] * (size - side + 1)).floor().clamp(max=size - side)[:, None]
                at = torch.arange(size, device=x.device)
                inside.append((at >= first) & (at < first + side))
            covered |= (inside[0][:, None, :, None]) & (inside[1][:, None, None, :])
        return torch.where(covered, torch.full_like(x, self.fill), x)
