"""The plain conv-conv-fc net of the robustness literature (Wong and Kolter 2018, "Provable defenses via the convex
outer adversarial polytope", their small network)."""

from __future__ import annotations

from torch import nn

from unperturb.classifiers.base import classifiers


@classifiers.register("convnet")
def convnet(*, channels: int, size: int, classes: int) -> nn.Module:
    """0.6 million multiply-accumulates at 28x28. Takes any size from 4 up."""
    side = size // 2 // 2
    if side < 1:
        raise ValueError(f"convnet takes images of 4x4 pixels or more; got {size}x{size}")
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * side * side, 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )
