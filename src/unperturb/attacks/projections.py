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


def project_(x: Tensor, center: Tensor, eps: float, norm: Norm) -> Tensor:
    """The point of (ball of radius `eps` around `center`) and [0, 1] that is nearest to `x`; all `(N, C, H, W)`.

    In L2 that point is `clip(center + t (x - center))` for one t per image; t is found by rescaling the coordinates
    that are still off the box until no more of them reach it.
    """
    if norm == "linf":
        return torch.clamp(x, (center - eps).clamp_(min=0), (center + eps).clamp_(max=1))
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
