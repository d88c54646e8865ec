"""A small ConvNeXt (Liu et al. 2022, "A ConvNet for the 2020s"): depthwise 7x7 convolutions and layer normalization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unperturb.classifiers.base import classifiers


class ChannelNorm(nn.LayerNorm):
    """Layer normalization over the channels of each place; no copy where memory is channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Depthwise 7x7, norm, expansion by four, GELU, projection, scaled, and a shortcut (figure 4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.project = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))  # the paper's 1e-6 is for far longer training

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.project(self.act(self.expand(y))) * self.scale
        return x + y.permute(0, 3, 1, 2)


@classifiers.register("convnext")
def convnext(
    *,
    channels: int,
    size: int,
    classes: int,
    width: int = 32,
    depths: Sequence[int] = (2, 2, 6, 2),
    patch: int | None = None,
) -> nn.Module:
    """116 million multiply-accumulates at 128x128.

    depths: blocks of each stage; a stage halves the sides and doubles the width. patch: stride of the first layer;
    4 from 64 pixels on and 2 below, unless given. Takes any size from patch * 2**(stages - 1) up.
    """
    patch = patch or (4 if size >= 64 else 2)
    least = patch * 2 ** (len(depths) - 1)
    if size < least:
        raise ValueError(f"this convnext takes images of {least}x{least} pixels or more; got {size}x{size}")
    layers: list[nn.Module] = [nn.Conv2d(channels, width, patch, patch), ChannelNorm(width, eps=1e-6)]
    for stage, depth in enumerate(depths):
        if stage:
            layers += [ChannelNorm(width, eps=1e-6), nn.Conv2d(width, 2 * width, 2, 2)]
            width *= 2
        layers += [Block(width) for _ in range(depth)]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(width, eps=1e-6)]
    net = nn.Sequential(*layers, *pool, nn.Linear(width, classes))
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net
