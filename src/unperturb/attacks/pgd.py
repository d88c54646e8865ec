"""Projected gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unperturb.attacks.base import attacks
from unperturb.attacks.kinds import IterativeAttack


@attacks.register("pgd")
@dataclass(frozen=True, kw_only=True)
class PGD(IterativeAttack):
    """Steps of `alpha` along the gradient's sign, projected after each; the highest loss met is returned,
    that of a success before any other.

    alpha: step in pixel units (default 2.5 eps / steps, so that the far side of the ball can be reached).
    steps: forward+backward passes per restart. random_start: start uniformly in the ball. restarts: independent
    starts, of which the best per image is kept (only the first may start at the image itself, or at a given start).

    Source: Madry et al. 2018, section 2.1.
    """

    reach: ClassVar[float] = 2.5

    steps: int = 40
    random_start: bool = True
