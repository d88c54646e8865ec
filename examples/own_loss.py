"""A loss of one's own in an attack that follows gradients: here the probability of the label itself.

    python examples/own_loss.py

A loss is any function of logits (N, K) and labels (N,) that gives one number per image, (N,), to be made large.
"""

import torch
from torch import Tensor, nn

import unperturb as up


def probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the softmax of the label: flat where the net is sure, so a weaker guide than cross-entropy."""
    return -logits.softmax(1).gather(1, labels[:, None]).squeeze(1)


data = up.load_dataset("digits", size=8)
torch.manual_seed(0)
net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
x, y = data.train.batch(torch.arange(len(data.train)))
for _ in range(150):
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()

images, labels = data.test.batch(torch.arange(100))
shares = {}
for name, loss in (("cross_entropy", "cross_entropy"), ("margin", "margin"), ("own", probability)):
    attack = up.create_attack("pgd", eps=0.05, steps=10, loss=loss)
    found = attack.run(net, images, labels)
    shares[name] = float(found.success.float().mean())
    print(f"{attack!r}: {100 * shares[name]:.0f} % of the images turned")
