"""Total variation: the nearest image with less of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unperturb.defenses.base import Defense, defenses


@defenses.register("total_variation")
class TotalVariation(Defense):
    """Approaches `argmin_u ||u - x||^2 / 2 + weight * TV(u)`, TV isotropic, channel by channel.

    weight: how much variation is taken out, in pixel units. steps: of Chambolle's iteration on the dual problem, a
    fixed number, so that every image costs the same and the gradient through all of them is exact.

    Source: Rudin, Osher and Fatemi 1992; Chambolle 2004, equation (9), at step 1/4; as a defense Guo et al. 2018,
    who also drop pixels at random and solve by split Bregman.
    """

    def __init__(self, *, weight: float = 0.1, steps: int = 30) -> None:
        super().__init__()
        if weight <= 0 or steps < 1:
            raise ValueError(f"weight must be above 0 and steps at least 1, not {weight} and {steps}")
        self.weight, self.steps = weight, steps

    def purify(self, images: Tensor) -> Tensor:
        down = right = torch.zeros_like(images)  # the dual field p: one component per direction
        out = images
        for _ in range(self.steps):
            along_down = F.pad(out[:, :, 1:] - out[:, :, :-1], (0, 0, 0, 1))
            along_right = F.pad(out[..., 1:] - out[..., :-1], (0, 1))
            # The tiny constant keeps the root's gradient finite where an image is flat.
            length = (along_down.square() + along_right.square() + 1e-20).sqrt()
            shrink = 1 + 0.25 / self.weight * length
            down = (down - 0.25 * along_down) / shrink
            right = (right - 0.25 * along_right) / shrink
            # x plus the negative divergence of p; the last row and column of p are zero by construction.
            out = images - down - right + F.pad(down[:, :, :-1], (0, 0, 1, 0)) + F.pad(right[..., :-1], (1, 0))
        return out.clamp(0, 1)
