"""What an image, a label and a budget are, and how one that is not is refused."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor


def budget(value: float | str) -> float:
    """A budget in [0, 1] pixel units from a number or a fraction such as `"8/255"`; raises `ValueError`."""
    try:
        number = float(Fraction(value)) if isinstance(value, str) else float(value)
    except (ValueError, ZeroDivisionError, TypeError):
        raise ValueError(f"a budget is a number or a fraction such as '8/255', not {value!r}") from None
    if not 0 <= number < float("inf"):
        raise ValueError(f"a budget is finite and not negative, not {value!r}")
    return number


def check_images(images: Tensor) -> None:
    """Raise `TypeError` or `ValueError` unless `images` is float `(N, C, H, W)` in [0, 1] without NaN."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a float tensor in [0, 1], not {kind}; divide 8-bit images by 255")
    if images.dim() != 4:
        raise ValueError(f"images must have shape (N, C, H, W), not {tuple(images.shape)}")
    if images.numel() == 0:
        return
    low, high = (float(v) for v in images.aminmax())
    if low != low or high != high:
        raise ValueError("images hold NaN pixels")
    if low < 0 or high > 1:
        raise ValueError(
            f"images must lie in [0, 1], found [{low:.4g}, {high:.4g}]; mean/std normalization belongs in the "
            "classifier's first layer (see unperturb.wrap)"
        )


def check_labels(images: Tensor, labels: Tensor) -> None:
    """Raise unless `labels` is an integer `(N,)` tensor of classes for `images`."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype is torch.bool:
        raise TypeError("labels must be an integer tensor of class numbers")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{len(images)} images need labels of shape ({len(images)},), not {tuple(labels.shape)}")
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(f"label {int(labels.min())} is out of range: classes count from 0")
