"""A purifier of one's own in front of a classifier, against an attacker who knows of it.

    python examples/own_defense.py

It rounds to few grey levels. Rounding has no gradient, so it says what an attacker may differentiate in its place:
without that, an attack would find nothing, and the purifier would look better than it is.
"""

import torch
from torch import Tensor, nn

import unperturb as up


class Levels(up.Defense):
    """The nearest of `levels` grey levels, after a little blurring."""

    differentiable = False  # then an attacker who knows of it goes by `surrogate_backward` (BPDA)

    def __init__(self, levels: int = 4) -> None:
        super().__init__()
        self.levels = levels
        self.blur = up.create_defense("gaussian_blur", sigma=0.5)

    def purify(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] to the same; each by itself, whatever the batch."""
        return (self.blur(images) * (self.levels - 1)).round() / (self.levels - 1)

    def surrogate_backward(self, images: Tensor) -> Tensor:
        """What has the gradient that rounding lacks."""
        return self.blur(images)


data = up.load_dataset("digits", size=8)
torch.manual_seed(0)
net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
x, y = data.train.batch(torch.arange(len(data.train)))
for _ in range(150):
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()

rows = up.evaluate(
    data.test,
    {"undefended": net, "levels": up.Protected(net, Levels())},
    attacks=[up.create_attack("pgd", eps=0.1, steps=20)],
    knowledge=["oblivious", "bpda"],
    n=100,
)
print(up.table(rows))
print("One that is to have a name in recipes and a run folder: see CONTRIBUTING.md, 'A new defense'.")
