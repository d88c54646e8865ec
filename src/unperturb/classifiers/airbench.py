"""A network made for fast CIFAR-10 training, after airbench94 (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a
single GPU"), with a learned stem in the place of its whitening."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unperturb.classifiers.base import classifiers
from unperturb.registry import unknown

_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class Scale(nn.Module):
    """`factor * x`: keeps the first logits small, so that the first steps can be large."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x

    def extra_repr(self) -> str:
        return f"{self.factor:g}"


class Mirrored(nn.Sequential):
    """In eval mode, the mean of the logits of an image and of its mirror image, at twice the cost; one pass for both,
    so that each layer is called once and a fused copy can still fold its norms."""

    def forward(self, x: Tensor) -> Tensor:
        both = x if self.training else torch.cat([x, x.flip(-1)])
        for layer in self:
            both = layer(both)
        if self.training:
            return both
        plain, mirrored = both.chunk(2)
        return (plain + mirrored) / 2


def _norm(width: int) -> nn.BatchNorm2d:
    # Bias alone is learned, as in the source. With its scale above zero the norm commutes with the max pooling before
    # it, so the frozen, fused copy can fold it into the convolution.
    norm = nn.BatchNorm2d(width)
    norm.weight.requires_grad_(False)
    return norm


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 3, padding="same", bias=False)
    nn.init.dirac_(conv.weight.data[:inputs])  # hands its input on at the start
    return conv


@classifiers.register("airbench")
def airbench(
    *,
    channels: int,
    size: int,
    classes: int,
    widths: Sequence[int] = (48, 128, 256),
    activation: str = "gelu",
    mirror: bool = False,
    scale: float = 1 / 9,
) -> nn.Module:
    """Three blocks of conv, max pool, norm, act, conv, norm, act; 54 million multiply-accumulates at 32x32.

    widths: channels of each block; (64, 256, 256), 118 million, are the source's. activation: "gelu" or "relu".
    mirror: once trained, judge an image and its mirror image together, as the source does. scale: the factor of the
    logits; in training at temperature T, T / 9 learns at the pace that the source has at 1. Takes any size from 9 up.
    """
    if size < 2 ** len(widths) + 1:
        least = 2 ** len(widths) + 1
        raise ValueError(
            f"airbench with {len(widths)} blocks takes images of {least}x{least} pixels or more; got {size}"
        )
    if activation not in _ACTIVATIONS:
        raise unknown("activation", activation, _ACTIVATIONS)
    act = _ACTIVATIONS[activation]
    inputs = 8 * channels  # a 2x2 patch has 4 * channels numbers: room for both signs of each
    layers: list[nn.Module] = [nn.Conv2d(channels, inputs, 2), act()]
    for width in widths:
        layers += [_conv(inputs, width), nn.MaxPool2d(2), _norm(width), act()]
        layers += [_conv(width, width), _norm(width), act()]
        inputs = width
    head = nn.Linear(inputs, classes, bias=False)
    kind = Mirrored if mirror else nn.Sequential
    return kind(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), head, Scale(scale))
