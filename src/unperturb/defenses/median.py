"""The median filter."""

from __future__ import annotations

from torch import Tensor

from unperturb.defenses.base import Defense, defenses


@defenses.register("median")
class Median(Defense):
    """Each pixel becomes the median of its neighborhood, channel by channel; the border is mirrored.

    kernel: side of the neighborhood in pixels, odd. The gradient is exact: it goes to the pixel that is the median.

    Source: Xu et al. 2018, "Feature squeezing" (local smoothing).
    """

    def __init__(self, *, kernel: int = 3) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and at least 1, not {kernel}")
        self.kernel = kernel

    def purify(self, images: Tensor) -> Tensor:
        from kornia.filters import median_blur

        out: Tensor = median_blur(images, self.kernel)
        return out
