"""An attack of another library, judged as those of this package are, beside one of them.

    pip install foolbox
    python examples/attack_of_another_library.py

`wrap_attack` takes attacks of torchattacks, foolbox and ART. What they give back is checked: shape, range, budget.
"""

import foolbox
import torch
from torch import nn

import unperturb as up

data = up.load_dataset("digits", size=8)
torch.manual_seed(0)
net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
x, y = data.train.batch(torch.arange(len(data.train)))
for _ in range(150):
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()

attacks = {
    "ours": up.create_attack("pgd", eps=0.1, steps=10),
    # A foolbox attack gets its model and its budget at each call; those of torchattacks are made around a model:
    # up.wrap_attack(lambda model: torchattacks.PGD(model, eps=0.1, steps=10), eps=0.1)
    "foolbox": up.wrap_attack(foolbox.attacks.LinfPGD(steps=10, rel_stepsize=0.25), eps=0.1),
}
systems = {"undefended": net, "blurred": up.Protected(net, up.create_defense("gaussian_blur"))}
rows = up.evaluate(data.test, systems, attacks=attacks, knowledge=["oblivious", "white_box"], n=100)
print(up.table(rows))
