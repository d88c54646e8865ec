"""The Gaussian filter."""

from __future__ import annotations

import math

from torch import Tensor

from unperturb.defenses.base import Defense, defenses


@defenses.register("gaussian_blur")
class GaussianBlur(Defense):
    """Each pixel becomes a Gaussian-weighted mean of its neighborhood, channel by channel; the border is mirrored.

    kernel: side of the neighborhood in pixels, odd. sigma: width of the Gaussian in pixels. Linear, so the gradient is
    exact.

    Source: Kurakin, Goodfellow and Bengio 2017, "Adversarial examples in the physical world".
    """

    def __init__(self, *, kernel: int = 3, sigma: float = 1.0) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and at least 1, not {kernel}")
        if not 0 < sigma < math.inf:
            raise ValueError(f"sigma must be above 0 and finite, not {sigma}")
        self.kernel, self.sigma = kernel, sigma

    def purify(self, images: Tensor) -> Tensor:
        from kornia.filters import gaussian_blur2d

        out: Tensor = gaussian_blur2d(images, (self.kernel, self.kernel), (self.sigma, self.sigma))
        return out
