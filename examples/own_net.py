"""A classifier of one's own, as `--classifier examples/own_net.py:net` finds it: images (N, 1, 28, 28) to 10 logits."""

from torch import nn


def net() -> nn.Module:
    """Untrained; its weights come with `--weights FILE`."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 5, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 10),
    )
