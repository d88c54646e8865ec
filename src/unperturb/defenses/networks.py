"""Generators and discriminators."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.registry import Registry
from unperturb.threat_models import budget

generators: Registry[nn.Module] = Registry("generator")
discriminators: Registry[nn.Module] = Registry("discriminator")


def pad_to(images: Tensor, stride: int) -> Tensor:
    """`images` with height and width enlarged to multiples of `stride`, the border repeated."""
    height, width = images.shape[-2:]
    bottom, right = -height % stride, -width % stride
    return F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images


@generators.register("ape")
class ApeGenerator(nn.Module):
    """APE-GAN's generator: two strided convolutions down, two up, batch norm between, any size.

    `(N, C, H, W)` in [0, 1] to the same; inside, the range is [-1, 1], which is what a tanh can reach.

    Source: Shen et al. 2017, section 3.1 and the authors' code (4x4 kernels, 64 and 128 channels).
    """

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        out = torch.tanh(self.body(pad_to(images, 4) * 2 - 1).to(images.dtype)) / 2 + 0.5
        return out[..., :height, :width]


@discriminators.register("ape")
class ApeDiscriminator(nn.Module):
    """APE-GAN's discriminator: `(N, C, H, W)` in [0, 1] -> one logit each, `(N,)`; any size from 8x8.

    Source: Shen et al. 2017 and the authors' code: 64, 128, 256 channels at stride 2, batch norm, one linear layer
    (here over a 4x4 grid, which at 28x28 and 32x32 is what the strides leave).
    """

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1),
            nn.BatchNorm2d(4 * width),
            nn.LeakyReLU(0.2),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(4 * width * 16, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images * 2 - 1).squeeze(1)


class Block(nn.Module):
    """Two 3x3 convolutions around a skip. No normalization: an image's output is its own."""

    def __init__(self, width: int, depth: int = 2) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(width, width, 3, padding=1) for _ in range(depth)]
        for convolution in convolutions:
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        # Fixup's idea (Zhang et al. 2019): a branch that starts small needs no normalization.
        with torch.no_grad():
            convolutions[-1].weight.mul_(0.1)
        self.convolutions = nn.ModuleList(convolutions)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for convolution in self.convolutions:
            y = convolution(F.relu(y))
        return x + y


@generators.register("unet")
class UNet(nn.Module):
    """A residual U-Net, `(N, C, H, W)` in [0, 1] to the same, any size (padded to its stride and cropped back).

    width: channels at the first scale, doubled at each further one up to four times. scales: resolutions. blocks:
    residual blocks per scale and direction. squeeze: pixels folded into channels before the first convolution (2
    computes everything at half the resolution). output: what the zero-initialized last layer d starts as:
    `"residual"`: x + d, clipped: the identity. `"threshold"`: sigmoid(k (x - 1/2 + d)), k = sharpness: a soft
    threshold, for images that are nearly black and white. gate: d is multiplied by one number of each image, in (0, 2)
    and 1 at first, read off the mean of the coarsest features: a clean image can be left alone as a whole.
    limit: d is cut softly to [-limit, limit], limit * tanh(d / limit); a budget as an attack's eps. guide: planes of
    the image's height and width that are read beside it. A nudge that a call brings is added to d.
    """

    def __init__(
        self,
        channels: int,
        width: int = 32,
        scales: int = 2,
        blocks: int = 1,
        squeeze: int = 1,
        output: Literal["residual", "threshold"] = "residual",
        sharpness: float = 8.0,
        gate: bool = False,
        limit: float | str | None = None,
        guide: int = 0,
    ) -> None:
        super().__init__()
        if output not in ("residual", "threshold"):
            raise ValueError(f"output must be 'residual' or 'threshold', not {output!r}")
        self.squeeze, self.output, self.sharpness = squeeze, output, sharpness
        self.limit = None if limit is None else budget(limit)
        self.stride = squeeze * 2 ** (scales - 1)
        widths = [width * min(2**s, 4) for s in range(scales)]
        inside = channels * squeeze**2
        self.stem = nn.Conv2d(inside + guide * squeeze**2, width, 3, padding=1)
        self.down = nn.ModuleList(nn.Sequential(*(Block(w) for _ in range(blocks))) for w in widths)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.grow = nn.ModuleList(nn.Conv2d(b, 4 * a, 1) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.Sequential(*(Block(w) for _ in range(blocks))) for w in widths[:-1])
        self.head = nn.Conv2d(width, inside, 3, padding=1)
        self.gate = nn.Linear(widths[-1], 1) if gate else None
        for module in filter(None, (self.head, self.gate)):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)

    def forward(self, images: Tensor, guide: Tensor | None = None, nudge: Tensor | None = None) -> Tensor:
        height, width = images.shape[-2:]
        padded = pad_to(images, self.stride)
        seen = padded - 0.5
        if guide is not None:
            seen = torch.cat([seen, pad_to(guide.to(seen.dtype), self.stride)], 1)
        x = self.stem(F.pixel_unshuffle(seen, self.squeeze) if self.squeeze > 1 else seen)
        skips = []
        for level, blocks in enumerate(self.down):
            x = blocks(x)
            if level < len(self.shrink):
                skips.append(x)
                x = self.shrink[level](x)
        coarsest = x
        for level in reversed(range(len(skips))):
            x = skips[level] + F.pixel_shuffle(self.grow[level](x), 2)
            x = self.up[level](x)
        d = self.head(F.relu(x)).to(images.dtype)
        if self.gate is not None:
            d = d * (2 * self.gate(F.relu(coarsest).mean((2, 3))).sigmoid()).to(images.dtype)[..., None, None]
        d = F.pixel_shuffle(d, self.squeeze) if self.squeeze > 1 else d
        if nudge is not None:
            d = d + pad_to(nudge.to(d.dtype), self.stride)
        if self.limit is not None:
            d = self.limit * torch.tanh(d / self.limit)
        if self.output == "threshold":
            out = torch.sigmoid(self.sharpness * (padded - 0.5 + d))
        else:
            out = (padded + d).clamp(0, 1)
        return out[..., :height, :width]
