"""A linear classifier, images that it mostly knows, and a small purifier: what evaluations are tested on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unperturb.data import ImageSet
from unperturb.defenses import Defense, create_defense


class Linear(nn.Module):
    """Logits `W x + b`."""

    def __init__(self, seed: int = 0, classes: int = 4, size: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, size, generator=generator) * 0.3)
        self.bias = nn.Parameter(-self.weight.detach().sum(1) / 2)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T + self.bias


def toy(n: int = 10, seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 1, 8, 8), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        labels = Linear()(images.float() / 255).argmax(1)
    labels[-1] = (labels[-1] + 1) % 4
    names = [str(k) for k in range(4)]
    return ImageSet(
        images=images, labels=labels, index=torch.arange(n) + 100, class_names=names, source="toy", split="test"
    )


def purifier(seed: int = 0) -> Defense:
    torch.manual_seed(seed)
    defense = create_defense(
        "paired_gan", channels=1, generator={"name": "unet", "width": 4, "output": "threshold", "sharpness": 4.0}
    )
    for tensor in defense.state_dict().values():
        tensor.add_(torch.randn_like(tensor) * 0.03)
    return defense.eval()
