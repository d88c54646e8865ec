"""Fewer levels per pixel."""

from __future__ import annotations

from torch import Tensor

from unperturb.defenses.base import Defense, defenses


@defenses.register("bit_depth")
class BitDepth(Defense):
    """Each value becomes the nearest of `2**bits` levels from 0 to 1.

    bits: 1 to 8. Steps have no gradient; the identity, which they follow on average, stands in for them.
    (Smooth steps would be no better for an attack that goes by the sign: any increasing function gives the same.)

    Source: Xu et al. 2018, "Feature squeezing" (color depth).
    """

    differentiable = False

    def __init__(self, *, bits: int = 3) -> None:
        super().__init__()
        if not 1 <= bits <= 8:
            raise ValueError(f"bits must be 1 to 8, not {bits}")
        self.levels = 2**bits - 1

    def purify(self, images: Tensor) -> Tensor:
        return (images * self.levels).round() / self.levels
