"""LeNet-5 (LeCun et al. 1998, "Gradient-based learning applied to document recognition"), with ReLU and max pooling."""

from __future__ import annotations

from torch import nn

from unperturb.classifiers.base import classifiers


@classifiers.register("lenet5")
def lenet5(*, channels: int, size: int, classes: int) -> nn.Module:
    """0.4 million multiply-accumulates at 28x28. Takes any size from 12 up."""
    side = (size // 2 - 4) // 2
    if side < 1:
        raise ValueError(f"lenet5 takes images of 12x12 pixels or more; got {size}x{size}")
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * side * side, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )
