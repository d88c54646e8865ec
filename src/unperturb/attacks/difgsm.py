"""Diverse inputs iterative fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from unperturb import per_image_rng
from unperturb.attacks.base import attacks
from unperturb.attacks.context import AttackContext
from unperturb.attacks.kinds import Look
from unperturb.attacks.losses import LossFunction
from unperturb.attacks.mim import MIM
from unperturb.attacks.projections import column

_DRAWS = 1 << 43  # other draws than those of the start


def resized(x: Tensor, draws: Tensor, rate: float) -> Tensor:
    """Each image `(N, C, H, W)` made smaller, bilinearly, and padded with zeros to its old size.

    draws: `(N, 3)` in [0, 1): the new sides, from `rate` of the old ones up to one pixel less; the place from the top;
    from the left.
    """
    sides, inside = [], torch.ones_like(x[:, :1])
    for axis, place in ((2, draws[:, 1]), (3, draws[:, 2])):
        old = x.shape[axis]
        least = min(int(rate * old), old - 1)
        new = (least + (draws[:, 0] * (old - least)).floor()).clamp_(min=1)
        begin = (place * (old - new + 1)).floor()
        at = torch.arange(old, device=x.device) - begin[:, None]
        sides.append(2 * (at + 0.5) / new[:, None] - 1)  # where to look, from -1 to 1 inside the picture
        kept = ((at >= 0) & (at < new[:, None])).to(x.dtype)
        inside = inside * (kept[:, None, :, None] if axis == 2 else kept[:, None, None, :])
    rows, columns = sides
    grid = torch.stack([columns[:, None, :].expand(-1, x.shape[2], -1), rows[:, :, None].expand(-1, -1, x.shape[3])], 3)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False) * inside


@attacks.register("di_fgsm")
@dataclass(frozen=True, kw_only=True)
class DIFGSM(MIM):
    """MIM whose gradient is that of the image made a little smaller and padded at random, for attacks that are to
    transfer to another model.

    resize_rate: the least new side, as a share of the old one. diversity_prob: how often, in each step but the first
    and for each image, the gradient is that of the resized image. Of a point at which the model was shown the resized
    image alone the loss is not known; the first and the last one are looked at as they are. With decay 0 it has no
    momentum.

    Raises `ValueError` for a share outside of its range.

    Source: Xie et al. 2019, M-DI2-FGSM, resized as in torchattacks: theirs are larger than the image, which
    a model for one size does not take.
    """

    resize_rate: float = 0.9
    diversity_prob: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.resize_rate < 1 or not 0 <= self.diversity_prob <= 1:
            raise ValueError("resize_rate must lie in (0, 1) and diversity_prob in [0, 1]")

    def look(self, context: AttackContext, loss: LossFunction, restart: int) -> Look:
        unmasked = replace(context, mask=None)  # of what the model is shown other pixels are free

        def look(point: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
            draws = per_image_rng.uniform(context.seed, context.index, _DRAWS + restart * self.steps + step, (4,))
            plain = draws[:, 3] >= (self.diversity_prob if step else 0.0)
            with torch.enable_grad():
                x = point.detach().requires_grad_()
                shown = torch.where(column(plain, x), x, resized(x, draws[:, :3], self.resize_rate))
            value, gradient, logits = unmasked.gradient(shown, loss)
            (gradient,) = torch.autograd.grad(shown, x, gradient)
            gradient = gradient if context.mask is None else gradient * context.mask
            return torch.where(plain, value, -torch.inf), context.fooled(logits) & plain, gradient

        return look
