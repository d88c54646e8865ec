"""Gaussian noise, and a denoiser that lets the classifier see through it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.defenses.base import Batch, Defense, defenses
from unperturb.defenses.networks import generators


def stability(logits_denoised: Tensor, logits_clean: Tensor) -> Tensor:
    """Cross-entropy of the denoised noisy image against what the classifier says of the clean one, `(N, K)` logits
    each; no label is needed. Source: Salman et al. 2020, the stability objective."""
    return F.cross_entropy(logits_denoised, logits_clean.argmax(1))


@defenses.register("denoised_smoothing")
class DenoisedSmoothing(Defense):
    """Adds Gaussian noise to the image and takes it out again; each call is one draw of the smoothed classifier.

    channels: of the images. sigma: standard deviation of the noise in pixel units; it is not cut at 0 and 1. denoiser:
    `{"name": ..., options}`, by default the residual U-Net. weights: of the losses "stability" and "mse" (0: not at
    all). It learns from clean images and noise of its own, and looks at no attacked image.

    Source: Salman et al. 2020, "Denoised smoothing: a provable defense for pretrained classifiers", section 3.
    """

    random = True
    learns_from_pairs = False

    def __init__(
        self,
        *,
        channels: int,
        sigma: float = 0.25,
        denoiser: dict[str, Any] | None = None,
        weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        if sigma <= 0:
            raise ValueError(f"sigma must be above 0, not {sigma}")
        self.sigma = sigma
        self.weights = {"stability": 1.0, "mse": 0.0} | (weights or {})
        if set(self.weights) != {"stability", "mse"}:
            raise ValueError(f"weights are of 'stability' and 'mse', not {sorted(self.weights)}")
        self.denoiser = generators.create(**{"channels": channels, "name": "unet", **(denoiser or {})})

    def noisy(self, images: Tensor) -> Tensor:
        """`images` with noise of standard deviation `sigma`, drawn from torch's generator."""
        return images + self.sigma * torch.randn_like(images)

    def purify(self, images: Tensor) -> Tensor:
        return self.denoiser(self.noisy(images))

    def networks(self) -> dict[str, nn.Module]:
        return {"denoiser": self.denoiser}

    def losses(self, batch: Batch, networks: dict[str, nn.Module]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        out = networks["denoiser"](self.noisy(batch.x_real))
        terms = {}
        if self.weights["stability"]:
            with torch.no_grad():
                clean = batch.logits_fn(batch.x_real).float()
            terms["stability"] = self.weights["stability"] * stability(batch.logits_fn(out).float(), clean)
        if self.weights["mse"]:
            terms["mse"] = self.weights["mse"] * F.mse_loss(out, batch.x_real)
        yield "denoiser", terms
