"""A small VGG-like net (Simonyan and Zisserman 2015) with batch normalization and averaging before its last layer."""

from __future__ import annotations

from torch import nn

from unperturb.classifiers.base import classifiers


@classifiers.register("vgg")
def vgg(*, channels: int, size: int, classes: int, width: int = 32, stages: int = 3) -> nn.Module:
    """Stages of two 3x3 convolutions and a max pooling; 39 million multiply-accumulates at 32x32.

    width: of the first stage; each further one is twice as wide. Takes any size from 2**stages up.
    """
    if stages < 1 or size < 2**stages:
        raise ValueError(f"vgg with {stages} stages takes images of {2**stages}x{2**stages} pixels or more; got {size}")
    layers: list[nn.Module] = []
    inputs = channels
    for stage in range(stages):
        for _ in range(2):
            outputs = width * 2**stage
            conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
