"""Where an adversarial image may lie: balls around the clean one, inside [0, 1]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]


def column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))


def l2_norm(delta: Tensor) -> Tensor:
    """L2 norm per image, `(N,)`."""
    return torch.linalg.vector_norm(delta.flatten(1), dim=1)


def project_(x: Tensor, center: Tensor, eps: float | Tensor, norm: Norm) -> Tensor:
    """The point of (ball of radius `eps` around `center`) and [0, 1] that is nearest to `x`; all `(N, C, H, W)`, the
    radius a number or one per image `(N,)`.

    In L2 that point is `clip(center + t (x - center))` for one t per image; t is found by rescaling the coordinates
    that are still off the box until no more of them reach it.
    """
    if norm == "linf":
        eps = column(eps, x) if isinstance(eps, Tensor) else eps
        return torch.clamp(x, (center - eps).clamp_(min=0), (center + eps).clamp_(max=1))
    eps = eps[:, None] if isinstance(eps, Tensor) else eps
    delta = (x - center).flatten(1)
    flat = center.flatten(1)
    room = torch.where(delta > 0, 1 - flat, flat)  # how far each coordinate can go before it meets the box
    size = delta.abs()
    t = torch.ones_like(size[:, :1])
    outside = torch.minimum(size, room).square().sum(1, keepdim=True) > eps * eps
    for _ in range(12):
        on_box = t * size >= room
        left = eps * eps - torch.where(on_box, room, 0).square().sum(1, keepdim=True)
        free = torch.where(on_box, 0, size).square().sum(1, keepdim=True)
        step = (left.clamp(min=0) / free.clamp(min=1e-30)).sqrt()
        t = torch.where(outside, step.clamp(max=1.0), t)
    moved = torch.minimum(t * size, room)
    length = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
    moved = moved * (eps / length.clamp(min=1e-30)).clamp(max=1)
    return (flat + moved * delta.sign()).reshape_as(x).clamp_(0, 1)


def projection(center: Tensor, eps: float, norm: Norm) -> Callable[[Tensor], Tensor]:
    """`project_` onto the one set again and again: it may work in place, and in Linf the walls are built once."""
    if norm != "linf":
        return lambda x: project_(x, center, eps, norm)
    low, high = (center - eps).clamp_(min=0), (center + eps).clamp_(max=1)
    return lambda x: torch.clamp(x, low, high, out=x)


def to_8_bit(x: Tensor, center: Tensor, eps: float | None, norm: Norm) -> Tensor:
    """`x` with every pixel a whole number of 255ths, as pictures are kept, still in the ball around `center`.

    Each pixel is rounded to the nearest level. Where that leaves the ball it is rounded towards the original: in Linf
    that pixel, in L2 as few pixels of the image as are needed. eps: None for no ball.

    Raises `ValueError` where no such image is within `eps`: the original has no 8 bits itself, and `eps` is too small.
    """
    levels, original = x.double() * 255, center.double() * 255
    whole = original.round()
    original = torch.where((original - whole).abs() < 1e-4, whole, original)  # what float32 leaves of k / 255
    near = levels.round()
    if eps is not None:
        radius = eps * 255 + 2e-5  # 8e-8 of a pixel, for budgets that are whole levels
        below, above = levels.floor(), levels.ceil()
        back = torch.where((below - original).abs() <= (above - original).abs(), below, above)
        if norm == "linf":
            near = torch.where((near - original).abs() <= radius, near, back)
            inside = (near - original).abs().flatten(1).amax(1) <= radius
        else:
            near, inside = _round_back(near, back, original, radius)
        if not bool(inside.all()):
            raise ValueError(
                f"no 8-bit image was found within eps {eps:g} of {int((~inside).sum())} of {len(x)} images: they are "
                "no 8-bit images themselves. Round them first, or take a larger eps"
            )
    return (near.clamp(0, 255) / 255).to(x.dtype)


def _round_back(near: Tensor, back: Tensor, original: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """`near` with those of its pixels replaced by `back`'s that bring most, until each image is within `radius`; and
    whether it is, `(N,)`."""
    near, back, original, shape = near.flatten(1), back.flatten(1), original.flatten(1), near.shape
    size = (near - original).square()
    gain = size - (back - original).square()
    gain, order = gain.sort(dim=1, descending=True)
    before = size.sum(1, keepdim=True) - gain.cumsum(1) + gain  # the squared distance before each is replaced
    replaced = (before > radius * radius) & (gain > 0)
    near = torch.where(torch.zeros_like(replaced).scatter_(1, order, replaced), back, near)
    return near.reshape(shape), (near - original).square().sum(1).sqrt() <= radius
