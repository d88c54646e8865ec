"""What an image and a label are, and how one that is not is refused."""

from __future__ import annotations

import torch
from torch import Tensor

_OVERSHOOT = 1e-6  # what arithmetic in float32 leaves outside [0, 1]


def check_form(images: Tensor) -> None:
    """Raise `TypeError` or `ValueError` unless `images` is float `(N, C, H, W)`; no pixel is looked at."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a float tensor in [0, 1], not {kind}; divide 8-bit images by 255")
    if images.dim() != 4:
        raise ValueError(f"images must have shape (N, C, H, W), not {tuple(images.shape)}")


def check_images(images: Tensor) -> Tensor:
    """`images`, float `(N, C, H, W)` in [0, 1], cut to it where they overshoot by rounding alone.

    Raises `TypeError` or `ValueError` for any other dtype or shape, for NaN, and for pixels outside [0, 1].
    """
    check_form(images)
    if images.numel() == 0:
        return images
    low, high = (float(v) for v in images.detach().aminmax())
    if low != low or high != high:
        raise ValueError("images hold NaN pixels")
    if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
        if low >= 0:
            advice = "divide pixels of 0 to 255 by 255"
        else:
            advice = "mean/std normalization belongs in the classifier's first layer (see unperturb.wrap)"
        raise ValueError(f"images must lie in [0, 1], found [{low:.7g}, {high:.7g}]; {advice}")
    return images.clamp(0, 1) if low < 0 or high > 1 else images


def check_labels(images: Tensor, labels: Tensor) -> None:
    """Raise unless `labels` is an integer `(N,)` tensor of classes for `images`."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype is torch.bool:
        raise TypeError("labels must be an integer tensor of class numbers")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{len(images)} images need labels of shape ({len(images)},), not {tuple(labels.shape)}")
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(f"label {int(labels.min())} is out of range: classes count from 0")
