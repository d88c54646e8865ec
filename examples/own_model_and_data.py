"""A purifier for a model and for images of one's own, which are tensors here: trained, judged, kept and read again.

    python examples/own_model_and_data.py

A small net and a short training: what it prints shows the way, not what is possible.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import unperturb as up

# Images of any kind: uint8, or float in [0, 1], (N, C, H, W); labels (N,).
digits = load_digits()
images = torch.from_numpy(digits.images / 16 * 255).round().to(torch.uint8)[:, None]
labels = torch.from_numpy(digits.target).long()

# Nothing is tuned on the test images.
names = [str(k) for k in range(10)]
parts = {"train": slice(0, 1300), "val": slice(1300, 1500), "test": slice(1500, None)}
sets = {
    k: up.as_image_set((images[p], labels[p]), class_names=names, name="own-digits", split=k) for k, p in parts.items()
}
data = up.Splits(**sets, class_names=names, source="own-digits")

# A model of any kind: images in [0, 1] -> logits. Its own normalization may be a part of it, or mean and std of wrap.
torch.manual_seed(0)
net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
x, y = data.train.batch(torch.arange(len(data.train)))
for _ in range(150):
    optimizer.zero_grad()
    nn.functional.cross_entropy(net((x - 0.3) / 0.4), y).backward()
    optimizer.step()
classifier = up.wrap(net, mean=[0.3], std=[0.4], size=8, classes=10)

# The recipe says which purifier learns what; only what differs is said here. The classifier is never changed.
purifier = up.train_defense(
    "protect-digits",
    classifier,
    data,
    out="runs/own-digits",
    overrides=["training.epochs=4", "training.precision=float32", "training.memory_format=contiguous"],
)

protected = up.Protected(classifier, purifier)
rows = up.evaluate(
    data.test,
    {"undefended": classifier, "ours": protected},
    attacks=[up.create_attack("pgd", eps=0.2, steps=10)],
    knowledge=["oblivious", "white_box"],
    n=100,
)
print(up.table(rows))

again = up.load_defense("runs/own-digits")  # or up.Defense.from_pretrained("runs/own-digits")
assert torch.equal(again(x[:4]), purifier(x[:4]))
