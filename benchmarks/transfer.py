"""How far images made on one net carry to another: ours beside torchattacks', the same eps, steps and step length.

    python benchmarks/transfer.py                       # nets of the zoo, MNIST, 200 images
    python benchmarks/transfer.py --n 50 --eps 0.2

The nets attacked and the surrogates are different families, trained apart. A number is the share of the images that a
net gets wrong, of those that all of them get right when clean. torchattacks returns the last point, ours the best met.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torchattacks
from torch import Tensor, nn

from unperturb.attackers import Ensemble
from unperturb.attacks import create_attack
from unperturb.classifiers import load_classifier
from unperturb.data import load_dataset
from unperturb.runs import environment, write_json

ROOT = Path(__file__).resolve().parent.parent
NETS = ("mnist-lenet5", "mnist-convnet", "mnist-resnet8")
PEERS = {"mim": "MIFGSM", "ni_fgsm": "NIFGSM", "di_fgsm": "DIFGSM", "si_ni_fgsm": "SINIFGSM", "vmi_fgsm": "VMIFGSM"}


def ways(name: str, surrogate: nn.Module, eps: float, steps: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The attack by each library, with the same settings."""
    shared: dict[str, Any] = {"eps": eps, "alpha": eps / steps, "steps": steps, "decay": 1.0}
    ours = create_attack(name, **shared)
    return {
        "ours": lambda x, y: ours(surrogate, x, y),
        "torchattacks": getattr(torchattacks, PEERS[name])(surrogate, **shared),
    }


@torch.no_grad()
def wrong(net: nn.Module, x: Tensor, labels: Tensor) -> float:
    return float((net(x).argmax(1) != labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--eps", type=float, default=0.15)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "results/attacks/transfer.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    nets = {name: load_classifier(ROOT / "zoo" / name).eval().requires_grad_(False) for name in NETS}
    test = load_dataset("mnist").test.subset(2 * options.n)
    images, labels = test.batch(torch.arange(len(test)))
    with torch.no_grad():
        right = torch.stack([net(images).argmax(1) == labels for net in nets.values()]).all(0)
    images, labels = images[right][: options.n], labels[right][: options.n]
    rows = []
    for target in NETS[1:]:
        others = {name: net for name, net in nets.items() if name != target}
        surrogates = {NETS[0]: nets[NETS[0]], "+".join(others): Ensemble(*others.values())}
        for surrogate, model in surrogates.items():
            for attack in PEERS:
                row: dict[str, Any] = {"target": target, "surrogate": surrogate, "attack": attack}
                for library, make in ways(attack, model, options.eps, options.steps).items():
                    torch.manual_seed(0)
                    row[library] = wrong(nets[target], make(images, labels).detach(), labels)
                rows.append(row)
                told = ", ".join(f"{k} {row[k]:.1%}" for k in ("ours", "torchattacks"))
                print(f"{target:14} by {surrogate:28} {attack:11} {told}", flush=True)
    record = {"what": "transfer of attacks", "n": len(images), "eps": options.eps, "steps": options.steps, "rows": rows}
    write_json(options.out, record | {"environment": environment()})
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
