"""How far one batch of images lies from another: PSNR, SSIM and the distances of the threat models, per image."""

from __future__ import annotations

import torch
from torch import Tensor

SSIM_WINDOW = 11
# Below this a pixel counts as untouched: float32 arithmetic leaves such differences, 8-bit images cannot hold them.
SAME = 1e-6


def psnr(x: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image, `(N,)` in dB for a peak of 1; inf where the two are identical.

    x, reference: float `(N, C, H, W)` in [0, 1]. Raises `ValueError` where their shapes differ.
    """
    _check(x, reference)
    error = (x.float() - reference.float()).flatten(1).square().mean(1)
    return -10 * torch.log10(error)


def ssim(x: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity per image, `(N,)`, at most 1; NaN where an image is smaller than the 11x11 window.

    x, reference: float `(N, C, H, W)` in [0, 1]. Gaussian window (sigma 1.5), population statistics, border cropped,
    averaged over places and channels. Raises `ValueError` where their shapes differ.

    Source: Wang et al. 2004, section III.B.
    """
    _check(x, reference)
    if len(x) == 0 or min(x.shape[2:]) < SSIM_WINDOW:
        return torch.full((len(x),), torch.nan, device=x.device)
    from kornia.metrics import ssim as similarity

    # "same" would average a padded border, 0.02 low on 28x28 images. On black ground the denominator is 9e-8, so that
    # an eps of 1e-12 shows. A variance in float32 is E[x^2] - E[x]^2 with an error of 1e-4 on bright flat images.
    values = similarity(x.double(), reference.double(), SSIM_WINDOW, eps=0.0, padding="valid")
    return values.flatten(1).mean(1).float()


def distances(x: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """How far `x` was moved, each `(N,)`: `l0` places (all channels of a pixel counted once), `l2`, `linf`.

    x, reference: float `(N, C, H, W)` in [0, 1]; distances are in these units. Raises `ValueError` where their shapes
    differ.
    """
    _check(x, reference)
    delta = (x.float() - reference.float()).abs()
    flat = delta.flatten(1)
    return {
        "l0": (delta.amax(1) > SAME).flatten(1).sum(1),
        "l2": torch.linalg.vector_norm(flat, dim=1),
        "linf": flat.amax(1),
    }


def _check(x: Tensor, reference: Tensor) -> None:
    if x.dim() != 4 or x.shape != reference.shape:
        raise ValueError(
            f"two batches of images of the same shape (N, C, H, W) are needed, "
            f"not {tuple(x.shape)} and {tuple(reference.shape)}"
        )


def moved(before: Tensor, after: Tensor) -> Tensor:
    """`(N,)` in [0, 1]: the probability that moved from some classes to others between two answers, class probabilities
    `(N, K)` each: their total variation distance, half of the L1 distance of Xu et al. 2018, "Feature squeezing",
    section III.
    """
    return (before - after).abs().sum(1).mul(0.5).clamp(max=1)
