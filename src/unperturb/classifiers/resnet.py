"""Residual networks (He et al. 2016, "Deep residual learning for image recognition"): the CIFAR family of section 4.2
and the 18-layer one of section 4.1 at reduced width."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from unperturb.classifiers.base import classifiers


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes (option B there)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def _resnet(stem: Sequence[nn.Module], inputs: int, widths: Sequence[int], blocks: int, classes: int) -> nn.Module:
    layers = list(stem)
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(BasicBlock(inputs, width, 2 if stage and not block else 1))
            inputs = width
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, BasicBlock):
            nn.init.zeros_(module.bn2.weight)  # each block starts as its shortcut, which trains faster
    return net


def _small(channels: int, classes: int, blocks: int, width: int) -> nn.Module:
    stem = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return _resnet(stem, width, (width, 2 * width, 4 * width), blocks, classes)


@classifiers.register("resnet8")
def resnet8(*, channels: int, size: int, classes: int, width: int = 16) -> nn.Module:
    """One block a stage; 9.5 million multiply-accumulates at 28x28. Takes any size."""
    return _small(channels, classes, 1, width)


@classifiers.register("resnet14")
def resnet14(*, channels: int, size: int, classes: int, width: int = 16) -> nn.Module:
    """Two blocks a stage; 20 million multiply-accumulates at 28x28. Takes any size."""
    return _small(channels, classes, 2, width)


@classifiers.register("resnet20")
def resnet20(*, channels: int, size: int, classes: int, width: int = 16) -> nn.Module:
    """Three blocks a stage; 41 million multiply-accumulates at 32x32. Takes any size."""
    return _small(channels, classes, 3, width)


@classifiers.register("resnet18")
def resnet18(*, channels: int, size: int, classes: int, width: int = 32) -> nn.Module:
    """The ImageNet network, half as wide by default; 158 million multiply-accumulates at 128x128. Takes any size."""
    stem = [
        nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]
    return _resnet(stem, width, (width, 2 * width, 4 * width, 8 * width), 2, classes)
