"""JPEG compression, as a file would have it."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor

from unperturb.defenses.base import Defense, defenses


@defenses.register("jpeg")
class JPEG(Defense):
    """Encoded and decoded by the JPEG codec that pictures are saved with (pillow), 8 bits and all.

    quality: 1 to 95, pillow's scale. Grey or RGB. Rounding leaves no gradient, so an attacker is given a
    differentiable codec of the same quality in its place (Shin and Song 2017; Reich et al. 2024, kornia's).

    Source: Dziugaite et al. 2016; Guo et al. 2018.
    """

    differentiable = False

    def __init__(self, *, quality: int = 75) -> None:
        super().__init__()
        if not 1 <= quality <= 95:
            raise ValueError(f"quality must be 1 to 95, not {quality}")
        self.quality = quality

    def purify(self, images: Tensor) -> Tensor:
        _check_channels(images)
        if not len(images):
            return images
        levels = (images.detach() * 255).round().to(torch.uint8).cpu().numpy()
        decoded = np.stack([self._coded(image) for image in levels])
        return torch.from_numpy(decoded).to(images) / 255

    def _coded(self, image: np.ndarray) -> np.ndarray:
        """One uint8 `(C, H, W)` image through the codec."""
        from PIL import Image

        grey = len(image) == 1
        file = io.BytesIO()
        Image.fromarray(image[0] if grey else image.transpose(1, 2, 0)).save(file, "JPEG", quality=self.quality)
        pixels = np.asarray(Image.open(file))
        return pixels[None] if grey else pixels.transpose(2, 0, 1)

    def surrogate_backward(self, images: Tensor) -> Tensor:
        from kornia.enhance import jpeg_codec_differentiable

        _check_channels(images)
        grey = images.shape[1] == 1
        rgb = images.expand(-1, 3, -1, -1) if grey else images  # the codec takes three channels only
        out: Tensor = jpeg_codec_differentiable(rgb, torch.full((1,), float(self.quality)).to(images))
        return out.mean(1, keepdim=True) if grey else out


def _check_channels(images: Tensor) -> None:
    if images.shape[1] not in (1, 3):
        raise ValueError(f"JPEG takes grey or RGB images, not {images.shape[1]} channels")
