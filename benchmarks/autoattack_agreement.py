"""Our AutoAttack beside torchattacks' port of it, image by image: on an adversarially trained MNIST net, or through a
purifier.

    python benchmarks/autoattack_agreement.py                       # trains the net (minutes), then 1,000 images
    python benchmarks/autoattack_agreement.py --net runs/my-net     # a classifier of your own
    python benchmarks/autoattack_agreement.py --net zoo:mnist-resnet8 --defense zoo:finetune-mnist --eps 0.1 \
        --out results/autoattack_agreement/protected.json           # through a purifier, where something stands
    python benchmarks/autoattack_agreement.py --n 50 --minutes 0.2 --steps 5 --queries 50   # does it run?

The peer gets as many steps as we (as shipped its AutoAttack takes 10 instead of 100; `--as-shipped` leaves it so). It
is run with two seeds: what it disagrees with itself is the measure for what it may disagree with us. Ours takes the
first of them, or both by `--twice`. What is known is written after each run.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn

from unperturb.attacks.autoattack import AutoAttack
from unperturb.attacks.base import create_attack
from unperturb.classifiers import create_classifier, load_classifier, save_classifier
from unperturb.data import ImageSet, load_dataset
from unperturb.defenses import Protected, load_defense
from unperturb.devices import pick_device
from unperturb.intervals import wilson
from unperturb.per_image_rng import permutation
from unperturb.runs import environment, write_json

HERE = Path(__file__).resolve().parent


def train(data: ImageSet, device: torch.device, *, eps: float, minutes: float, batch: int = 128) -> nn.Module:
    """A small net, trained on PGD-7 images alone for so many minutes; the budget rises over the first third, since from
    scratch a net this small never leaves chance under the whole of it."""
    torch.manual_seed(0)
    images, labels = data.batch(torch.arange(len(data)), device)
    channels, size, _ = data.shape
    mean, std = [float(images.mean())] * channels, [float(images.std())] * channels
    net = create_classifier("convnet", channels=channels, size=size, classes=data.classes, mean=mean, std=std).to(
        device
    )
    adam = torch.optim.Adam(net.parameters(), lr=2e-3)
    start, step, epoch = time.monotonic(), 0, 0
    while True:
        for rows in permutation(0, epoch, len(images)).split(batch):
            done = (time.monotonic() - start) / (60 * minutes)
            if done >= 1:
                print(f"trained {step} steps, {epoch + 1} epochs")
                return net.eval()
            reach = eps * min(1.0, 3 * done)
            for group in adam.param_groups:
                group["lr"] = 2e-3 * (1 - done)
            x, y = images[rows.to(device)], labels[rows.to(device)]
            pgd = create_attack("pgd", eps=reach, alpha=reach / 3, steps=7)
            loss = F.cross_entropy(net(pgd(net, x, y, index=rows.to(device), seed=epoch)), y)
            adam.zero_grad()
            loss.backward()
            adam.step()
            step += 1
        epoch += 1


def peer(net: nn.Module, attack: AutoAttack, classes: int, seed: int, as_shipped: bool) -> Any:
    """torchattacks' AutoAttack with our settings."""
    norm = {"linf": "Linf", "l2": "L2"}[attack.norm]
    made = torchattacks.AutoAttack(net, norm=norm, eps=attack.eps, n_classes=classes, seed=seed)
    if not as_shipped:
        for member in made._autoattack.attacks:
            if hasattr(member, "n_queries"):
                member.n_queries = attack.queries
            else:
                member.steps = attack.steps
    return made


@torch.no_grad()
def stands(net: nn.Module, images: Tensor, labels: Tensor, size: int) -> Tensor:
    """`(N,)` bool: still classified correctly."""
    return torch.cat([net(x).argmax(1) == y for x, y in zip(images.split(size), labels.split(size))])


def describe(active: Tensor, seconds: float, cpu_seconds: float) -> dict[str, Any]:
    """Robust accuracy with its interval, and the time it took: on the clock, and of all threads of the processor."""
    n, right = len(active), int(active.sum())
    low, high = wilson(right, n)
    return {
        "robust_accuracy": right / n,
        "wilson_95": [low, high],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist", help="as in load_dataset")
    parser.add_argument("--net", help="run folder of a classifier, or zoo:NAME; without it one is trained")
    parser.add_argument("--defense", help="a purifier before it: a run folder, zoo:NAME or a name")
    parser.add_argument("--save", type=Path, help="folder for the trained classifier")
    parser.add_argument("--minutes", type=float, default=6.0, help="of training")
    parser.add_argument("--n", type=int, default=1000, help="test images, a fixed random subset")
    parser.add_argument("--norm", choices=["linf", "l2"], default="linf")
    parser.add_argument("--eps", default="0.3", help="a number or a fraction such as 8/255")
    parser.add_argument("--steps", type=int, default=100, help="of APGD and FAB, ours and the peer's")
    parser.add_argument("--queries", type=int, default=5000, help="of Square, ours and the peer's")
    parser.add_argument("--seeds", type=int, nargs=2, default=[0, 1], help="of the peer; ours takes the first")
    parser.add_argument("--twice", action="store_true", help="ours with the second seed too")
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--as-shipped", action="store_true", help="leave the peer its own steps and queries")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results/autoattack_agreement/agreement.json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    data = load_dataset(options.dataset)
    attack = AutoAttack(norm=options.norm, eps=options.eps, steps=options.steps, queries=options.queries)
    if options.net is not None:
        net = load_classifier(options.net).to(device).eval()
    else:
        net = train(data.train, device, eps=attack.eps, minutes=options.minutes)
        if options.save is not None:
            trained = f"PGD-7, linf {attack.eps}, {options.minutes} minutes"
            save_classifier(options.save, net, {"dataset": options.dataset, "trained": trained})
    if options.defense is not None:
        net = Protected(net, load_defense(options.defense)).to(device).eval()
    for parameter in net.parameters():
        parameter.requires_grad_(False)  # the peer would pay for their gradients

    test = data.test.subset(options.n)
    images, labels = test.batch(torch.arange(len(test)), device)
    index = test.index.to(device)
    clean = stands(net, images, labels, options.batch)
    runs: dict[str, Tensor] = {}
    record: dict[str, Any] = {}
    head = {
        "what": "AutoAttack, ours and torchattacks', per image",
        "dataset": f"{options.dataset} {test.name}",
        "n": len(images),
        "net": str(options.net or f"convnet, PGD-7 trained for {options.minutes} minutes"),
        "defense": options.defense,
        "clean_accuracy": float(clean.float().mean()),
        "attack": repr(attack),
        "peer": "torchattacks 3.5.1" + (", its own steps" if options.as_shipped else ", our steps and queries"),
    }
    for seed in options.seeds:
        broken_by: list[str] = []

        def ours(rows: Tensor, seed: int = seed, broken_by: list[str] = broken_by) -> Tensor:
            result = attack.run(net, images[rows], labels[rows], index=index[rows], seed=seed)
            broken_by += result.broken_by
            return result.images

        def theirs(rows: Tensor, seed: int = seed) -> Tensor:
            return peer(net, attack, test.classes, seed, options.as_shipped)(images[rows], labels[rows]).detach()

        for who, run in ((f"ours@{seed}", ours), (f"torchattacks@{seed}", theirs)):
            if run is ours and seed != options.seeds[0] and not options.twice:
                continue
            start, cpu_start = time.monotonic(), time.process_time()
            found = torch.cat([run(rows) for rows in torch.arange(len(images), device=device).split(options.batch)])
            seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
            runs[who] = stands(net, found, labels, options.batch)
            distance = (found - images).flatten(1).norm(dim=1, p=torch.inf if options.norm == "linf" else 2)
            record[who] = describe(runs[who], seconds, cpu_seconds) | {"largest_distance": float(distance.max())}
            if run is ours:
                record[who]["broken_by"] = {n or "none": broken_by.count(n) for n in sorted(set(broken_by))}
            print(who, record[who], flush=True)
            write_json(options.out, head | verdict(runs, record, options.seeds) | {"environment": environment()})
    print(f"wrote {options.out}")


def verdict(runs: dict[str, Tensor], record: dict[str, Any], seeds: list[int]) -> dict[str, Any]:
    """The runs so far, how many images each two of them judge differently, and whether ours is near enough."""
    names = sorted(runs)
    differ = {f"{a} | {b}": int((runs[a] != runs[b]).sum()) for i, a in enumerate(names) for b in names[i + 1 :]}
    said: dict[str, Any] = {"runs": record, "images_that_differ": differ}
    ours, first, second = f"ours@{seeds[0]}", f"torchattacks@{seeds[0]}", f"torchattacks@{seeds[1]}"
    if ours in runs and first in runs:
        points = 100 * (record[ours]["robust_accuracy"] - record[first]["robust_accuracy"])
        said |= {"difference_in_points": points, "within_0.3_points": abs(points) <= 0.3}
    if ours in runs and second in runs:
        itself = differ[f"{first} | {second}"]
        said["no_more_than_the_peer_with_itself"] = differ[f"{ours} | {first}"] <= itself
    return said


if __name__ == "__main__":
    main()
