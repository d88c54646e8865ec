"""Small nets that read scikit-learn's digits, and images that they get right: what attacks are compared on."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NETS = {
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    ),
    "wide": lambda: nn.Sequential(
        nn.Conv2d(1, 12, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(192, 40), nn.ReLU(),
        nn.Linear(40, 10),
    ),
    "layers": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    ),
}  # fmt: skip


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 digits as `(N, 1, 16, 16)` in [0, 1], and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return F.interpolate(images, scale_factor=2), torch.tensor(data.target)


@functools.cache
def digit_net(kind: str = "convolutions") -> nn.Module:
    """One of `NETS`, trained on the first 1,500 digits."""
    images, labels = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NETS[kind]()
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(6):
            for rows in torch.randperm(1500).split(50):
                loss = F.cross_entropy(model(images[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.eval().requires_grad_(False)


def known(n: int, *kinds: str) -> tuple[Tensor, Tensor]:
    """The first `n` test images that the nets of these kinds get right, and their labels."""
    images, labels = (part[1500:] for part in digits())
    right = torch.stack([digit_net(kind)(images).argmax(1) == labels for kind in kinds or ["convolutions"]]).all(0)
    assert int(right.sum()) >= n
    return images[right][:n], labels[right][:n]
