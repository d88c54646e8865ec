"""A purifier whose class decision is made by a robust classifier and then written into the image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unperturb.classifiers import create_classifier
from unperturb.defenses.networks import UNet, generators


@generators.register("guided")
class GuidedUNet(nn.Module):
    """A robust encoder decides, a U-Net nudges the image so that the classifier behind it decides alike.

    `(N, C, size, size)` in [0, 1] to the same. The encoder is a classifier that was trained against attacks on itself;
    the purifier as a whole stands about as long as it does, for a standard classifier follows a small nudge that knows
    where to go as readily as it follows an attacker's. Each class has a nudge of its own, learned, which is zero at
    first, and planes that the U-Net reads beside the image; both are mixed by the encoder's probabilities.

    encoder: `{"name": ..., options}` of a classifier family; `start` in a recipe gives it the weights of a run.
    classes: that it tells apart. planes: of each class. train_encoder: it learns on, too; else it stays as it is. What
    else there is goes to `UNet`.

    Source: ours. That robustness of a frozen classifier's purifier is that of a classifier inside: facts of adversarial
    training through a frozen net (Li et al. 2019, AdvAE); that small nudges steer a net: Baluja and Fischer 2018,
    adversarial transformation networks.
    """

    def __init__(
        self,
        channels: int,
        encoder: dict[str, Any],
        size: int,
        classes: int,
        planes: int = 4,
        train_encoder: bool = False,
        **unet: Any,
    ) -> None:
        super().__init__()
        half = [0.5] * channels  # weights that are loaded bring a mean and a deviation of their own
        self.encoder = create_classifier(
            **{**encoder, "channels": channels, "size": size, "classes": classes, "mean": half, "std": half}
        )
        if not train_encoder:
            self.encoder.freeze()
        self.size = size
        self.nudges = nn.Parameter(torch.zeros(classes, channels, size, size))
        self.planes = nn.Parameter(0.5 * torch.randn(classes, planes, size, size))
        self.unet = UNet(channels, guide=planes, **unet)

    def forward(self, images: Tensor) -> Tensor:
        decided = self.encoder(images).float().softmax(1)
        nudge, guide = ((decided @ t.flatten(1)).view(-1, *t.shape[1:]) for t in (self.nudges, self.planes))
        return self.unet(images, guide, nudge)
