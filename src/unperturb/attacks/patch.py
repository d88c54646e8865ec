"""Adversarial patch: a small part of the image, changed at will."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unperturb import per_image_rng
from unperturb.attacks.base import Attack, attacks
from unperturb.attacks.context import AttackContext
from unperturb.attacks.kinds import Best
from unperturb.attacks.losses import LossFunction, attack_loss, checked_loss

_MOMENTUM = 0.9


@attacks.register("patch")
@dataclass(frozen=True, kw_only=True)
class PatchAttack(Attack):
    """A square patch of any pixels in [0, 1], pasted over each image; all else stays as it was.

    area: share of the image that the unturned, unscaled patch may cover. position: `"random"` (each image's own),
    `"center"`, or (row, column) of its upper left pixel; a turned or scaled patch keeps that center as far as the image
    has room. rotation: degrees; each placement draws an angle in [-rotation, rotation]. scale: each placement draws a
    factor in this range. eot_samples: 0 makes the patch for the one placement that the returned image shows; n averages
    over n fresh placements per step, and the returned image shows one that was not trained on. universal: one patch for
    the whole batch, which then decides together. steps: forward+backward passes (times eot_samples). lr: step in pixel
    units, along the sign of the momentum. loss: what is maximized, a
    name or a function as in a ball attack.

    Without eot_samples the patch with the highest loss met is returned (of patches for one image, that of a success
    before any other), with it the last one: a mean over few placements tells more of the placements than of the patch.

    Source: Brown et al. 2017, "Adversarial patch".
    """

    area: float = 0.05
    position: str | tuple[int, int] = "random"
    rotation: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    eot_samples: int = 0
    universal: bool = False
    steps: int = 100
    lr: float = 0.05
    loss: str | LossFunction = "cross_entropy"

    def __post_init__(self) -> None:
        if not isinstance(self.position, str):
            object.__setattr__(self, "position", tuple(self.position))
        object.__setattr__(self, "scale", tuple(self.scale))
        if not 0 < self.area <= 1:
            raise ValueError(f"area is a share of the image in (0, 1], not {self.area}")
        if isinstance(self.position, str) and self.position not in ("random", "center"):
            raise ValueError(f"position must be 'random', 'center' or (row, column), not {self.position!r}")
        if not isinstance(self.position, str) and (len(self.position) != 2 or min(self.position) < 0):
            raise ValueError(f"position must be 'random', 'center' or (row, column), not {self.position!r}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be (smallest, largest) factor, not {self.scale!r}")
        if self.steps < 1 or self.eot_samples < 0 or self.lr <= 0:
            raise ValueError("steps must be at least 1, eot_samples not negative and lr positive")
        object.__setattr__(self, "loss", checked_loss(self.loss))

    def perturb(self, context: AttackContext) -> Tensor:
        count, channels, height, width = context.images.shape
        side = self.side(height, width)
        patch = context.images.new_full((1 if self.universal else count, channels, side, side), 0.5)
        best, momentum = Best(patch), torch.zeros_like(patch)
        shown = self._place(context, side, 0)
        for step in range(self.steps):
            if self.eot_samples:
                gradient = torch.zeros_like(patch)
                for draw in range(1 + step * self.eot_samples, 1 + (step + 1) * self.eot_samples):
                    gradient += self._gradient(context, patch, self._place(context, side, draw))[2]
            else:
                value, logits, gradient = self._gradient(context, patch, shown)
                self._keep(context, best, patch, value, logits)
            # Clamped: a zero gradient adds nothing, where a division by zero would add NaN.
            gradient = gradient / gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-30)
            momentum = momentum.mul_(_MOMENTUM).add_(gradient)
            patch = torch.add(patch, momentum.sign(), alpha=self.lr).clamp_(0, 1)
        if not self.eot_samples:
            logits = context.logits(self._paste(context, patch, shown))
            self._keep(context, best, patch, context.value(logits, self._loss(context)), logits)
            patch = best.images
        return self._paste(context, patch, shown)

    def side(self, height: int, width: int) -> int:
        """Side of the unscaled patch in pixels: the largest square of at most `area` of the image, at least 1."""
        return max(1, min(math.floor(math.sqrt(self.area * height * width) + 1e-9), height, width))

    def _loss(self, context: AttackContext) -> LossFunction:
        return attack_loss(self.loss, targeted=context.targeted)

    def _keep(self, context: AttackContext, best: Best, patch: Tensor, value: Tensor, logits: Tensor) -> None:
        """What the model says of the pasted patch: each image's own patch by its success first, one for all by the sum
        of losses."""
        if self.universal:
            best.update(patch, value.sum(0, keepdim=True))
        else:
            best.update(patch, value, fooled=context.fooled(logits))

    def _gradient(
        self, context: AttackContext, patch: Tensor, where: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss per image, `(N,)`, the logits, and the gradient per patch, through the pasting."""
        with torch.enable_grad():
            patch = patch.detach().requires_grad_()
            x = self._paste(context, patch, where)
        value, gradient, logits = context.gradient(x, self._loss(context))
        (gradient,) = torch.autograd.grad(x, patch, gradient)
        return value, logits, gradient

    def _paste(self, context: AttackContext, patch: Tensor, where: tuple[Tensor, Tensor]) -> Tensor:
        """The images with the patch on the pixels of the mask, and untouched elsewhere."""
        mask, grid = where
        pasted = F.grid_sample(patch.expand(len(grid), -1, -1, -1), grid, padding_mode="border", align_corners=False)
        return torch.where(mask, pasted, context.images)

    def _place(self, context: AttackContext, side: int, step: int) -> tuple[Tensor, Tensor]:
        """One placement per image: (mask `(N, 1, H, W)`, where each of its pixels lies on the patch `(N, H, W, 2)`)."""
        height, width = context.images.shape[2:]
        numbers = per_image_rng.uniform(context.seed, context.index, step, (4,))
        angle = (2 * numbers[:, 2] - 1) * math.radians(self.rotation)
        scale = self.scale[0] + (self.scale[1] - self.scale[0]) * numbers[:, 3]
        cos, sin = angle.cos(), angle.sin()
        reach = 0.5 * side * scale * (cos.abs() + sin.abs())  # from its center to the edge of its upright bounding box
        centers = []
        for axis, size in enumerate((height, width)):
            half = reach.clamp(max=size / 2)
            if self.position == "random":
                # Whole pixels from the edge, so that an upright patch lies on the pixel grid.
                free = (size - 2 * half + 1e-4).floor()
                center = half + (numbers[:, axis] * (free + 1)).floor().clamp(max=free)
            else:
                start = (size - side) // 2 if isinstance(self.position, str) else self.position[axis]
                if start + side > size:
                    raise ValueError(f"a patch of side {side} at {self.position} leaves an image of {height} x {width}")
                center = torch.minimum(torch.maximum(torch.full_like(half, start + side / 2), half), size - half)
            centers.append(center)
        down = (torch.arange(height, device=angle.device) + 0.5)[None, :, None] - centers[0][:, None, None]
        right = (torch.arange(width, device=angle.device) + 0.5)[None, None, :] - centers[1][:, None, None]
        # Back onto the patch, whose sides lie at -1 and 1: turn by minus the angle, divide by the scale.
        cos, sin, unit = (v[:, None, None] for v in (cos, sin, 2 / (side * scale)))
        grid = torch.stack([(right * cos + down * sin) * unit, (down * cos - right * sin) * unit], dim=-1)
        return (grid.abs() <= 1).all(-1)[:, None], grid
