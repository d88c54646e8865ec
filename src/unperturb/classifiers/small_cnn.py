"""The four-convolution net that MNIST's robust accuracies are reported on (Carlini and Wagner 2017; Zhang et al. 2019,
TRADES, their SmallCNN)."""

from __future__ import annotations

from torch import nn

from unperturb.classifiers.base import classifiers


@classifiers.register("small_cnn")
def small_cnn(*, channels: int, size: int, classes: int, width: int = 32) -> nn.Module:
    """10 million multiply-accumulates at 28x28. width: of the first stage, twice that in the second. Takes any size
    from 16 up.

    Different: no dropout, for what is attacked in training and what learns are then one function.
    """
    side = ((size - 4) // 2 - 4) // 2
    if side < 1:
        raise ValueError(f"small_cnn takes images of 16x16 pixels or more; got {size}x{size}")
    return nn.Sequential(
        nn.Conv2d(channels, width, 3),
        nn.ReLU(),
        nn.Conv2d(width, width, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * side * side, 200),
        nn.ReLU(),
        nn.Linear(200, 200),
        nn.ReLU(),
        nn.Linear(200, classes),
    )
